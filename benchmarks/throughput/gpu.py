"""Steps and caching at the shapes of Gemma-2-2B on a CUDA device; random weights and planted data.

Ours with bfloat16 products, as training runs on a GPU, against the dense autograd step under bfloat16 autocast with
default Adam. Times are CUDA events; memory is the allocator's peak over model, optimiser and steps, less what the
batches take. The same functions run on a CPU at tiny shapes in the tests.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.throughput import caching, caching_run, density
from benchmarks.throughput.steps import Shape, Step, dense_step, our_step, planted, require_close, start_model, turns
from benchmarks.timing import Clock, cuda_seconds, interleaved, median_row, ratio_row

SHAPES = [Shape(2304, 73_728, batch, 100) for batch in (2048, 4096)]
GEMMA_2_2B = caching.Size(vocabulary=256_000, d_model=2304, d_mlp=9216, n_layers=26, n_heads=8, d_head=256)
NOTE = "random weights, planted data"


def rows(quick: bool) -> list[dict[str, Any]]:
    """Return the rows `throughput.gpu.*`; none without a CUDA device."""
    if not torch.cuda.is_available():
        return []
    n_rounds, measured = 3 if quick else 9, []
    for shape in SHAPES[: 1 if quick else None]:
        measured += step_rows(shape, device="cuda", n_rounds=n_rounds, clock=cuda_seconds)
    measured += density.rows(
        SHAPES[0], name="throughput.gpu.l1.2304x73728x2048", n_rounds=n_rounds, device="cuda", clock=cuda_seconds,
        products=torch.bfloat16,
    )  # fmt: skip
    models = caching.make_pair(GEMMA_2_2B, "cuda", torch.bfloat16)
    measured += caching.cache_rows("throughput.gpu.cache.gemma-2-2b", models, n_rounds=n_rounds, clock=cuda_seconds)
    with tempfile.TemporaryDirectory() as folder:
        sizes = [8] if quick else [8, 32]
        measured += caching_run.rows(models, Path(folder), batch_rows=sizes, n_rows=256, n_rounds=1 if quick else 3)
    return measured


def make_step(kind: str, shape: Shape, device: str) -> Step:
    """Return our step, or the dense one under autocast."""
    config = shape.config()
    model = start_model(config.crosscoder).to(device)
    maker = our_step if kind == "ours" else dense_step
    return maker(model, config, products=torch.bfloat16)


def peak_gib(kind: str, shape: Shape, batches: list[torch.Tensor], device: str) -> list[float]:
    """Return the allocator's peak over three steps, without the batches; empty where there is no CUDA device."""
    if device != "cuda":
        return []
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step = make_step(kind, shape, device)
    for x in batches[:3]:
        step(x)
    return [(torch.cuda.max_memory_allocated() - before) / 2**30]


def step_rows(shape: Shape, *, device: str, n_rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """Return the rows `throughput.gpu.step.<shape>.*`; losses are held to 5%, since bfloat16 selects other entries."""
    name = f"throughput.gpu.step.{shape}"
    batches = [x.to(device) for x in planted(shape)]
    peaks = {kind: peak_gib(kind, shape, batches, device) for kind in ("ours", "dense")}
    ours, dense = make_step("ours", shape, device), make_step("dense", shape, device)
    require_close(name, ours, dense, batches, 0.05)
    weight = torch.randn(shape.n_models * shape.d_model, shape.dict_size, device=device, dtype=torch.bfloat16)
    x_bf16 = batches[0].flatten(1).bfloat16()
    parts: dict[str, Callable[[], object]] = {
        "encode": lambda: x_bf16 @ weight,
        "ours": turns(ours, batches),
        "dense": turns(dense, batches),
    }
    seconds = interleaved(parts, n_rounds=n_rounds, clock=clock)
    return [
        ratio_row(f"{name}.ratio_to_encode_bf16", seconds["ours"], seconds["encode"], "bfloat16 products", NOTE),
        ratio_row(f"{name}.speedup_over_dense_bf16", seconds["dense"], seconds["ours"], "times", NOTE),
        median_row(f"{name}.tokens_per_second", [shape.batch / s for s in seconds["ours"]], "tokens/s", NOTE),
        *(median_row(f"{name}.{kind}.peak_memory", peak, "GiB", NOTE) for kind, peak in peaks.items() if peak),
    ]
