"""Compiled inner loops of `crosscoders.sparse`: `cpu` (C, built on first use), `gpu` (Triton). Both are optional."""
