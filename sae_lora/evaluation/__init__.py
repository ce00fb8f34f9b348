"""What a fit closed of the gap, beside its controls."""
