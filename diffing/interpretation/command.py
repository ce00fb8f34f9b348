"""`diffing interpret`: latents of a run -> readout -> predictors, and names with scores where there is an endpoint."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas

from crosscoders.activations.cache import ActivationCache
from crosscoders.common import files
from crosscoders.common.checks import to_dict
from crosscoders.common.devices import choose_device
from crosscoders.common.progress import Progress, say
from crosscoders.common.records import Record
from crosscoders.common.results import ResultRecord, legend, result, row, say_closing
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.dictionary.health import warning
from crosscoders.formats.load import load_crosscoder
from crosscoders.text.decoding import token_text, token_texts
from crosscoders.text.tokens import ROLES
from diffing.interpretation.endpoint import Endpoint
from diffing.interpretation.examples import Readout, example_sets, heldout
from diffing.interpretation.offline import DRAWS, LEVEL, Prediction, predictions
from diffing.interpretation.scores import Interpreted, interpret, n_questions
from diffing.interpretation.settings import InterpretSettings
from diffing.latents.contexts import TEMPLATE, ChosenLatents
from diffing.latents.readable import run_reasons
from diffing.latents.runs import open_run_and_cache
from diffing.latents.table import cache_tokenizer, read_table, require_fit, require_latents
from diffing.topk_lora.command import DIRECTIONS, open_adapter
from diffing.topk_lora.command import RUN as TOPK_RUN
from diffing.topk_lora.readouts import read_activations

FORMAT_VERSION = 1


class LatentInterpretation(Record):
    """What is known of one latent."""

    predictors: list[dict[str, Any]]
    name: str | None
    scores: dict[str, dict[str, Any]]
    control: dict[str, dict[str, Any]]


class InterpretationRecord(ResultRecord):
    """interpretation.json"""

    version = FORMAT_VERSION
    again = "run diffing interpret again"
    format_version: int
    table: str
    latents: dict[str, LatentInterpretation]
    fault: str | None


def interpret_run(settings: InterpretSettings) -> dict[str, Any]:
    """Run `diffing interpret`."""
    started = time.perf_counter()
    of_adapter = (Path(settings.run) / TOPK_RUN).is_file()
    run, readout, tokenizer, table = (open_directions if of_adapter else open_latents)(settings)
    predicted = predictions(readout, seed=settings.seed)
    asked = Interpreted() if settings.endpoint is None else ask_endpoint(settings, readout, tokenizer)
    if asked.fault:
        say(f"warning: {asked.fault} The other results are complete.")
    described_latents = {}
    for latent in readout.features:
        listed = [_described(prediction, readout, tokenizer) for prediction in predicted[latent]]
        scores, control = (
            {task: judged.as_dict() for task, judged in part.get(latent, {}).items()}
            for part in (asked.scores, asked.control)
        )
        described_latents[str(latent)] = {
            "predictors": listed, "name": asked.names.get(latent), "scores": scores, "control": control,
        }  # fmt: skip
    described = {
        **result("interpret", to_dict(settings), interpretation_rows(predicted, asked)),
        "format_version": FORMAT_VERSION,
        "table": files.hash_file(table),
        "latents": described_latents,
        "fault": asked.fault,
    }
    path = run / "interpretation.json"
    files.write_json(path, described)
    say_closing(started, f"{len(readout.features)} features in {path}")
    return described | {"text": summary(described)}


class Opened(NamedTuple):
    """What is interpreted."""

    run: Path
    readout: Readout
    tokenizer: Any
    table: Path
    """File whose rows the features are."""


def open_latents(settings: InterpretSettings) -> Opened:
    """Read latents of a crosscoder's run on its cache."""
    run, cache = open_run_and_cache(settings.run, settings.cache)
    table = read_table(run)
    ranked = table.nsmallest(32, "rank").index.tolist()
    latents = require_latents(ranked if settings.latents is None else settings.latents, len(table))
    crosscoder = load_crosscoder(run, device=str(choose_device(settings.device)))
    require_fit(crosscoder, cache)
    if against := run_reasons(run, table):
        say(warning(against))
    say(f"interpret {len(latents)} latents of {run} on {min(settings.n_tokens, len(cache)):,} tokens of {cache.path}")
    readout = read_latents(crosscoder, cache, list(latents), settings.n_tokens)
    return Opened(Path(run), readout, cache_tokenizer(cache), Path(run) / "latents.json")


def open_directions(settings: InterpretSettings) -> Opened:
    """Read directions of a TopKLoRA on its held-out documents; a feature is a row of directions.parquet."""
    run = Path(settings.run)
    setting, adapter = open_adapter(run, settings.device)
    path = run / DIRECTIONS
    table = pandas.read_parquet(path)
    rows = list(require_latents(list(range(32)) if settings.latents is None else settings.latents, len(table)))
    say(f"interpret {len(rows)} directions of {run} on {setting.rows.n_scored:,} held-out tokens")
    chosen = list(table.loc[rows, ["site", "direction"]].itertuples(index=False, name=None))
    columns = read_activations(setting, adapter, chosen)
    return Opened(run, Readout(rows, *columns[:3], setting.rows.group_names, columns[3]), setting.tokenizer, path)


def read_latents(crosscoder: Crosscoder, cache: ActivationCache, latents: list[int], n_tokens: int) -> Readout:
    """Return the activations of chosen latents on the first tokens of a cache; a token's label is its context."""
    chosen, stop = ChosenLatents(crosscoder, latents), min(n_tokens, len(cache))
    label_names = [*cache.manifest["groups"], TEMPLATE]
    parts: list[tuple[np.ndarray[Any, Any], ...]] = []
    progress = Progress("read", total=stop, unit="tok")
    for tokens in cache.batches(4096, 0, stop):
        is_template = tokens.roles == ROLES.index(TEMPLATE)
        labels = tokens.groups.long().masked_fill(is_template, len(label_names) - 1)
        values = chosen.encode(tokens.activations)
        columns = (tokens.token_ids.long(), tokens.document_ids.long(), labels, values)
        parts.append(tuple(column.numpy() for column in columns))
        progress.update(len(labels))
    progress.close()
    token_ids, documents, labels_, activations = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Readout(latents, token_ids, documents, labels_, label_names, activations)


def ask_endpoint(settings: InterpretSettings, readout: Readout, tokenizer: Any) -> Interpreted:
    """Return names and scores of all features."""
    is_heldout = heldout(readout.documents, settings.seed)
    sets = {
        feature: example_sets(
            readout, i, is_heldout, lambda ids: token_texts(tokenizer, ids),
            n_shown=settings.n_shown, n_scored=settings.n_scored, seed=settings.seed,
        )
        for i, feature in enumerate(readout.features)
    }  # fmt: skip
    endpoint = Endpoint(
        str(settings.endpoint), str(settings.model), key=settings.key(), timeout_seconds=settings.timeout_seconds
    )
    say(f"up to {n_questions(sets):,} questions to {settings.model} at {settings.endpoint}")
    progress = Progress("ask", total=n_questions(sets), unit="question")
    asked = interpret(sets, endpoint.ask, seed=settings.seed, step=lambda: progress.update(1))
    progress.close()
    return asked


def interpretation_rows(predicted: dict[int, list[Prediction]], asked: Interpreted) -> list[dict[str, Any]]:
    """Return how many features their predictors tell beyond the null, and the scores of all names together."""
    testable = [listed for listed in predicted.values() if listed]
    beyond = {
        "any": sum(any(p.beats_null for p in listed) for listed in testable),
        **{
            kind: sum(p.beats_null for listed in testable for p in listed if p.kind == kind)
            for kind in ("token", "context", "label")
        },
    }
    rows = [row(f"interpret.offline.{kind}.count", n, "latents", len(testable)) for kind, n in beyond.items()]
    if testable:
        best = [max(p.balanced_accuracy for p in listed) for listed in testable]
        rows.append(row("interpret.offline.best.median", float(np.median(best)), "balanced accuracy", len(best)))
    for name, part in (("name", asked.scores), ("control", asked.control)):
        for task in ("detection", "fuzzing"):
            judged = [scores[task] for scores in part.values()]
            if n := sum(j.n for j in judged):
                right = sum(j.n_right for j in judged)
                rows.append(row(f"interpret.{task}.{name}", right / n, "fraction", n))
    return rows


def summary(described: dict[str, Any]) -> str:
    """Write a line for each latent: its best predictor, its name and the scores; and how many are beyond the null."""
    header = f"{'latent':>7}  {'best predictor':<28}{'balanced accuracy':<28}{'null 95%':>9}{'p':>7}"
    lines = [header]
    for latent, known in described["latents"].items():
        if not known["predictors"]:
            lines.append(f"{latent:>7}  fires on too few tokens, or on too many, to be predicted")
        else:
            best = max(known["predictors"], key=lambda p: (p["beats_null"], p["balanced_accuracy"]))
            accuracy = f"{best['balanced_accuracy']:.3f}"
            if best["low"] is not None:
                accuracy += f" ({best['low']:.3f} to {best['high']:.3f})"
            predictor = f"{best['kind']} {best['value']!r}"
            lines.append(f"{latent:>7}  {predictor:<28}{accuracy:<28}{best['null_high']:>9.3f}{best['p']:>7.3f}")
        if known["name"]:
            lines.append(f"{'':>9}{known['name']!r}: {_scores_text(known)}")
    meanings = {
        "latent": "its number, and below it the name that was asked for, with its scores",
        "best predictor": "the token, context or label that says best where it fires",
        "balanced accuracy": "mean of the shares of firing and of silent held-out tokens told right, and interval",
        "null 95%": f"quantile over {DRAWS} draws of activations from elsewhere", "p": "share of draws as good",
    }  # fmt: skip
    lines += legend(header, meanings)
    counts = {entry["name"].split(".")[2]: entry for entry in described["rows"] if ".offline." in entry["name"]}
    n = counts["any"]["n"]
    words = ", ".join(f"{kind} {counts[kind]['value']}" for kind in ("token", "context", "label"))
    lines.append(
        f"predicted beyond the null of {DRAWS} draws: {counts['any']['value']} of {n} latents ({words}); "
        f"{LEVEL * n:.1f} or fewer are expected by chance"
    )
    return "\n".join(lines)


def _scores_text(known: dict[str, Any]) -> str:
    words = []
    for task, score in known["scores"].items():
        other = known["control"].get(task, {}).get("accuracy")
        beside = "" if other is None else f", with another name {other:.2f}"
        said = (
            "no readable answer"
            if score["accuracy"] is None
            else f"{score['accuracy']:.2f} ({score['low']:.2f} to {score['high']:.2f}, n {score['n']}{beside})"
        )
        words.append(f"{task} {said}")
    return "; ".join(words)


def _described(prediction: Prediction, readout: Readout, tokenizer: Any) -> dict[str, Any]:
    """Return a prediction with words for its value."""
    is_label = prediction.kind == "label"
    value = readout.label_names[prediction.value] if is_label else token_text(tokenizer, prediction.value)
    numbers = {name: v for name, v in prediction._asdict().items() if name != "value"}
    token_id = None if is_label else prediction.value
    return {**numbers, "value": value, "token_id": token_id, "beats_null": prediction.beats_null}
