"""Process groups, sharding, optimizers, checkpoints: alone in importing torchrec.distributed."""
