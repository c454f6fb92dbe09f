"""Process groups, sharding, optimizers, checkpoints: all uses of torchrec.distributed."""
