"""Paired activations: settings, the plan of a run, the cache on disk and the live stream."""
