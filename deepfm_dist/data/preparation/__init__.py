"""The steps of `deepfm_dist.data.encode`: reading, partitions, merge, counts, fitting, writing."""
