"""What a run folder says, read and checked: the first half of step 5 of the data flow.

In comes RUN with `latents.json` and, each optional, `run.json`, `train.jsonl`, `eval.json` and `examples.json`; out
goes a `Run` of plain data in which every number is finite or None. Reading order: `read_run`, then one reader per file.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from crosscoders.common.errors import InputError, nearest
from crosscoders.common.files import read_model
from crosscoders.common.records import Record
from crosscoders.common.results import ResultRecord
from crosscoders.training.log import require_log
from diffing.latents.decoder_norms import NORM_CLASSES
from diffing.latents.records import require_one_table
from diffing.latents.stability import read_returns
from diffing.latents.verdict import VERDICTS, Thresholds, is_alive

WORDS: dict[str, tuple[str, ...]] = {"verdict": tuple(VERDICTS), "norm_class": NORM_CLASSES}
NUMBERS = (
    "latent", "rank", "specificity", "nu_error", "nu_error_stderr", "nu_reconstruction", "nu_reconstruction_stderr",
    "relative_decoder_norm", "decoder_cosine", "n_active", "frequency", "max_activation", "template_share",
    "main_context_share", "decoder_norm_base", "decoder_norm_tuned", "nu_error_mirror", "nu_reconstruction_mirror",
)  # fmt: skip
COLUMNS = (*NUMBERS, *WORDS, "main_context")
NUMBER_TYPES: tuple[set[type], str] = {int, float, type(None)}, "a number"
TYPES: dict[str, tuple[set[type], str]] = {
    "latent": ({int}, "a whole number"),
    "n_active": ({int}, "a whole number"),
    "main_context": ({str, type(None)}, "text"),
}
PLAIN = {int, str, bool, type(None)}
ENTRY = PLAIN | {float}
SCALE = "diffing scale {run} --cache CACHE"
MADE_BY = {
    "run.json": "crosscoders train --cache CACHE --out {run}",
    "train.jsonl": "crosscoders train --cache CACHE --out {run}",
    "eval.json": "crosscoders eval {run} --cache CACHE --out {run}/eval.json",
    "latents.json": SCALE,
    "examples.json": SCALE,
}


class Example(NamedTuple):
    """One place where a latent is active."""

    document: int | None
    """Number of the document in the cache."""
    group: str | None
    """Group of the document."""
    position: int | None
    """Position of the peak in the document, in tokens."""
    value: float | None
    """Activation at the peak."""
    peak: int
    """Which of `tokens` is the peak."""
    tokens: list[str]
    """The tokens around it, as text. Anybody may have written them."""
    values: list[float]
    """Activation of the latent on each of them."""


@dataclass(frozen=True)
class Latents:
    """The latent table: columns of equal length, one entry for each latent."""

    n_tokens: int
    n_blocks: int
    thresholds: dict[str, float]
    columns: dict[str, list[Any]]
    n_folded_groups: int = 0
    """Groups of documents that are counted together as `other`."""

    def __len__(self) -> int:
        return len(self.columns["latent"])

    def numbers(self, name: str) -> Float[np.ndarray, " latents"]:
        """Return a column as numbers, NaN where it is undefined."""
        return np.array([math.nan if value is None else value for value in self.columns[name]], dtype=np.float64)

    def is_word(self, name: str, word: str) -> Bool[np.ndarray, " latents"]:
        return np.array([value == word for value in self.columns[name]], dtype=bool)

    @cached_property
    def alive(self) -> Bool[np.ndarray, " latents"]:
        """Tell which latents are alive, by the run's own threshold."""
        return is_alive(self.numbers("n_active"), self.thresholds["min_active"])

    @cached_property
    def order(self) -> list[int]:
        """Return rows from the best rank to the worst; latents without a rank come last, by their number."""
        rank, latent = self.columns["rank"], self.columns["latent"]
        return sorted(range(len(self)), key=lambda i: (rank[i] is None, rank[i] or 0, latent[i]))

    @property
    def extra(self) -> list[str]:
        """Return columns beyond the known ones, in the order of the file, without the errors of others."""
        inside = {self.inside(name) for name in self.columns}
        return [name for name in self.columns if name not in COLUMNS and name not in inside]

    def inside(self, name: str) -> str | None:
        """Return the column that is shown in the cells of column `name`: its standard error, or the share of a
        context."""
        name_inside = {"main_context": "main_context_share"}.get(name, f"{name}_stderr")
        return name_inside if name_inside in self.columns else None


class Run(NamedTuple):
    """A run folder in memory. What is absent is an empty list or dict."""

    path: Path
    setup: dict[str, Any]
    """run.json: config, environment, inputs."""
    training: list[dict[str, Any]]
    """Lines of train.jsonl about training batches."""
    heldout: list[dict[str, Any]]
    """Lines of train.jsonl about held-out tokens."""
    evaluation: list[dict[str, Any]]
    """Rows of eval.json."""
    latents: Latents
    examples: dict[int, list[Example]]
    """Examples by latent."""
    nulls: dict[str, Any] = {}  # noqa: RUF012  (never written to)
    """null.json, by `nulls.read_nulls`; empty where there is none, or where it is about an earlier latent table."""
    causal: dict[str, Any] = {}  # noqa: RUF012
    """causal.json, by `causes.read_causal`; empty under the same conditions."""
    say: dict[str, Any] = {}  # noqa: RUF012
    replies: dict[str, Any] = {}  # noqa: RUF012
    """say.json and replies.json, by `samples`; empty where there is none."""
    details: dict[str, Any] = {}  # noqa: RUF012
    """cards.json and lens.json, by `cards.read_details`."""
    sections: Any = ()
    """Of other methods, by `publishing.read_sections`."""

    def look(self, *keys: str) -> Any:
        """Return the value under nested keys of run.json, or None."""
        value: Any = self.setup
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        InputError: latents.json is missing, or a file has a column, field or value that does not fit.
        CorruptData: a file is not JSON.
    """
    if not (path / "latents.json").is_file():
        raise InputError(f"'{path}' has no latents.json. Run: {command_for('latents.json', path)}")
    require_one_table(path)
    latents = with_returns(read_latents(path / "latents.json"), path)
    setup = read_object(path / "run.json") if (path / "run.json").is_file() else {}
    training, heldout = read_training(path / "train.jsonl") if (path / "train.jsonl").is_file() else ([], [])
    evaluation = read_rows(path / "eval.json") if (path / "eval.json").is_file() else []
    examples = read_examples(path / "examples.json", latents) if (path / "examples.json").is_file() else {}
    return Run(path, setup, training, heldout, evaluation, latents, examples)


def command_for(name: str, run: Path | str) -> str:
    """Return the command that writes file `name` of a run folder."""
    return MADE_BY[name].format(run=run)


def finite(value: Any) -> Any:
    """Replace NaN and infinities in plain data by None, which is what strict JSON can say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list):  # the test spares a call for each number of a long column
        return [
            item if type(item) in PLAIN or (type(item) is float and math.isfinite(item)) else finite(item)
            for item in value
        ]
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object."""
    return {key: finite(item) for key, item in read_model(path, Record).items()}


def with_returns(latents: Latents, run: Path) -> Latents:
    """Return the table with the columns of `diffing stability`, where it was run on this table."""
    table = read_returns(run)
    if table is None:
        return latents
    listed = table.reindex(latents.columns["latent"])
    columns = {
        name: [None if math.isnan(value) else int(value) for value in listed[name]]
        for name in ("came_back", "same_verdict")
    }
    return replace(latents, columns=latents.columns | columns)


def read_latents(path: Path) -> Latents:
    """Read the latent table, each column checked for presence, length and type."""
    table, again = read_object(path), f"Run: {command_for('latents.json', path.parent)}"
    columns, thresholds = table.get("columns"), table.get("thresholds") or {}
    if not isinstance(columns, dict):
        raise InputError(f"{path} has no 'columns'. {again}")
    for name in Thresholds._fields:
        if not (isinstance(thresholds, dict) and is_number(thresholds.get(name))):
            raise InputError(f"{path} has no threshold {name!r}. {again}")
    for name in ("n_tokens", "n_blocks"):
        if type(table.get(name)) is not int:
            raise InputError(f"{path} has {name} = {table.get(name)!r}; it must be a whole number. {again}")
    for name in COLUMNS:
        if name not in columns:
            hint = nearest(name, list(columns))
            raise InputError(f"{path} has no column {name!r}{hint}. {again}")
    for name, values in columns.items():
        check_column(path, name, values, columns["latent"], again)
    if len(set(columns["latent"])) != len(columns["latent"]):
        raise InputError(f"{path}: column 'latent' names a latent twice. {again}")
    folded = table.get("n_folded_groups")
    return Latents(table["n_tokens"], table["n_blocks"], thresholds, columns, folded if type(folded) is int else 0)


def check_column(path: Path, name: str, values: Any, latents: Any, again: str) -> None:
    """Raise InputError unless the column is as long as `latents` and holds what its name says."""
    if not (isinstance(values, list) and isinstance(latents, list)):
        raise InputError(f"{path}: column {name!r} is not a list. {again}")
    if len(values) != len(latents):
        raise InputError(f"{path}: column {name!r} has {len(values)} values but 'latent' has {len(latents)}. {again}")
    if name in WORDS:
        allowed = {*WORDS[name], None} if name == "norm_class" else {*WORDS[name]}
        words = f"one of {', '.join(WORDS[name])}"
        wrong = [i for i, value in enumerate(values) if not isinstance(value, str | None) or value not in allowed]
    else:
        is_numeric = name in NUMBERS or name.endswith("_stderr")
        types, words = TYPES.get(name, NUMBER_TYPES if is_numeric else (ENTRY, "a number, a text or null"))
        wrong = [i for i, value in enumerate(values) if type(value) not in types]
    if wrong:
        i = wrong[0]
        raise InputError(f"{path}: column {name!r}, entry {i} is {values[i]!r}; expected {words}. {again}")


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def read_training(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read the lines about training and about held-out tokens, by step; of a step that was logged twice the later."""
    require_log(path.parent)
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    training: dict[float, dict[str, Any]] = {}
    heldout: dict[float, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = finite(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # a killed run may leave half a line at the end
                break
            raise InputError(f"{path}, line {number} is not JSON ({error}). Remove that line.") from None
        if not (isinstance(entry, dict) and is_number(entry.get("step"))):
            raise InputError(f"{path}, line {number} has no step. Remove that line.")
        if "event" not in entry:
            training[entry["step"]] = entry
        elif entry["event"] == "eval":
            heldout[entry["step"]] = entry
    return [training[step] for step in sorted(training)], [heldout[step] for step in sorted(heldout)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a result file: name, value, unit, n, low, high."""
    return [finite(row) for row in read_model(path, ResultRecord)["rows"]]


def read_examples(path: Path, latents: Latents) -> dict[int, list[Example]]:
    """Read the examples by latent."""
    again = f"Run: {command_for('examples.json', path.parent)}"
    by_latent = read_object(path).get("latents")
    if not isinstance(by_latent, dict):
        raise InputError(f"{path} has no 'latents'. {again}")
    known = {str(latent): latent for latent in latents.columns["latent"]}
    examples: dict[int, list[Example]] = {}
    for key, entries in by_latent.items():
        if key not in known:
            raise InputError(f"{path} has examples of latent {key!r}, which is not in latents.json. {again}")
        if not isinstance(entries, list):
            raise InputError(f"{path}: the examples of latent {key!r} are not a list. {again}")
        examples[known[key]] = [read_example(path, key, entry, again) for entry in entries]
    return examples


def read_example(path: Path, key: str, entry: Any, again: str) -> Example:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    tokens, values = as_list(fields.get("tokens")), as_list(fields.get("values"))
    peak = fields.get("peak")
    typed = set(map(type, tokens)) <= {str} and set(map(type, values)) <= {int, float}
    if not (typed and 0 < len(tokens) == len(values)):
        raise InputError(f"{path}: an example of latent {key!r} lacks 'tokens' and as many 'values'. {again}")
    if not (type(peak) is int and 0 <= peak < len(tokens)):
        raise InputError(f"{path}: an example of latent {key!r} has peak {peak!r} but {len(tokens)} tokens. {again}")
    document, position, value = (
        fields[name] if is_number(fields.get(name)) else None for name in ("document", "position", "value")
    )
    group = None if fields.get("group") is None else str(fields["group"])
    return Example(document, group, position, value, peak, tokens, values)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
