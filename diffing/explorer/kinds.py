"""What a run has to show, each kind in one shape: a crosscoder's latents, an SAE's, directions, pieces.

`Kind` is the shape: which models there are, what fires on each token of a prompt, a list and a page of each, and what
may be changed while a model answers. A number names one of a kind: a latent, or a row of the run's table. `fired_on`
puts entries into lists by token, `halves` takes a stored context apart, `plain_answer` is an answer without changes.
"""

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosscoders.common.errors import InputError
from crosscoders.models.pair import ModelPair
from crosscoders.text.padding import Batch
from crosscoders.text.settings import DataConfig
from diffing.explorer.answers import Change
from diffing.latents.latent_scaling import MODELS


class Fired(NamedTuple):
    """What fires on one token, first what writes most."""

    numbers: list[int]
    activations: list[float]
    lengths: list[list[float]]
    """Of what each writes, one for each of the kind's bars; units of what it is added to."""


class Pass(NamedTuple):
    """One prompt in every model of a kind."""

    finals: list[Float[Tensor, "seq d_model"]]
    """What the head of each model reads."""
    fired: list[Fired | None]
    """By token; None where the kind does not read it."""


class Answering(NamedTuple):
    """What writes an answer."""

    models: list[Any]
    """Run one after the other on the same tokens; the last one answers."""
    during: Callable[[], AbstractContextManager[None]]
    """What is on while they run."""


class Listing(NamedTuple):
    """The list of a kind as columns, in the order in which it is shown."""

    number: list[int]
    label: list[str]
    """What tells one from the others, beside its number; empty where the number is all."""
    tag: list[str]
    unit: list[float]
    """The activation that strengths are counted in."""
    text: list[list[str]]
    """Where it fires most: the text before, the token, the text after; empty where that is not known."""
    name: list[str | None]
    values: Mapping[str, list[Any]]


class Form(NamedTuple):
    """Words of a kind."""

    word: str
    models: tuple[str, ...]
    bars: tuple[str, ...]
    actions: tuple[str, ...]
    """Of steer, ablate, exchange."""
    tag: str
    unit: str
    darkest: float
    """Units at which a token is darkest."""
    sorts: dict[str, tuple[str, int]]
    """Column -> its title, and 1 where the smallest come first."""
    cells: dict[str, str]
    """Columns that the list shows, with short titles."""


@runtime_checkable
class Kind(Protocol):
    """Latents, directions or pieces of a run, on models in memory."""

    form: Form
    n: int
    """Numbers run from 0 to it."""
    data: DataConfig
    """How prompts become tokens."""
    pair: ModelPair

    def pass_over(self, batch: Batch) -> Pass: ...

    def model(self, name: str) -> Any: ...

    def on(self, name: str) -> AbstractContextManager[None]: ...

    def listing(self) -> Listing: ...

    def page(self, number: int) -> dict[str, Any]: ...

    def answering(
        self, change: Change, name: str, scored: Bool[np.ndarray, " prompt"], *, is_amplified: bool
    ) -> Answering: ...


def fired_on(
    read: Bool[Tensor, " seq"],
    tokens: Int[Tensor, " entries"],
    numbers: Int[Tensor, " entries"],
    values: Float[Tensor, " entries"],
    lengths: Float[Tensor, "entries bars"],
) -> list[Fired | None]:
    """Return what fires on each token, by its last length, longest first; tokens: position of each entry."""
    order = torch.argsort(lengths[:, -1], descending=True)
    by_token = [Fired([], [], []) if is_read else None for is_read in read.tolist()]
    columns = (part[order].tolist() for part in (tokens, numbers, values, lengths))
    for token, number, value, of_bars in zip(*columns, strict=True):
        fired = by_token[token]
        assert fired is not None
        fired.numbers.append(number)
        fired.activations.append(value)
        fired.lengths.append(of_bars)
    return by_token


def halves(context: str) -> list[str]:
    """Return the text before >>token<<, the token, and the text after."""
    found = re.fullmatch(r"(.*?)>>(?!>)(.*?)<<(.*)", context, re.DOTALL)
    return list(found.groups()) if found else [context, "", ""]


def plain(value: Any) -> Any:
    """Return a cell of a table as plain data; what is missing or undefined is None."""
    value = value.item() if isinstance(value, np.generic) else value
    is_missing = value is None or value is pandas.NA or (isinstance(value, float) and not math.isfinite(value))
    return None if is_missing else value


def require_numbers(numbers: list[int], kind: Kind) -> None:
    """Raise InputError for a number that the kind does not have."""
    wrong = [number for number in numbers if not 0 <= number < kind.n]
    if wrong:
        word = kind.form.word
        raise InputError(f"there is no {word} {wrong[0]}: there are {word}s 0 to {kind.n - 1}.")


def require_changes(change: Change, kind: Kind) -> None:
    """Raise InputError for what the kind does not have, or cannot do."""
    for action in ("steer", "ablate", "exchange"):
        if getattr(change, action) and action not in kind.form.actions:
            raise InputError(f"{action} is not for a {kind.form.word}; there is {', '.join(kind.form.actions)}.")
    require_numbers(change.latents(), kind)


def plain_answer(pair: ModelPair, name: str, *, is_amplified: bool) -> Answering:
    """Return what writes an answer of base or tuned without changes."""
    side = MODELS.index(name)
    both = [pair.models[1 - side], pair.models[side]]
    return Answering(both if is_amplified else both[1:], contextlib.nullcontext)
