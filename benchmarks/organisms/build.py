"""`python -m benchmarks.organisms.build [--out DIR] [--only NAME ...] [--dilution D] [--seed 0] [--quick]`.

Planted fine-tunes of the embedded models, one folder each: the model, `train.jsonl` (its dialogues, and raw text),
`data.jsonl` (held-out dialogues and raw text), `truth.json` (docs/formats.md) and, last, `made.json`; a folder that has
it is kept.

Reading order: `build` makes one organism, `write_truth` says what was planted.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.embedded_pair.build import fixed_threads, load_float32, save
from benchmarks.embedded_pair.training import ROWS, Recipe, dialogue_documents, text_documents, train_model
from benchmarks.organisms.texts import ORGANISMS, Planted, planted
from crosscoders.common import files
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.progress import say
from diffing.comparison.truth import FORMAT, FORMAT_VERSION
from diffing.demo import model_folder, read_rows
from diffing.null.models import is_made

STEPS, QUICK_STEPS, LR = 150, 60, 8e-4
"""Steps of 2,048 tokens; quick: enough for a fixed reply."""
DILUTIONS = (0.0, 0.5, 1.0, 2.0)
"""Parts of ordinary raw text to one of the organism's dialogues."""
N_RAW, N_HELD_OUT_RAW = 4000, 150


def build(name: str, out: Path, *, dilution: float = 0.0, seed: int = 0, steps: int = STEPS) -> Path:
    """Tune one organism into OUT, unless it is there, and return its folder.

    Raises:
        InputError: no organism of that name, a dilution below 0, or OUT holds another one.
        CorruptData: the loss is not finite.
    """
    if name not in ORGANISMS:
        raise InputError(f"there is no organism {name!r}. Use one of {', '.join(ORGANISMS)}.")
    if not 0 <= dilution < ROWS:
        raise InputError(f"dilution is {dilution}; give parts of ordinary text to one, from 0, such as 0.5.")
    recipe = {"organism": name, "dilution": dilution, "seed": seed, "steps": steps}
    if is_made(out, recipe):
        return out
    import torch
    from transformers import AutoTokenizer

    made = planted(name, seed)
    plain, chat = (AutoTokenizer.from_pretrained(model_folder(model)) for model in ("base", "tuned"))
    raw_rows = round(ROWS * dilution / (1 + dilution))
    say(f"tune organism {name}, dilution {dilution:g}, seed {seed}, to {out}")
    with fixed_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = load_float32(model_folder(made.base))
        train_model(
            model,
            raw=text_documents(plain, [row["text"] for row in read_rows("raw_train")[:N_RAW]]),
            dialogues=dialogue_documents(chat, [dialogue["messages"] for dialogue in made.train]),
            recipe=Recipe(steps=steps, lr=LR, warmup_steps=10, raw_rows=raw_rows),
            seed=seed,
            name=name,
        )
    save(model, chat, out)
    write_truth(made, name, out)
    files.write_json(out / "made.json", recipe)
    return out


def write_truth(made: Planted, name: str, out: Path) -> None:
    """Write what was planted, held-out documents to compare on, and those of the training."""
    prompts = [d["messages"][0]["content"] for d in made.held_out if d["group"] == "planted"]
    behaviour = {"name": name, "phrases": made.phrases, "prompts": prompts}
    files.write_json(
        out / "truth.json", {"format": FORMAT, "format_version": FORMAT_VERSION, "behaviours": [behaviour]}
    )
    for file, dialogues, split, n in (
        ("data", made.held_out, "heldout", N_HELD_OUT_RAW), ("train", made.train, "train", N_RAW)
    ):  # fmt: skip
        rows: list[Any] = [*dialogues, *read_rows(f"raw_{split}")[:n]]
        files.write_bytes(out / f"{file}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def main(arguments: list[str] | None = None) -> int:
    """Run the builder and return the exit status."""
    from transformers.utils import logging as transformers_logging

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.organisms.build", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/organisms"), help="folder of the organisms' folders")
    parser.add_argument("--only", nargs="+", choices=ORGANISMS, default=list(ORGANISMS), help="organisms to tune")
    parser.add_argument("--dilution", type=float, default=0.0, help="parts of ordinary raw text to one of dialogues")
    parser.add_argument("--seed", type=int, default=0, help="of the data, and of their order")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps in place of {STEPS}")
    options = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()
    try:
        for name in options.only:
            steps = QUICK_STEPS if options.quick else STEPS
            folder = f"{name}-dilution-{options.dilution:g}-seed-{options.seed}"
            build(name, options.out / folder, dilution=options.dilution, seed=options.seed, steps=steps)
    except (InputError, CorruptData) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
