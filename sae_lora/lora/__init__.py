"""LoRA in a model, and the folder of a fit."""
