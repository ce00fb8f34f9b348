"""Parts of a comparison, each of one model, seed and kind of method; what is finished lies in OUT and is read again.

    OUT/<tuned or null>/seed-<n>/<unit>.json      rows, texts and seconds of one unit
    OUT/<tuned or null>/seed-<n>/<run>/           what a trained method has trained

Reading order: `Reader` loads a pair and reads it once for all units, `run_unit` gives the rows of one.
"""

import functools
import time
from pathlib import Path
from typing import Any

from crosscoders.common import files
from crosscoders.common.progress import say
from crosscoders.common.records import Record
from crosscoders.common.results import Row, row
from crosscoders.models.pair import ModelPair
from diffing.baselines.directions import Directions
from diffing.baselines.observation import Observed, observe
from diffing.baselines.pca import mean_direction, principal_directions
from diffing.comparison.decomposition_block import decomposition_rows
from diffing.comparison.direction_block import Task, own_rates, span_rows, weight_rows
from diffing.comparison.inputs import Documents, Inputs, load
from diffing.comparison.overlap import score_overlaps, span_overlaps
from diffing.comparison.patched_replies import prompts_of
from diffing.comparison.score_block import score_rows, token_scores
from diffing.comparison.settings import DICTIONARIES, SCORES, TEXTS, TRAINED_SCORES
from diffing.comparison.text_block import Texts, text_rows
from diffing.comparison.topk_block import topk_rows
from diffing.comparison.trained import dictionary_rows, latent_scores
from diffing.comparison.truth import planted_tokens

SPANS = ("pca", "mean-difference")


class UnitRecord(Record):
    """Rows of one unit of `diffing compare`."""

    fingerprint: str
    rows: list[Row]
    texts: dict[str, Any]


class Reader:
    """One pair of one seed: its models, rows, activations and chats, each made when it is first asked for."""

    def __init__(self, inputs: Inputs, which: str, seed: int, documents: Documents, null: "Reader | None") -> None:
        self.inputs, self.which, self.seed, self.documents, self.null = inputs, which, seed, documents, null
        self.rows = documents.rows
        self.folder = Path(inputs.settings.out) / which / f"seed-{seed}"

    @functools.cached_property
    def pair(self) -> ModelPair:
        """The models, whole."""
        return load(self.inputs, self.which)

    @functools.cached_property
    def observed(self) -> Observed:
        """What one pass of both models over the rows gives."""
        return observe(self.pair, self.rows, batch_rows=self.inputs.settings.batch_rows)

    @functools.cached_property
    def task(self) -> Task:
        """What pieces are measured on."""
        settings, template = self.inputs.settings, self.inputs.template
        prompts = [
            (behaviour, prompts_of(self.pair, behaviour, settings.n_prompts, template, settings.template_date))
            for behaviour in self.inputs.truth
        ]
        return Task(self.pair, self.documents.chats, prompts, settings, self.seed)


def units_of(inputs: Inputs) -> dict[str, list[str]]:
    """Return the units to run, with the methods of each."""
    settings = inputs.settings
    units = {"behaviour": ["behaviour"]} if inputs.truth else {}
    units |= {"span": settings.chosen(SPANS), "weight-svd": settings.chosen(("weight-svd",))}
    units |= {"scores": settings.chosen(SCORES)} | {name: settings.chosen((name,)) for name in TEXTS}
    units |= {name: settings.chosen(methods) for name, methods in DICTIONARIES.items()}
    units |= {name: settings.chosen((name,)) for name in ("topk-lora", "decomposition")}
    units |= {"latents": settings.chosen(TRAINED_SCORES)}
    return {name: methods for name, methods in units.items() if methods}


def run_unit(reader: Reader, unit: str, methods: list[str]) -> dict[str, Any]:
    """Return rows and texts of one unit, from its file where that is of the same inputs."""
    path = reader.folder / f"{unit}.json"
    fingerprint = reader.inputs.fingerprint(reader.which, reader.documents, unit, methods)
    if path.is_file():
        recorded = files.read_model(path, UnitRecord)
        if recorded["fingerprint"] == fingerprint:
            return recorded
    say(f"{reader.which}, seed {reader.seed}: {', '.join(methods)}")
    rows, texts = _measured(reader, unit, methods)
    described = {"fingerprint": fingerprint, "rows": rows, "texts": texts}
    files.write_json(path, described)
    return described


def _measured(reader: Reader, unit: str, methods: list[str]) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    inputs, task, started = reader.inputs, reader.task, time.perf_counter()
    texts: dict[str, list[str]] = {}
    if unit == "behaviour":
        return list(own_rates(task)), texts
    if unit == "span":
        spans = _spans(reader, methods)
        rows = span_rows(task, spans) + span_overlaps(spans, inputs.settings.pieces)
    elif unit == "weight-svd":
        rows = weight_rows(task)
    elif unit in ("scores", "latents"):
        rows = _scored(reader, unit, methods)
    elif unit in DICTIONARIES:
        rows = dictionary_rows(unit, methods, inputs, reader.which, task, reader.folder)
    elif unit == "topk-lora":
        rows = topk_rows(inputs, reader.which, task, reader.folder)
    elif unit == "decomposition":
        rows = decomposition_rows(inputs, reader.which, task, reader.folder)
    else:
        null = None if reader.null is None else reader.null.observed
        made = Texts(reader.pair, reader.observed, inputs.settings, reader.seed, null).of(unit)
        rows, texts = text_rows(unit, made, reader.pair.info.tokenizer, inputs.truth), made
    seconds = time.perf_counter() - started
    block = "scores" if unit in ("scores", "latents") else "texts" if unit in TEXTS else "directions"
    rows += [row(f"{block}.{method}.seconds", seconds / len(methods), "s", 1) for method in methods]
    return rows, texts


def _spans(reader: Reader, methods: list[str]) -> list[Directions]:
    delta, pieces = reader.observed.delta, reader.inputs.settings.pieces
    made = []
    if "pca" in methods:
        made.append(principal_directions(delta, max(pieces)))
    if "mean-difference" in methods:
        made.append(mean_direction(delta))
    return made


def _scored(reader: Reader, unit: str, methods: list[str]) -> list[dict[str, Any]]:
    observed, tokenizer = reader.observed, reader.pair.info.tokenizer
    n_ids = reader.pair.info.n_ids
    thresholds = {}
    if reader.null is not None:
        null_rows = {entry["name"]: entry["value"] for entry in run_unit(reader.null, unit, methods)["rows"]}
        thresholds = {method: null_rows[f"scores.{method}.threshold"] for method in methods}
    planted = None
    if reader.inputs.truth:
        whole = planted_tokens(reader.rows, tokenizer, reader.inputs.truth)
        planted = whole[reader.rows.offsets[observed.documents.numpy()] + observed.positions.numpy()]
    if unit == "latents":
        scores = {"latents": latent_scores(reader.inputs, reader.which, reader.seed, reader.folder, observed.x)}
    else:
        scores = token_scores(observed, methods, n_ids)
    return score_rows(scores, observed, planted, thresholds, reader.seed) + score_overlaps(scores)
