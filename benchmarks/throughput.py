"""Speed of training steps, caching and shuffled reads, as ratios measured in one run.

Steps: ours against the encoder's matrix product alone and against a dense autograd step with default Adam, on the same
batches; the losses of both are compared first. Caching: against the truncated forward passes alone and against full
forward passes with a hook, on a random Gemma-2 of 12 layers. Reads: batches of `cached_stream` against a row-indexed
paired memory map. CPU time of the process; set OMP_NUM_THREADS=1 where other work shares the cores.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import interleaved, ratio_row
from crosscoders import ActivationCache, Crosscoder, CrosscoderConfig, TrainConfig, cached_stream, sparse
from crosscoders.hooks import capture
from crosscoders.kernels.cpu import keep_large_blocks
from crosscoders.optimizer import Optimizer
from crosscoders.pair import ModelPair, PairInfo
from crosscoders.source import ActivationSource, concatenate
from crosscoders.store import write_json, write_tensors
from crosscoders.tokens import Rows, pad_rows
from crosscoders.training import forward

SHAPES = [(256, 4096, 1024, 32), (512, 16384, 1024, 64)]
"""(d_model, dict_size, batch, k)"""


def run(quick: bool) -> dict[str, Any]:
    """Rows `throughput.step.*`, `throughput.cache.*`, `throughput.read.*`."""
    keep_large_blocks()
    rows = []
    for shape in SHAPES[: 1 if quick else None]:
        for dead_share in (0.0, 0.3):
            rows += step_rows(*shape, dead_share=dead_share, n_rounds=3 if quick else 9)
        rows += relu_rows(*shape[:3], n_rounds=3 if quick else 9)
    rows += cache_rows(n_rounds=3 if quick else 9)
    rows += read_rows(n_tokens=2**14 if quick else 2**17)
    return {"name": "throughput", "rows": rows}


# ------------------------------------------------------------------------------------------------------------- steps


def planted(d_model: int, dict_size: int, batch: int) -> list[torch.Tensor]:
    """Four batches of sparse combinations of random directions."""
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(dict_size, 2 * d_model, generator=g)
    fires = [torch.rand(batch, dict_size, generator=g) < 10 / dict_size for _ in range(4)]
    return [((f * torch.rand(batch, dict_size, generator=g)) @ directions).view(batch, 2, d_model) for f in fires]


def dense_step(model: Crosscoder, config: TrainConfig, dead: torch.Tensor) -> Callable[[torch.Tensor], float]:
    """The same step as a plain autograd program: dense products, a sort of all latents, default Adam, separate clip."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step(x: torch.Tensor) -> float:
        code_norm = model.code_norm.detach()
        positive = torch.relu(model.pre_acts(x))
        if config.crosscoder.k is None:
            latents = positive
        else:
            scaled = (positive * code_norm).detach().flatten()
            mask = torch.zeros_like(scaled)
            mask[scaled.topk(config.crosscoder.k * len(x), sorted=False).indices] = 1
            latents = positive * mask.view_as(positive)
        err = x - model.decode_normalised(latents)
        loss = err.norm(dim=2).mean()
        if config.l1_coefficient:
            loss = loss + config.l1_coefficient * (latents @ model.code_norm).mean()
        if config.crosscoder.k is not None and dead.any():
            candidates = torch.where(dead, positive * code_norm, -torch.inf).detach()
            chosen = candidates.topk(x.shape[2] // 2, dim=1, sorted=False).indices
            kept = torch.zeros_like(positive).scatter(1, chosen, positive.gather(1, chosen))
            fixed = err.detach()
            missed = (fixed - (kept @ model.W_dec.flatten(1)).view_as(x)).pow(2).sum()
            loss = loss + config.aux_coefficient * missed / (fixed - fixed.mean(dim=0)).pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def our_step(model: Crosscoder, config: TrainConfig, dead: torch.Tensor) -> Callable[[torch.Tensor], float]:
    optimizer, select = Optimizer(model, config), sparse.WarmSelection()

    def step(x: torch.Tensor) -> float:
        norms, k = optimizer.decoder_norms(), config.crosscoder.k
        result = forward(model, config, x, dead=dead, k=k, step=0, select=select, decoder_norms=norms)
        loss = torch.stack(list(result.terms.values())).sum()
        loss.backward()
        optimizer.step_(1e-4)
        return loss.item()

    return step


def compare(name: str, config: TrainConfig, dead_share: float, n_rounds: int) -> dict[str, list[float]]:
    """CPU seconds of the encoder's product, our step and the dense one, after checking that their losses agree."""
    shape = config.crosscoder
    assert shape.d_model is not None
    batches = planted(shape.d_model, shape.dict_size, config.batch_size)
    dead = torch.rand(shape.dict_size, generator=torch.Generator().manual_seed(1)) < dead_share
    models = [Crosscoder(shape) for _ in range(2)]
    for model in models:
        model.init_weights_(norm=0.3, generator=torch.Generator().manual_seed(0))
    ours, dense = our_step(models[0], config, dead), dense_step(models[1], config, dead)
    for x in batches:
        a, b = ours(x), dense(x)
        if abs(a - b) > 1e-4 * abs(b):
            raise RuntimeError(f"{name}: our loss {a} differs from the dense one {b}, so the times do not compare.")
    i = iter(range(10**9))

    def next_batch() -> torch.Tensor:
        return batches[next(i) % 4]

    parts: dict[str, Callable[[], object]] = {
        "encode": lambda: models[0].pre_acts(batches[0]).detach(),
        "ours": lambda: ours(next_batch()),
        "dense": lambda: dense(next_batch()),
    }
    return interleaved(parts, n_rounds=n_rounds)


def step_rows(
    d_model: int, dict_size: int, batch: int, k: int, *, dead_share: float, n_rounds: int
) -> list[dict[str, Any]]:
    """BatchTopK; with `dead_share`, that share of the latents takes part in the auxiliary term."""
    name = f"throughput.step.{d_model}x{dict_size}x{batch}x{k}" + (".aux" if dead_share else "")
    shape = CrosscoderConfig(dict_size=dict_size, k=k, d_model=d_model)
    seconds = compare(name, TrainConfig(crosscoder=shape, batch_size=batch), dead_share, n_rounds)
    return [
        ratio_row(f"{name}.ratio_to_encode", seconds["ours"], seconds["encode"], "encoder products"),
        ratio_row(f"{name}.speedup_over_dense", seconds["dense"], seconds["ours"], "times"),
    ]


def relu_rows(d_model: int, dict_size: int, batch: int, *, n_rounds: int) -> list[dict[str, Any]]:
    """L1: five dense products are the least that a step needs (forward 2, decoder backward 2, encoder backward 1)."""
    name = f"throughput.step.{d_model}x{dict_size}x{batch}.l1"
    shape = CrosscoderConfig(dict_size=dict_size, activation="relu", d_model=d_model)
    config = replace(TrainConfig(crosscoder=shape, batch_size=batch, threshold_start_step=0), l1_coefficient=0.01)
    seconds = compare(name, config, 0.0, n_rounds)
    floor = [5 * value for value in seconds["encode"]]
    return [
        ratio_row(f"{name}.share_of_dense_roof", floor, seconds["ours"], "fraction"),
        ratio_row(f"{name}.speedup_over_dense", seconds["dense"], seconds["ours"], "times"),
    ]


# ----------------------------------------------------------------------------------------------------------- caching


def cache_rows(*, n_rounds: int) -> list[dict[str, Any]]:
    """One batch of 8 x 256 tokens at the middle of 12 layers, vocabulary 10,752 (Gemma-2-2B's share of the head)."""
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=10_752, hidden_size=256, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    point = "blocks.6.hook_resid_post"
    full = [transformers.Gemma2ForCausalLM(config).eval().requires_grad_(False) for _ in range(2)]
    lengths, width = np.full(8, 256), 256
    ids = np.random.default_rng(0).integers(3, 10_752, 8 * width).astype(np.int32)
    rows = Rows(
        ids=ids, roles=np.zeros(len(ids), np.uint8), scored=np.ones(len(ids), bool),
        offsets=np.concatenate([[0], np.cumsum(lengths)]), groups=np.zeros(8, np.int64), group_names=["x"],
        n_scored=len(ids), counts={},
    )  # fmt: skip
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})()
    info = PairInfo("base", "tuned", None, tokenizer, 256, 12)
    pair = ModelPair(info, (full[0].model, full[1].model), [point], torch.device("cpu"))
    source = ActivationSource(pair, rows, hook_point=point, batch_rows=8, dtype=torch.bfloat16)
    batch = pad_rows(rows, np.arange(8), 0)
    tensors = torch.from_numpy(batch.ids), torch.from_numpy(batch.attention_mask)

    def full_forward() -> None:
        for model in full:
            with torch.inference_mode(), capture(model, [point]):
                model(input_ids=tensors[0], attention_mask=tensors[1])

    with tempfile.TemporaryDirectory() as folder:

        def cached() -> None:
            tokens = concatenate(list(source.read(0, len(ids))))
            write_tensors(Path(folder) / "shard.safetensors", tokens._asdict())

        parts: dict[str, Callable[[], object]] = {
            "truncated": lambda: pair.activations(batch, point),
            "cached": cached,
            "full": full_forward,
        }
        seconds = interleaved(parts, n_rounds=n_rounds, n_warmup=1)
    return [
        ratio_row(
            "throughput.cache.middle.ratio_to_truncated", seconds["cached"], seconds["truncated"], "forward passes"
        ),
        ratio_row("throughput.cache.middle.speedup_over_full_forward", seconds["full"], seconds["cached"], "times"),
    ]


def read_rows(n_tokens: int, d_model: int = 256, batch: int = 2048) -> list[dict[str, Any]]:
    """Shuffled batches from a warm page cache; the other reader takes two rows a token from two memory maps."""
    x = torch.randn(n_tokens, 2, d_model, generator=torch.Generator().manual_seed(0)).bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        cache = write_plain_cache(Path(folder) / "cache", x)
        maps = []
        for m in range(2):
            np.save(Path(folder) / f"{m}.npy", x[:, m].view(torch.uint16).numpy())
            maps.append(np.load(Path(folder) / f"{m}.npy", mmap_mode="r"))
        order = np.random.default_rng(0).permutation(n_tokens)
        n_batches = n_tokens // batch

        def by_rows() -> None:
            for b in range(n_batches):
                chosen = order[b * batch : (b + 1) * batch]
                pairs = [
                    torch.stack([torch.from_numpy(m[i].copy()).view(torch.bfloat16) for m in maps]) for i in chosen
                ]
                torch.stack(pairs).float()

        def by_stream() -> None:
            batches = cached_stream(cache, batch_size=batch).batches(0)
            for _ in range(n_batches):
                next(batches)

        seconds = interleaved({"rows": by_rows, "stream": by_stream}, n_rounds=3, n_warmup=1)
    return [ratio_row("throughput.read.speedup_over_row_indexed_memmap", seconds["rows"], seconds["stream"], "times")]


def write_plain_cache(folder: Path, x: torch.Tensor) -> ActivationCache:
    """A finished cache with given activations and no documents."""
    zeros = torch.zeros(len(x), dtype=torch.int32)
    columns = {name: zeros.clone() for name in ("token_ids", "positions", "document_ids", "groups")}
    written = write_tensors(folder / "shard.safetensors", {"activations": x, **columns, "roles": zeros.to(torch.uint8)})
    entry = {"name": "shard.safetensors", "n_tokens": len(x), **written._asdict()}
    manifest = {"format_version": 1, "d_model": x.shape[2], "n_models": 2, "shards": [entry]}
    write_json(folder / "manifest.json", manifest | {"statistics": {"mean_norm": [1.0, 1.0]}})
    return ActivationCache(folder)
