"""Rows of a prepared dataset -> what a training step needs."""
