"""Crosscoders on disk, ours and the published layouts."""
