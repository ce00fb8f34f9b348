"""Frozen dictionaries: files, hub, controls."""
