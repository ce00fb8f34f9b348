"""Kinds of control that stand in for a dictionary."""

from typing import Literal

ControlKind = Literal["none", "identity", "noise", "no-latents", "random-decoder", "shuffled-decoder"]


WITHOUT_LATENTS: tuple[ControlKind, ...] = ("identity", "noise", "no-latents")
"""Controls in which nothing that a latent does reaches the model."""
