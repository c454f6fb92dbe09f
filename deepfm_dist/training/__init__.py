"""The training loop and the figures on rows."""
