"""Training a crosscoder: settings, loop, objective, optimizer, checkpoints."""
