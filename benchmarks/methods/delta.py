r"""What LoRA adds: LoRA tunes of the embedded base by rank, SAEs of their differences, how these align with the base's.

For each layer, rank and seed, D the decoder of a delta SAE (one model, L1) on x_tuned - x_base, E that of an SAE of the
base's activations at the same layer:

    alignment    max cosine of D with E, one-to-one matches, principal angles; beside random and covariance-matched
                 directions, and a second seed of the delta SAE: what agreement looks like
    cka          debiased CKA of both codes of the same differences, and of permuted tokens
    fve          of the delta SAE, of the base's SAE with affine rescale, of OMP with D, E and random directions at k
    density      of the delta SAE's latents, against rank / width and layer
    norms        of x_tuned - x_base beside x_base (total), of scale B A x beside the map's output (local)

Claims of arXiv 2605.28896: `verdicts` says of each confirmed, at chance, or refuted. Reading order: `delta_rows`,
`tuned`, `layer_values`, `verdicts`.
"""

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.embedded_pair.build import Corpus, fixed_threads, load_float32
from benchmarks.embedded_pair.training import Recipe, train_model
from benchmarks.planted import over_seeds
from crosscoders import ActivationCache, CacheConfig, Crosscoder, run_cache, train
from crosscoders.common import files
from crosscoders.common.progress import say
from crosscoders.common.records import Record
from crosscoders.common.results import row
from crosscoders.common.statistics import t_interval
from crosscoders.models import hooks
from crosscoders.models.adapters import with_adapter
from crosscoders.models.names import load_auto
from diffing.baselines.chance import alignment_rows, permuted_tokens, random_directions
from diffing.baselines.delta_sae import (
    affine_fve,
    base_alone,
    densities,
    differences,
    local_deltas,
    omp,
    one_model_stream,
    preset_config,
)
from diffing.baselines.geometry import max_cosine, minibatch_cka
from diffing.demo import document_file, model_folder, read_rows
from diffing.null.models import is_made, publish
from sae_lora.lora.adapter import add_lora

RANKS, LAYERS, SEEDS = (1, 2, 4, 8, 16, 32), (1, 3), (0, 1, 2)
STEPS, TOKENS, CACHED = 150, 614_400, 60_000
QUICK_STEPS, QUICK_TOKENS, QUICK_CACHED = 20, 61_440, 6_000
L1, K, MEASURED, TEXTS = 1.0, 24, 2048, 40
Values = dict[str, tuple[float | None, str]]


class ValuesRecord(Record):
    """Values of one layer, rank and seed."""

    values: dict[str, Any]


def delta_rows(work: Path, *, quick: bool) -> list[dict[str, Any]]:
    """Return rows methods.delta.layer_<l>.rank_<r>.* and methods.delta.<claim>.*; `work`: what is finished is kept."""
    ranks, layers, seeds = ((1, 4), (1,), (0,)) if quick else (RANKS, LAYERS, SEEDS)
    values: dict[tuple[int, int], list[Values]] = {}
    for seed in seeds:
        for rank in ranks:
            adapter = tuned(work / f"lora-{rank}-seed-{seed}", rank, seed, QUICK_STEPS if quick else STEPS)
            caches = cached(adapter, layers, QUICK_CACHED if quick else CACHED)
            local = local_norms(adapter, layers)
            for layer in layers:
                path = adapter / f"values-{layer}.json"
                if not path.is_file():
                    say(f"delta SAEs of layer {layer}, rank {rank}, seed {seed}")
                    files.write_json(
                        path, {"values": layer_values(caches[layer], work, layer, rank, seed, quick=quick)}
                    )
                of_layer = files.read_model(path, ValuesRecord)["values"]
                listed = {name: (v, u) for name, (v, u) in of_layer.items()} | {"local_norm": (local[layer], "ratio")}
                values.setdefault((layer, rank), []).append(listed)
    rows = []
    for (layer, rank), of_seeds in values.items():
        rows += over_seeds(f"methods.delta.layer_{layer}.rank_{rank}", of_seeds, signed=("cosine", "CKA", "fraction"))
    return rows + verdicts(values)


def tuned(out: Path, rank: int, seed: int, steps: int) -> Path:
    """Return the folder of a LoRA tune of the embedded base on the tuned model's dialogues; made where it is not."""
    recipe = {"rank": rank, "seed": seed, "steps": steps}
    if is_made(out, recipe):
        return out
    from transformers import AutoTokenizer

    tokenizer, chat = (AutoTokenizer.from_pretrained(model_folder(name)) for name in ("base", "tuned"))
    corpus = Corpus(tokenizer, chat, 4000)
    say(f"tune the embedded base with LoRA of rank {rank}, seed {seed}")
    with fixed_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = load_float32(model_folder("base"))
        lora = add_lora(base, range(4), rank=rank, alpha=2 * rank, seed=seed)
        train_model(
            lora.get_base_model(),
            raw=corpus.raw,
            dialogues=corpus.dialogues,
            recipe=Recipe(steps=steps, lr=3e-3, warmup_steps=min(10, steps - 1), raw_rows=4),
            seed=seed,
            name=f"LoRA {rank}",
        )
    lora.peft_config["default"].base_model_name_or_path = str(model_folder("base"))
    return publish(lora, tokenizer, out, recipe)


def cached(adapter: Path, layers: tuple[int, ...], n_tokens: int) -> dict[int, ActivationCache]:
    """Return a cache of base and adapter for each layer, made where it is not there."""
    points = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    config = CacheConfig(
        base=str(model_folder("base")), tuned=str(adapter), hook_point=points, out=str(adapter / "cache"),
        tokenizer=str(model_folder("tuned")), n_tokens=n_tokens, context_length=128, batch_rows=32, device="cpu",
        data=[str(document_file(f"{kind}_train")) for kind in ("raw", "dialogues")],
    )  # fmt: skip
    run_cache(config)
    return {layer: ActivationCache(adapter / "cache" / point) for layer, point in zip(layers, points, strict=True)}


@torch.inference_mode()
def local_norms(adapter: Path, layers: tuple[int, ...]) -> dict[int, float]:
    """Return for each layer the mean ||scale B A x|| of its last MLP map over the mean length of that map's output."""
    model = with_adapter(load_float32(model_folder("base")), str(adapter))
    tokenizer = load_auto(str(model_folder("base")), "tokenizer")
    texts = [entry["text"] for entry in read_rows("raw_heldout")[:TEXTS]]
    norms = {}
    for layer in layers:
        outputs: list[torch.Tensor] = []
        block: Any = hooks.decoder_layers(hooks.core_model(model))[layer]
        module = block.mlp.down_proj
        handle = module.register_forward_hook(lambda _m, _a, out, into=outputs: into.append(out))
        with local_deltas(model, layer) as terms:
            for text in texts:
                model(input_ids=torch.tensor([tokenizer(text)["input_ids"][:128]]))
        handle.remove()
        norms[layer] = float(sum(x.norm(dim=2).sum() for x in terms) / sum(x.norm(dim=2).sum() for x in outputs))
    return norms


def layer_values(
    cache: ActivationCache, work: Path, layer: int, rank: int, seed: int, *, quick: bool
) -> dict[str, tuple[float, str]]:
    """Return every figure of one layer, rank and seed."""
    n_tokens = QUICK_TOKENS if quick else TOKENS
    config = preset_config(1, cache.d_model, n_tokens=n_tokens, seed=seed, device="cpu", l1=L1)
    here = work / f"lora-{rank}-seed-{seed}" / f"layer-{layer}"
    deltas = [
        train(one, one_model_stream(cache, one), here / f"sae-{number}").requires_grad_(False)
        for number, one in enumerate((config, replace(config, seed=seed + 1000)))
    ]
    base = train(
        config, one_model_stream(cache, config, base_alone), work / f"base-{layer}-seed-{seed}"
    ).requires_grad_(False)
    x = cache.read(0, min(MEASURED, len(cache))).activations.float()
    return {name: (float(value), unit) for name, (value, unit) in _figures(x, deltas, base, rank, seed).items()}


def _figures(x: Any, deltas: list[Crosscoder], base: Crosscoder, rank: int, seed: int) -> dict[str, tuple[float, str]]:
    """Return alignment, CKA, FVE and density of one delta SAE."""
    delta = differences(x)
    codes = deltas[0].encode(delta)
    alive = (codes > 0).any(dim=0)
    directions, other, reference = (model.fold().W_dec[:, 0].detach() for model in (deltas[0], deltas[1], base))
    if int(alive.sum()) < 2:
        return {"alive": (float(alive.float().mean()), "fraction")}
    own = directions[alive]
    listed = alignment_rows("alignment", own, reference, delta[:, 0], n_angles=2 * rank, seed=seed)
    figures = {entry["name"]: (entry["value"], entry["unit"]) for entry in listed}
    figures["alignment.second_seed.max_cosine"] = (float(max_cosine(own, other).mean()), "cosine")
    theirs = base.encode(delta)
    order = permuted_tokens(len(delta), torch.Generator().manual_seed(seed))
    if theirs.any():
        figures["cka"] = (minibatch_cka(zip(codes.split(512), theirs.split(512), strict=True)), "CKA")
        figures["cka.permuted"] = (minibatch_cka(zip(codes.split(512), theirs[order].split(512), strict=True)), "CKA")
    drawn = random_directions(len(reference), reference.shape[1], torch.Generator().manual_seed(seed))
    for name, x_hat in (
        ("delta", deltas[0](delta)[:, 0]), ("base", base(delta)[:, 0]), ("delta_omp", omp(delta[:, 0], directions, K)),
        ("base_omp", omp(delta[:, 0], reference, K)), ("random_omp", omp(delta[:, 0], drawn, K)),
    ):  # fmt: skip
        figures[f"fve.{name}"] = (affine_fve(delta[:, 0], x_hat), "fraction")
    figures |= {
        name: (value, "latents/token" if name == "l0" else "fraction") for name, value in densities(codes).items()
    }
    norms = delta[:, 0].norm(dim=1).mean() / x[:, 0].norm(dim=1).mean()
    return figures | {"norm": (float(norms), "ratio"), "rank_by_width": (rank / x.shape[2], "ratio")}


SLOPED = {"density_rises_with_rank": "density", "divergence_is_stable_over_ranks": "alignment.max_cosine"}
"""Claims about ranks -> the figure whose slope they rest on."""


def verdicts(values: dict[tuple[int, int], list[Values]]) -> list[dict[str, Any]]:
    """Return rows methods.delta.<claim>.layer_<l>: 1 (confirmed), 0 (at chance) or -1 (refuted), and their slopes.

    weak alignment: at chance where the mean max cosine lies within .02 of that of random or covariance-matched
    directions; else confirmed below half of the second seed's, refuted above. The others, of two seeds or more: slope
    of the figure over log2 of the rank, interval over seeds; density rises: confirmed above 0, refuted below; stable:
    confirmed where the interval holds 0.
    """
    rows = []
    layers = dict.fromkeys(layer for layer, _ in values)
    for layer in layers:
        ranks = [rank for at, rank in values if at == layer]
        of_rank = {rank: values[layer, rank] for rank in ranks}
        means = {name: _mean(of_rank, name) for name in ("max_cosine", "random.max_cosine", "matched.max_cosine",
                                                         "second_seed.max_cosine")}  # fmt: skip
        chance = max(means["random.max_cosine"], means["matched.max_cosine"])
        weak = 1 if means["max_cosine"] < means["second_seed.max_cosine"] / 2 else -1
        if abs(means["max_cosine"] - chance) < 0.02:
            weak = 0
        rows.append(row(f"methods.delta.weak_alignment.layer_{layer}", weak, "verdict", len(ranks)))
        for claim, figure in SLOPED.items():
            slopes = _slopes(of_rank, figure)
            low, high = None, None
            if len(slopes) > 1:  # one seed has no interval, so no verdict
                low, high = t_interval(slopes)
                held = 0 if low <= 0 <= high else 1 if low > 0 else -1
                said = held if claim == "density_rises_with_rank" else 1 if held == 0 else -1
                rows.append(row(f"methods.delta.{claim}.layer_{layer}", said, "verdict", len(slopes)))
            slope = sum(slopes) / len(slopes)
            rows.append(
                row(f"methods.delta.{claim}.layer_{layer}.slope", slope, "per doubling", len(slopes), low, high)
            )
    return rows


def _mean(of_rank: dict[int, list[Values]], name: str) -> float:
    found = [
        float(one[f"alignment.{name}"][0] or 0)
        for seeds in of_rank.values()
        for one in seeds
        if f"alignment.{name}" in one
    ]
    return sum(found) / len(found) if found else math.nan


def _slopes(of_rank: dict[int, list[Values]], name: str) -> list[float]:
    """Return for each seed the least-squares slope over log2 of the rank."""
    slopes = []
    for seed in range(min(map(len, of_rank.values()))):
        points = [
            (math.log2(rank), float(seeds[seed][name][0] or 0))
            for rank, seeds in of_rank.items()
            if name in seeds[seed]
        ]
        ranks = {x for x, _ in points}
        slopes.append(statistics.linear_regression(*zip(*points, strict=True)).slope if len(ranks) > 1 else 0.0)
    return slopes
