"""Latents of a run: Latent Scaling, norms, verdicts, partners, twins, stability."""
