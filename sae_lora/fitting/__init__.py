"""Fitting LoRA or another corrector around frozen dictionaries."""
