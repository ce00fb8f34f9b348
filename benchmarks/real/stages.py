"""The stages of the real pair: command lines, run as a user would, their output and cost kept in WORK/<stage>/.

A stage that has ended is not run again.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from crosscoders.common import files
from crosscoders.common.errors import EnvironmentFault
from crosscoders.common.progress import say
from crosscoders.common.records import Record
from diffing.demo import document_file

HOOK_POINT = "blocks.9.hook_resid_post"
BATCH = 1024


class Sizes(NamedTuple):
    """How much of everything."""

    tune_steps: int
    samples: int
    prompts: int
    tokens: int
    heldout_tokens: int
    dict_size: int
    k: int
    train_tokens: int
    chats: int


FULL = Sizes(70, 50, 48, 80_000, 10_000, 4096, 48, 600_000, 40)
QUICK = Sizes(4, 4, 4, 3_000, 600, 256, 8, 12_000, 20)


class StageRecord(Record):
    """done.json of a stage."""

    seconds: float
    peak_gib: float
    commands: list[str]


def commands(base: str, work: Path, sizes: Sizes) -> dict[str, list[str]]:
    """Return the command lines of each stage, in order."""
    data, held = (
        shlex.quote(json.dumps([str(document_file(f"{kind}_{split}")) for kind in ("dialogues", "raw")]))
        for split in ("train", "heldout")
    )
    w, warm = shlex.quote(str(work)), max(1, sizes.train_tokens // BATCH // 20)
    pair, null = f"--base {shlex.quote(base)} --tuned {w}/tuned", f"--null {w}/placebo"
    cache = f"crosscoders cache {pair} --hook-point {HOOK_POINT} --context-length 128"
    return {
        "say": [f"diffing say {pair} {null} --n-samples {sizes.samples} --strengths '[0, 1, 2]'"],
        "replies": [f"diffing replies {pair} --n-prompts {sizes.prompts} --max-new-tokens 24"],
        "cache": [
            f"{cache} --data {data} --n-tokens {sizes.tokens} --out {w}/cache",
            f"{cache} --data {held} --n-tokens {sizes.heldout_tokens} --out {w}/cache-heldout",
        ],
        "train": [
            f"crosscoders train --preset demo --crosscoder.dict-size {sizes.dict_size} --crosscoder.k {sizes.k} "
            f"--n-tokens {sizes.train_tokens} --batch-size {BATCH} --lr-warmup-steps {warm} --cache {w}/cache "
            f"--eval-cache {w}/cache-heldout --out {w}/run"
        ],
        "scale": [f"diffing scale {w}/run", f"diffing report {w}/run"],
        "causal": [f"diffing causal {w}/run --cache {w}/cache-heldout --n-documents {sizes.chats}"],
        "null": [f"diffing null {w}/run --placebo {w}/placebo --n-seeds 1 --out {w}/null"],
        "sae": [
            f"diffing sae {pair} --sae {w}/sae {null} --data {held} --context-length 128 "
            f"--n-tokens {sizes.heldout_tokens} --n-documents {sizes.chats} --n-latents 16 --out {w}/sae-diff"
        ],
        "sae-lora": [
            f"sae-lora fit --model {shlex.quote(base)} --dictionary {w}/sae --data {data} --context-length 128 "
            f"--chat-template {w}/tuned/chat_template.jinja "
            f"--n-tokens {sizes.tokens // 4} --rank 8 --out {w}/sae-lora",
            f"sae-lora eval {w}/sae-lora --data {held} --chat-template {w}/tuned/chat_template.jinja "
            f"--n-tokens {sizes.heldout_tokens // 2}",
        ],
    }


def run_stage(name: str, lines: list[str], work: Path) -> dict[str, Any]:
    """Run the command lines of a stage, unless it has ended; return its record.

    Raises:
        EnvironmentFault: a command failed; its output is in WORK/<stage>/.
    """
    folder = work / "stages" / name
    done = folder / "done.json"
    if done.is_file():
        return files.read_model(done, StageRecord)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"stage {name}")
    started = time.perf_counter()
    for number, line in enumerate(lines):
        program, *words = shlex.split(line)
        log = folder / f"{number}-{words[0]}.txt"
        with log.open("w") as out:
            code = subprocess.run(
                [sys.executable, "-m", program.replace("-", "_"), *words], stdout=out, stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False,
            ).returncode  # fmt: skip
        if code:
            last = log.read_text().strip().splitlines()[-1:] or ["no output"]
            raise EnvironmentFault(f"stage {name} ended with status {code}: {last[0]} All of it: {log}")
    said = re.findall(r"peak memory (\d+\.\d+) GiB", "".join(log.read_text() for log in folder.glob("*.txt")))
    record = {
        "seconds": time.perf_counter() - started,
        "peak_gib": max(map(float, said), default=0.0),
        "commands": lines,
    }
    files.write_json(done, record)
    return record
