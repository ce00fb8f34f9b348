"""Time and tokens to one loss: an SAE trained end to end, against one trained by reconstruction and then adapted.

    end_to_end_<epochs>    from scratch by KL, reading all documents once or several times (`Size.end_to_end_epochs`)
    lora_after, lora_all   LoRA around the SAE that was trained by reconstruction, with a twentieth of the model's
                           parameters; documents read once
    lora_rank_64           the same on all layers with the published rank; documents read twice
    sae_by_kl              that SAE's own weights trained on by KL; documents read once

All arms run in turn, each a share of its own steps, on batches of the same documents; every rate falls over its own
steps. Seconds are CPU time of the process, without evaluation. What the SAE took before (activations, training) is
added to the arms that adapt it, and also left out.
"""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks.sae_lora_gap.gaps import ARMS, COMPARED, fit_config
from benchmarks.sae_lora_gap.saes import Design, make_sae, quality
from benchmarks.sae_lora_gap.setting import CPU, HELD_OUT, HOOK_POINT, ROWS, Size, activations, batches, open_base
from crosscoders.common.results import row
from crosscoders.models import predictions, resume
from crosscoders.text.padding import Batch
from sae_lora import FitConfig, load_dictionary, splice
from sae_lora.dictionaries.frozen import FrozenDictionary, SaeLens
from sae_lora.fitting.correctors import Fitted, start
from sae_lora.fitting.end_to_end import Step, train_end_to_end, trainable
from sae_lora.fitting.inputs import Plan, load_model
from sae_lora.fitting.loop import batch_order, common_prefix, make_optimizer, take_step
from sae_lora.lora.adapter import choose_layers

T = TypeVar("T")
END_TO_END, LORA = "end_to_end_", "lora_"
"""How the names of these arms begin."""
EVALUATED_TOKENS = 15_000
CHECKS = 24
"""Evaluations of an arm."""
RANK_64: dict[str, Any] = {"layers": "all", "rank": 64, "alpha": 128.0, "lr": 2e-3, "epochs": 2}
"""Share of the gap closed on development documents by 400,000 tokens: 33.9 and 33.7% for rates 2e-3 and 5e-3."""
END_TO_END_LR = 2e-3
"""Falling to 0 over the second half. CE on development documents after 612,000 tokens at the full rate: 3.823, 3.827
and 3.875 nats for 2e-3, 4e-3 and 1e-2."""


class Point(NamedTuple):
    """An arm so far."""

    n_tokens: int
    """Tokens that the language model read."""
    seconds: float
    ce: float
    """Cross-entropy of the spliced model on held-out documents, nats/token."""


class Arm:
    """A trainer that is run a few steps at a time."""

    def __init__(self, steps: Iterator[Step], model: Any, dictionary: FrozenDictionary) -> None:
        self.steps, self.model, self.dictionary = steps, model, dictionary
        self.n_tokens, self.seconds = 0, 0.0
        self.points: list[Point] = []

    def advance(self, n_steps: int, held_out: list[Batch], keep_ids: list[int]) -> None:
        """Train for some steps, then evaluate."""
        start = time.process_time()
        for step in itertools.islice(self.steps, n_steps):
            self.n_tokens += step.n_tokens
        self.seconds += time.process_time() - start
        ce = spliced_ce(self.model, self.dictionary, held_out, keep_ids)
        self.points.append(Point(self.n_tokens, self.seconds, ce))


@torch.no_grad()
def spliced_ce(model: Any, dictionary: FrozenDictionary | None, held_out: list[Batch], keep_ids: list[int]) -> float:
    """Return the CE with the dictionary in place, or without one; nats per scored prediction."""
    total, n = 0.0, 0
    for batch in held_out:
        if dictionary is None:
            logits = resume.logits(model, batch)
        else:
            with splice(model, dictionary, keep_ids=keep_ids):
                logits = resume.logits(model, batch)
        used = batch.scored[:, 1:]
        ce = predictions.ce(predictions.log_probs(logits[:, :-1][used]), batch.ids[:, 1:][used])
        total, n = total + float(ce.double().sum()), n + len(ce)
    return total / n


def end_to_end(sae: SaeLens, model: Any, plan: Plan, order: list[int]) -> Iterator[Step]:
    """Train the SAE on batches in that order, with a rate that falls over the second half."""
    n = len(order)
    return train_end_to_end(
        sae,
        model,
        plan.batches(ROWS, CPU, order),
        plan.keep_ids,
        lr_at=lambda step: END_TO_END_LR * min(1.0, (n - step) / (0.5 * n)),
    )


def adapt(config: FitConfig, plan: Plan, fitted: Fitted, layers: list[int], order: list[int]) -> Iterator[Step]:
    """Take the steps of `sae_lora.fit` on batches in that order, without its files."""
    optimizer = make_optimizer(fitted, config)
    prefix = common_prefix(fitted, layers, plan, config, CPU)
    for step, batch in enumerate(plan.batches(ROWS, CPU, order)):
        optimizer.param_groups[0]["lr"] = config.lr_at(step, len(order))
        kl, _ = take_step(fitted, batch, plan.keep_ids, config, optimizer, prefix, None, step, Path("memory"))
        n_tokens = int(batch.attention_mask.sum())
        yield Step(kl / n_tokens, n_tokens)


class Raced(NamedTuple):
    rows: list[dict[str, Any]]
    left_out: dict[str, str]
    """Why a row has no value."""


def run(size: Size, data: str, folder: Path, pretraining: float) -> Raced:
    """Return rows of the race around one TopK SAE.

    folder: the SAE that was trained by reconstruction. pretraining: seconds that it took, activations included.
    """
    plan, model = open_base(data, size.tokens)
    of_held_out = open_base(HELD_OUT, min(EVALUATED_TOKENS, size.held_out))[0]
    held_out = list(batches(of_held_out))
    n_batches = len(plan.rows.batches(ROWS))
    dictionary = load_dictionary(folder, hook_point=HOOK_POINT)
    arms, n_steps = dict[str, Arm](), dict[str, int]()
    for epochs in size.end_to_end_epochs:
        sae = trainable(make_sae(Design("topk", dictionary.info.settings["k"]), dictionary.info.d_model), HOOK_POINT)
        order, name = batch_order(n_batches, epochs, seed=0), f"{END_TO_END}{epochs}"
        arms[name], n_steps[name] = Arm(end_to_end(sae, model, plan, order), model, sae), len(order)
    adapted = {f"{LORA}{name.rstrip('.') or 'after'}": settings for name, settings in ARMS.items()}
    adapted |= {f"{LORA}rank_64": RANK_64, "sae_by_kl": COMPARED["corrector_sae."]}
    for name, settings in adapted.items():
        config = fit_config(folder, data, size.tokens, **settings)
        lora = config.corrector == "lora"
        layers = choose_layers(config.layers, [dictionary.info], plan.n_layers) if lora else []
        fitted = start(config, load_model(plan, config, CPU), [dictionary], layers)
        order = batch_order(n_batches, config.epochs, config.seed)
        arms[name] = Arm(adapt(config, plan, fitted, layers, order), fitted.model, fitted.dictionaries[0])
        n_steps[name] = len(order)

    plain = spliced_ce(model, None, held_out, plan.keep_ids)
    spliced = spliced_ce(model, dictionary, held_out, plan.keep_ids)
    for check in range(CHECKS):
        for name, arm in arms.items():
            first, last = (round(n_steps[name] * i / CHECKS) for i in (check, check + 1))
            arm.advance(last - first, held_out, plan.keep_ids)
    n = sum(int(batch.scored[:, 1:].sum()) for batch in held_out)
    raced = summarise({name: arm.points for name, arm in arms.items()}, plain, spliced, pretraining, n)
    x = activations(of_held_out, model)
    for name in curves_of(arms, END_TO_END):
        end = quality(arms[name].dictionary, x)
        raced.rows.append(row(f"sae-lora.race.{name}.dead", end.dead_fraction, "fraction", end.n_tokens))
    return raced


def curves_of(arms: dict[str, T], kind: str) -> dict[str, T]:
    """Return the curves whose names begin with `kind`."""
    return {name: arm for name, arm in arms.items() if name.startswith(kind)}


def summarise(curves: dict[str, list[Point]], plain: float, spliced: float, pretraining: float, n: int) -> Raced:
    """Return curves, and the ratios of seconds and tokens to the losses that both sides reach.

    race.<arm>.<tokens>.{ce,seconds}      the curves
    e2e_speedup.<epochs>                  seconds of that end-to-end SAE to its best loss over those of the faster LoRA
                                          arm to that loss, pretraining included; left out where no LoRA arm gets there
    race.<arm>.speedup_to_its_best        seconds of whichever end-to-end SAE is first at the arm's best loss over those
                                          of the arm

    and the same with the suffixes `.without_pretraining` and `.tokens`. Arms that adapt the SAE start from its loss at
    no cost; where that is enough, there are no ratios with these suffixes.
    """
    rows = [
        row("sae-lora.race.plain.ce", plain, "nats/token", n),
        row("sae-lora.race.spliced.ce", spliced, "nats/token", n),
    ]
    for arm, points in curves.items():
        for point in points:
            name = f"sae-lora.race.{arm}.{point.n_tokens}"
            rows += [row(f"{name}.ce", point.ce, "nats/token", n), row(f"{name}.seconds", point.seconds, "s", 1)]
    slow = curves_of(curves, END_TO_END)
    adapted = {name: [Point(0, 0.0, spliced), *points] for name, points in curves.items() if name not in slow}
    left_out: dict[str, str] = {}
    for arm, points in slow.items():
        name, target = f"sae-lora.e2e_speedup.{arm.removeprefix(END_TO_END)}", min(points, key=lambda point: point.ce)
        reached = earliest(curves_of(adapted, LORA), target.ce)
        if reached:
            rows += compared(name, target, reached, pretraining)
        else:
            left_out[name] = f"no LoRA arm came to CE {target.ce:.4f}, the best of {arm}"
    for arm, points in adapted.items():
        mine = min(points, key=lambda point: point.ce)
        reached = earliest(slow, mine.ce)
        if reached:
            rows += compared(f"sae-lora.race.{arm}.speedup_to_its_best", reached, mine, pretraining)
    return Raced(rows, left_out)


def earliest(curves: dict[str, list[Point]], ce: float) -> Point | None:
    """Return the point of fewest seconds among those with a CE of at most `ce`."""
    reached = [point for points in curves.values() for point in points if point.ce <= ce]
    return min(reached, key=lambda point: point.seconds, default=None)


def compared(name: str, slow: Point, fast: Point, pretraining: float) -> list[dict[str, Any]]:
    """Return ratios, above 1 where adapting needs less. Tokens are those of the fit; the forward pass that collects the
    activations for pretraining is in the seconds only."""
    rows = [row(name, slow.seconds / (fast.seconds + pretraining), "ratio of seconds", 1)]
    if fast.n_tokens:
        rows += [
            row(f"{name}.without_pretraining", slow.seconds / fast.seconds, "ratio of seconds", 1),
            row(f"{name}.tokens", slow.n_tokens / fast.n_tokens, "ratio of tokens through the model", 1),
        ]
    return rows
