"""One published SAE read in both models: what changed, what of it causes the difference, against nulls."""
