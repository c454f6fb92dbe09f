"""Prepared dataset -> batches: order, negatives, histories and collation."""
