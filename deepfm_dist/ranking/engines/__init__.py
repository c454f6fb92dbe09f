"""Engines that score and rank the catalogue, one file each."""
