"""Baselines of diffing: geometry beside chance, delta activations, PCA, lenses, maps of scores, weight deltas."""
