"""Which latents cause the new behaviour: patching, steering, lens."""
