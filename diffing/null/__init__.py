"""Null calibration: how many "specific" latents the same pipeline finds where nothing was planted."""
