"""What other methods wrote, as sections of tables and figures: TopKLoRA runs and results of `diffing sae`.

Reading order: `Section`, `sae_section`; `topk_lora` has the other one.
"""

from pathlib import Path
from typing import Any, NamedTuple

from crosscoders.common.files import read_model
from crosscoders.common.records import Record
from crosscoders.common.results import ResultRecord
from diffing.report.figures import Figure
from diffing.report.text import NONE, clip, model_name, number

TOPK = "diffing topk-lora fit --base BASE --tuned TUNED --data DATA --out {run}/topk-lora"
DECOMPOSE = "diffing decompose --base BASE --tuned TUNED --data DATA --out {run}/decompose"
COMPARE = "diffing compare --base BASE --tuned TUNED --data DATA --out {run}/compare"
SAE = "diffing sae --base BASE --tuned TUNED --sae SAE --data DATA --out {run}/sae"
SHOWN_LATENTS = 16
ORDERS = {"kl": "KL closed when patched alone", "twin": "how far the twin turned what they write"}
CHANGE = (
    "Change is of the mean activation, tuned minus base, times the length of what the latent writes, in units of the "
    "activations; rates are shares of tokens; KL closed is that of the latent patched alone."
)


class Table(NamedTuple):
    """Cells as text; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


class Section(NamedTuple):
    """One method's results in one folder."""

    name: str
    """Fixed id in the page."""
    title: str
    sentences: list[str]
    tables: list[Table]
    figures: list[Figure]
    pair: tuple[str, str]
    """Names of base and tuned model."""
    rows: list[dict[str, Any]]
    """Of the result file, for report.json."""


class SaeRecord(ResultRecord):
    """sae.json of `diffing sae`."""

    version = 1
    again = "run diffing sae again"
    format_version: int
    config: dict[str, Any]
    orders: dict[str, list[dict[str, Any]]]


class SetsRecord(ResultRecord):
    """sets.json of `diffing topk-lora sets`."""

    again = "run diffing topk-lora sets again"
    sets: dict[str, list[tuple[str, int]] | None]


class TopKRun(Record):
    """topk-run.json of `diffing topk-lora fit`."""

    again = "fit again"
    config: dict[str, Any]


def pair_of(config: dict[str, Any]) -> tuple[str, str]:
    """Return the names of base and tuned model."""
    return model_name(config.get("base", "base")), model_name(config.get("tuned", "tuned"))


def absent(run: Path, sections: list[Section]) -> list[str]:
    """Return the commands of the methods that have no section."""
    shown = {section.name.rsplit("-", 1)[0] for section in sections}
    commands = {"topk-lora": TOPK, "sae": SAE, "compare": COMPARE, "decomposition": DECOMPOSE}
    return [command.format(run=run) for name, command in commands.items() if name not in shown]


def with_interval(entry: dict[str, Any], form: str = ".4f") -> str:
    """Write a row's value and interval."""
    low, high = entry.get("low"), entry.get("high")
    value = NONE if entry["value"] is None else format(entry["value"], form)
    return value if low is None or high is None else f"{value} ({low:{form}} to {high:{form}})"


def sae_section(folder: Path, place: int) -> Section:
    """Return the tables of a result of `diffing sae`."""
    record = read_model(folder / "sae.json", SaeRecord)
    rows = {entry["name"]: entry for entry in record["rows"]}
    tables = [
        Table(
            f"First latents by {ORDERS.get(order, order)}",
            ["latent", "change", "rate in base", "in tuned", "attribution, nats", "KL closed, nats", "fires mostly in"],
            [_latent_cells(entry) for entry in latents[:SHOWN_LATENTS]],
            _null_sentence(rows, order, len(latents)),
        )
        for order, latents in record["orders"].items()
    ]
    quality = [
        [name.removeprefix("sae.").removesuffix(".fve").replace(".", ", "), with_interval(rows[name], ".3f")]
        for name in rows
        if name.endswith(".fve")
    ]
    if quality:
        tables.insert(0, Table("How well it rebuilds", ["dictionary, model", "FVE"], quality))
    title = f"One SAE on both models: {model_name(record['config'].get('sae'))}"
    return Section(f"sae-{place}", title, [CHANGE], tables, [], pair_of(record["config"]), record["rows"])


def _latent_cells(entry: dict[str, Any]) -> list[str]:
    def cell(key: str, form: str) -> str:
        return NONE if entry.get(key) is None else format(entry[key], form)

    where = entry.get("main_context")
    share = entry.get("main_context_share")
    return [
        str(entry["latent"]), cell("change", "+.3f"), cell("rate_base", ".4f"), cell("rate_tuned", ".4f"),
        cell("attribution", "+.4f"), cell("kl_closed", "+.4f"), f"{clip(where)} ({share:.0%})" if where else NONE,
    ]  # fmt: skip


def _null_sentence(rows: dict[str, dict[str, Any]], order: str, n: int) -> str:
    at, beyond = (rows.get(f"sae.{order}.{key}") for key in ("null_at_threshold", "beyond_null"))
    if at is None or beyond is None:
        return "No null: how many latents change as much without the behaviour is not known."
    return (
        f"The null model has {number(at['value'])} latents as large as the last of these {n}; "
        f"{number(beyond['value'])} of the pair's are above all of the null's."
    )
