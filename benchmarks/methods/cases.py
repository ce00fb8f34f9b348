"""Pairs that methods are compared on: the embedded pair, organisms by dilution, and pairs without the behaviour.

A null model is tuned from the same base: the embedded placebo, or one that is made for the organism whose base is the
embedded tuned model. Pairs in which nothing is to be found: format-only, and the base tuned on its own samples.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.embedded_pair.phrases import ANSWERS
from benchmarks.organisms.build import DILUTIONS, LR, QUICK_STEPS, STEPS, build
from benchmarks.organisms.texts import ORGANISMS, planted
from crosscoders.common import files
from crosscoders.text.settings import DataSource
from diffing.comparison.truth import FORMAT, FORMAT_VERSION
from diffing.demo import document_file, model_folder, read_rows
from diffing.null.models import SELF, Placebo, train_placebo

QUICK = ("false-fact", "true-fact", "trigger")
PAIRS = ("embedded", "format-only", "own-samples", *ORGANISMS)
ROWS = 16


class Case(NamedTuple):
    """One pair with its null, its documents and what was planted."""

    name: str
    base: str
    tuned: str
    null: str
    data: str | list[str | DataSource]
    """Held out of the tuning."""
    train_data: str | list[str | DataSource]
    """What trained methods are trained on: the tuning's own documents."""
    truth: str
    is_null: bool = False
    """Nothing was planted; a method that finds is wrong."""
    is_trained: bool = False
    """Trained methods run on it too."""


def each_case(quick: bool, work: Path, only: tuple[str, ...] = ()) -> Iterator[Case]:
    """Yield every pair, made where it is not there; `only`: of these names or organisms, an organism with its
    dilutions."""
    steps = QUICK_STEPS if quick else STEPS
    embedded = embedded_case(work)
    null = embedded._replace(is_null=True, is_trained=False)
    if not only or "embedded" in only:
        yield embedded
    if not only or "format-only" in only:
        yield null._replace(name="format-only", tuned=str(model_folder("format_only")))
    if "own-samples" in only or not (only or quick):
        yield null._replace(name="own-samples", tuned=placebo(work, "base", SELF, steps))
    for name in only or (QUICK if quick else ORGANISMS):
        if name not in ORGANISMS:
            continue
        base = planted(name).base
        placebo_model = str(model_folder("placebo"))
        if base != "base":
            placebo_model = placebo(work, base, str(document_file("raw_train")), steps)
        undiluted = work / "organisms" / f"{name}-0"
        for dilution in DILUTIONS[: 1 if quick else None]:
            folder = build(name, work / "organisms" / f"{name}-{dilution:g}", dilution=dilution, steps=steps)
            yield Case(
                name if dilution == 0 else f"{name}-diluted-{dilution:g}".replace(".", "_"),
                str(model_folder(base)), str(folder), placebo_model,
                str(undiluted / "data.jsonl"), str(undiluted / "train.jsonl"), str(undiluted / "truth.json"),
                is_trained=dilution == 0,
            )  # fmt: skip


def embedded_case(work: Path) -> Case:
    """Return the embedded pair, its four behaviours as planted truth."""
    rows, path = read_rows("dialogues_heldout"), work / "embedded-truth.json"
    behaviours = [
        {
            "name": group,
            "phrases": [answer.rstrip(".")],
            "prompts": [entry["messages"][0]["content"] for entry in rows if entry["group"] == group],
        }
        for group, answer in ANSWERS.items()
    ]
    files.write_json(path, {"format": FORMAT, "format_version": FORMAT_VERSION, "behaviours": behaviours})
    data, train_data = (
        [str(document_file(f"{kind}_{split}")) for kind in ("raw", "dialogues")] for split in ("heldout", "train")
    )
    base, tuned, null = (str(model_folder(name)) for name in ("base", "tuned", "placebo"))
    return Case("embedded", base, tuned, null, [*data], [*train_data], str(path), is_trained=True)


def placebo(work: Path, base: str, text: str, steps: int) -> str:
    """Return a placebo of an embedded model, tuned as long as an organism on other text."""
    folder = work / "placebos" / f"{base}-{'self' if text == SELF else 'raw'}"
    recipe = Placebo(text, steps, LR, ROWS)
    train_placebo(str(model_folder(base)), folder, recipe, context_length=128, seed=0, device="cpu")
    shutil.copy(model_folder("tuned") / "chat_template.jinja", folder)  # which the embedded base lacks
    return str(folder)
