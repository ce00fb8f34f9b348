"""What a dictionary cannot express of a fine-tune: LoRA around it in both models, and the gaps that are left."""
