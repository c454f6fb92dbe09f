"""The whole catalogue: scores, top-K, ranking metrics, baselines."""
