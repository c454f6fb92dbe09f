"""A run behind HTTP: one process, one model, one page."""
