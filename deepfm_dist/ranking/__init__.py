"""Ranking the whole catalogue: scores, top-K, metrics, baselines."""
