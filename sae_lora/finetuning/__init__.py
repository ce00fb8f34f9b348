"""Fine-tune an SAE to another model, so that its latents keep their numbers: a twin."""
