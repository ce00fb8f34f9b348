"""Organisms: planted fine-tunes of the embedded base, each with a machine-readable truth."""
