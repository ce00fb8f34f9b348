"""The crosscoder itself: parameters, selection, products, losses, metrics."""
