"""The mathematics; knows no rank, no file, no configuration."""
