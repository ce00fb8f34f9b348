"""TopKLoRA as a diff of two models: the tuned one distilled into the base with a sparse adapter, and its directions."""
