"""deepfm_dist: distributed DeepFM training and whole-catalogue recommendation on TorchRec."""

__version__ = "0.1.0"
