"""The network: pure mathematics, without ranks, files or configuration."""
