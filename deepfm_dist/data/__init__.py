"""Tables on disk -> batches."""
