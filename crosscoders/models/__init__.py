"""Pairs of language models, hooks into them, their predictions."""
