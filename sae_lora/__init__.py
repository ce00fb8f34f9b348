"""LoRA around frozen sparse autoencoders. Nothing is here yet; docs/log.md says what is planned."""
