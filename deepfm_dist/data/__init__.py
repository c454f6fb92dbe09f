"""Input files -> prepared dataset -> batches."""
