"""Compiled inner loops of `dictionary.sparse`: `cpu` (C, built on first use), `gpu` (Triton). Both are optional."""
