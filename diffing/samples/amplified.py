r"""Amplified decoding: samples of the tuned model with its difference from the base made larger.

    log q(v)  =  log p_tuned(v) + a (log p_tuned(v) - log p_base(v)) + const
                 over tokens v with p_tuned(v) >= cut max_u p_tuned(u); no other token is drawn

a = 0 is the tuned model, a = -1 without a cut the base. Both models keep keys and values. Source: logit diff
amplification (Aranguri and McGrath 2025), Contrastive Decoding Diffing (arXiv 2605.25902); the cut is that of
contrastive decoding (Li et al. 2022, arXiv 2210.15097).

Reading order: `amplify` is the distribution, `decode` draws whole texts from it, `decode_steps` one token at a time,
`stop_ids` say where a text ends.
"""

import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.common.progress import Progress
from crosscoders.models.hooks import core_model
from crosscoders.models.names import quiet_transformers
from crosscoders.models.predictions import log_probs

GREEDY = 1.0
"""The cut at which only the likeliest token is left."""


class Sample(NamedTuple):
    """Tokens that followed one prompt."""

    ids: list[int]
    gain: float
    """Sum over these tokens of log p_tuned - log p_base, nats; 0 where one model decodes alone."""


def amplify(
    base: Float[Tensor, "rows vocab"], tuned: Float[Tensor, "rows vocab"], *, strength: float, cut: float
) -> Float[Tensor, "rows vocab"]:
    """Return the log-probabilities of the amplified distribution from those of both models; -inf where it is cut."""
    mixed = tuned if strength == 0 else tuned + strength * (tuned - base)
    if cut > 0:
        mixed = mixed.masked_fill(tuned < tuned.amax(dim=1, keepdim=True) + float(np.log(cut)), -torch.inf)
    return mixed.log_softmax(dim=1)


@torch.inference_mode()
@quiet_transformers()  # which renames the argument for keys and values
def decode(
    base: Any,
    tuned: Any,
    prompts: Sequence[Sequence[int]],
    *,
    strength: float,
    cut: float,
    max_new_tokens: int,
    ends: set[int],
    n_ids: int,
    batch_rows: int,
    seed: int,
    label: str = "samples",
) -> list[Sample]:
    """Return what follows each prompt, up to the first of `ends`; only the first `n_ids` are drawn.

    Where base and tuned are one object, it runs once. A sample depends on its place among the prompts and on the seed,
    not on the batch that it is in, but for rounding.
    """
    draws = torch.from_numpy(np.random.default_rng(seed).random((len(prompts), max_new_tokens)))
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    written: dict[int, Sample] = {}
    bar = Progress(label, total=len(prompts), unit="sample")
    for start in range(0, len(order), batch_rows):
        numbers = order[start : start + batch_rows]
        drawn = _decode_batch(
            [base] if base is tuned else [base, tuned],
            [prompts[i] for i in numbers],
            draws[numbers],
            strength=strength,
            cut=cut,
            ends=ends,
            n_ids=n_ids,
        )
        written |= dict(zip(numbers, drawn, strict=True))
        bar.update(len(numbers))
    bar.close()
    return [written[i] for i in range(len(prompts))]


def _decode_batch(
    models: list[Any],
    prompts: Sequence[Sequence[int]],
    draws: Float[Tensor, "rows steps"],
    *,
    strength: float,
    cut: float,
    ends: set[int],
    n_ids: int,
) -> list[Sample]:
    lines: list[list[int]] = [[] for _ in prompts]
    is_open, gains = [True] * len(prompts), [0.0] * len(prompts)
    steps = decode_steps(models, prompts, strength=strength, cut=cut, n_ids=n_ids, draws=draws)
    for step, _ in zip(steps, range(draws.shape[1]), strict=False):
        for row, (token, gained) in enumerate(zip(step.tokens, step.gains, strict=True)):
            is_open[row] = is_open[row] and token not in ends
            if is_open[row]:
                lines[row].append(token)
                gains[row] += gained
        if not any(is_open):
            break
    return [Sample(line, gain) for line, gain in zip(lines, gains, strict=True)]


class Step(NamedTuple):
    """The next token after each prompt."""

    tokens: list[int]
    gains: list[float]
    """log p_tuned - log p_base of each, nats."""


@torch.inference_mode()
def decode_steps(
    models: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    *,
    strength: float,
    cut: float,
    n_ids: int,
    draws: Float[Tensor, "rows steps"] | None = None,
) -> Iterator[Step]:
    """Yield one step after the other: as many as there are draws, or likeliest tokens without end.

    The models run in their order on the same tokens; the last one is the tuned, the first the base.
    """
    cores = [core_model(model) for model in models]
    # transformer-lens 3.9 hands its attention no cache of transformers 5.24: each token would see itself alone.
    keeps = not any(hasattr(model, "hook_dict") for model in models)
    device = next(cores[0].parameters()).device
    width = max(map(len, prompts))
    ids = torch.tensor([[*[0] * (width - len(p)), *p] for p in prompts], device=device)
    mask = torch.tensor([[*[0] * (width - len(p)), *[1] * len(p)] for p in prompts], device=device)
    caches: list[Any] = [None] * len(cores)
    known = [inspect.signature(core.forward).parameters for core in cores]
    for step in itertools.count() if draws is None else range(draws.shape[1]):
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logs = []
        for number, core in enumerate(cores):
            given: dict[str, Any] = {"position_ids": places} if "position_ids" in known[number] else {}
            if "logits_to_keep" in known[number]:
                given["logits_to_keep"] = 1
            out = core(input_ids=ids, attention_mask=mask, past_key_values=caches[number], use_cache=keeps, **given)
            caches[number] = out.past_key_values if keeps else None
            logs.append(log_probs(out.logits[:, -1, :n_ids]))
        mixed = amplify(logs[0], logs[-1], strength=strength, cut=cut)
        chosen = mixed.argmax(dim=1) if draws is None else draw(mixed.exp(), draws[:, step].to(device))
        gained = (logs[-1] - logs[0]).gather(1, chosen[:, None])[:, 0]
        yield Step(chosen.tolist(), gained.tolist())
        ids = chosen[:, None] if keeps else torch.cat([ids, chosen[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(chosen)[:, None]], dim=1)


def draw(probabilities: Float[Tensor, "rows vocab"], uniforms: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """Return the token at which the summed probabilities pass the uniform number of each row; never one of
    probability 0."""
    chosen = []
    for row, uniform in zip(probabilities, uniforms.double(), strict=True):
        possible = row.nonzero()[:, 0]  # few of the vocabulary where there is a cut
        sums = row[possible].double().cumsum(dim=0)
        place = torch.searchsorted(sums, uniform * sums[-1], right=True)
        chosen.append(possible[place.clamp(max=len(possible) - 1)])  # rounding may lead beyond it
    return torch.stack(chosen)


def stop_ids(tokenizer: Any, models: Sequence[Any]) -> set[int]:
    """Return the ids that end a text: the tokenizer's, and those of the models' generation settings."""
    named = [tokenizer.eos_token_id, *(model.generation_config.eos_token_id for model in models)]
    return {int(i) for entry in named if entry is not None for i in (entry if isinstance(entry, list) else [entry])}
