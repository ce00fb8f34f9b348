"""`crosscoders cache` itself at the shape of Gemma-2-2B on a CUDA device, over its bare forward passes.

A random pair is saved to a temporary folder and cached from text to published shards, with checksums; the bare passes
are the truncated forward passes of both models over the same rows, nothing copied or written. Both in wall time.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.throughput import caching
from benchmarks.timing import median_row
from crosscoders import CacheConfig
from crosscoders.activations.caching import run_cache
from crosscoders.activations.plan import make_plan
from crosscoders.activations.source import open_source
from crosscoders.text.padding import padding_id
from crosscoders.text.settings import DataSource
from crosscoders.text.tokens import pad_rows
from diffing.demo import model_folder, read_rows

CONTEXT = 1024


def rows(
    models: caching.Pair, folder: Path, *, batch_rows: list[int], n_rows: int, n_rounds: int
) -> list[dict[str, Any]]:
    """Return the rows `throughput.gpu.cache.gemma-2-2b.run.*` for each number of rows in a forward pass."""
    save_pair(models, folder)
    write_long_documents(folder / "text.jsonl", n_rows)
    measured: list[dict[str, Any]] = []
    for number in batch_rows:
        rates, ratios, waits = [], [], []
        for turn in range(n_rounds):
            config = settings(models.size, folder, number, n_rows, str(folder / f"cache-{number}-{turn}"))
            run = run_cache(config).rates
            rates.append(run.n_tokens / run.seconds)
            ratios.append(run.seconds / bare_seconds(config))
            waits.append(run.wait_seconds / run.seconds)
            shutil.rmtree(config.out)
        name = f"throughput.gpu.cache.gemma-2-2b.run.{number}x{CONTEXT}"
        note = "wall time, text to published shards; random weights"
        measured += [
            median_row(f"{name}.tokens_per_second", rates, "tokens/s", note),
            median_row(f"{name}.ratio_to_truncated", ratios, "forward passes", note),
            median_row(f"{name}.waited_for_writer", waits, "fraction of the run", note),
        ]
    return measured


def save_pair(models: caching.Pair, folder: Path) -> None:
    """Write both models with the tokenizer of the embedded pair, which knows fewer ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder("tuned"))
    for name, model in zip(("base", "tuned"), models.full, strict=True):
        model.save_pretrained(folder / name)  # type: ignore[operator]
        tokenizer.save_pretrained(folder / name)


def write_long_documents(path: Path, n_rows: int) -> None:
    """Write documents of more tokens than a row holds, from the embedded corpus."""
    texts = [row["text"] for row in read_rows("raw_train")]
    pieces = [" ".join(texts[i : i + 64]) for i in range(0, len(texts), 64)]
    with path.open("w") as file:
        for i in range(n_rows):
            file.write(json.dumps({"text": pieces[i % len(pieces)]}) + "\n")


def settings(size: caching.Size, folder: Path, batch_rows: int, n_rows: int, out: str) -> CacheConfig:
    """Return the settings of one run."""
    return CacheConfig(
        base=str(folder / "base"), tuned=str(folder / "tuned"), hook_point=size.hook_point,
        data=[DataSource(path=str(folder / "text.jsonl"))], out=out, n_tokens=n_rows * (CONTEXT - 2),
        context_length=CONTEXT, batch_rows=batch_rows,
    )  # fmt: skip


@torch.inference_mode()
def bare_seconds(config: CacheConfig) -> float:
    """Return the wall time of the truncated forward passes of both models over all rows of a run."""
    plan = make_plan(config)
    source = open_source(config, plan)
    pad_id = padding_id(plan.info.tokenizer, plan.info.n_ids)
    batches = [pad_rows(plan.rows, numbers, pad_id) for numbers in source.batches]
    source.pair.activations(batches[0], source.hook_points[0])
    synchronize()
    started = time.perf_counter()
    for batch in batches:
        source.pair.activations(batch, source.hook_points[0])
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
