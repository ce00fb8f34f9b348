"""Tables for people: the rows of one evaluation, and several runs side by side with their rows."""

from typing import Any

from crosscoders.common.results import legend, row
from crosscoders.common.statistics import resample
from sae_lora.evaluation.cells import CELLS, Means, Measured


def eval_summary(rows: list[dict[str, Any]]) -> str:
    """Return the rows of one run as a table for people."""
    values = {entry["name"].removeprefix("eval."): entry for entry in rows}
    n, n_sequences = values["ce.plain"]["n"], values["sequences"]["value"]
    lines = [f"{n:,} predictions in {n_sequences:,} sequences; 95% intervals over sequences"]
    lines.append(header := f"  {'':<18}{'CE':>8}   {'CE - plain':<30}{'KL':>8}{'top-1':>8}")
    for cell in CELLS:
        gap = values.get(f"ce_gap.{cell}")
        lines.append(
            f"  {cell:<18}{values[f'ce.{cell}']['value']:>8.4f}   {_interval(gap, '.4f'):<30}"
            f"{values[f'kl.{cell}']['value']:>8.4f}{values[f'top1.{cell}']['value']:>8.3f}"
        )
    meanings = {
        "CE": "cross-entropy, nats/token", "CE - plain": "what it is above that of the model as it is",
        "KL": "KL(plain || this), nats/token", "top-1": "share of predictions with the plain model's first token",
    }  # fmt: skip
    lines += legend(header, meanings)
    lines.append(f"  {'drift (dictionary off): CE - plain':<40}{_interval(values['ce_gap.adapted'], '.4f')}")
    lines.append(f"  {'drift (dictionary off): KL':<40}{_interval(values['kl.adapted'], '.4f')}")
    for name, shown in values.items():
        if name.startswith(("loss_recovered", "gap_closed", "kl_closed")):
            lines.append(f"  {name:<40}{_interval(shown, '.3f')}")
        if name.startswith(("fve", "l0")):
            lines.append(f"  {name:<40}{shown['value']:.3f}  n {shown['n']:,} tokens")
        if name.startswith(("rates", "effects")):
            lines.append(f"  {name:<40}  {_interval(shown, '.3g')}  n {shown['n']:,} latents")
    return "\n".join(lines + _class_lines(values))


def _class_lines(values: dict[str, dict[str, Any]]) -> list[str]:
    names = [name.removesuffix(".ce.plain") for name in values if name.endswith(".ce.plain")]
    if not names:
        return []
    header = f"  {'predictions of':<18}{'n':>8}   {'CE - plain, spliced -> adapted':<32}{'KL':<20}KL closed"
    lines = [header]
    for name in names:
        gap, kl = (
            [f"{values[f'{name}.{quantity}.{cell}']['value']:.4f}" for cell in ("spliced", "adapted_spliced")]
            for quantity in ("ce_gap", "kl")
        )
        lines.append(
            f"  {name:<18}{values[f'{name}.ce.plain']['n']:>8,}   {' -> '.join(gap):<32}{' -> '.join(kl):<20}"
            f"{_interval(values.get(f'{name}.kl_closed'), '.3f')}"
        )
    meanings = {
        "predictions of": "class of the token predicted", "n": "predictions",
        "CE - plain, spliced -> adapted": "nats/token, without and with the adapter", "KL": "the same of the KL",
        "KL closed": "share",
    }  # fmt: skip
    return lines + legend(header, meanings)


def _interval(entry: dict[str, Any] | None, form: str) -> str:
    if entry is None:
        return ""
    shown = f"{entry['value']:{form}}"
    return shown if entry["low"] is None else f"{shown} ({entry['low']:{form}} to {entry['high']:{form}})"


# ------------------------------------------------------------------------------------------------------ several runs


def comparison_rows(runs: dict[str, Measured], n_weights: dict[str, int], seed: int = 0) -> list[dict[str, Any]]:
    """Return rows compare.<run>.{gap, gap_left, gap_closed, kl, kl_left, kl_closed, ce_drift, kl_drift, weights} of
    runs on the same predictions, and .minus_first: KL left, minus that of the first run."""
    rows: list[dict[str, Any]] = []
    first: Means | None = None
    for name, measured in runs.items():
        means = Means(measured.sums, measured.n_tokens, resample(len(measured.n_tokens), seed))
        first = first or means
        columns = {
            "gap": means.gap("spliced"), "gap_left": means.gap("adapted_spliced"), "ce_drift": means.gap("adapted"),
            "kl": means.kl["spliced"], "kl_left": means.kl["adapted_spliced"], "kl_drift": means.kl["adapted"],
            "minus_first": means.kl["adapted_spliced"] - first.kl["adapted_spliced"],
        }  # fmt: skip
        rows += [means.entry(f"compare.{name}.{key}", values, "nats/token") for key, values in columns.items()]
        rows += [means.entry(f"compare.{name}.{key}", part, "fraction") for key, part in means.shares().items()]
        rows.append(row(f"compare.{name}.weights", n_weights[name], "weights", n_weights[name]))
    return rows


def comparison_table(rows: list[dict[str, Any]], described: dict[str, str]) -> str:
    """Return the rows of several runs, one line each in three tables. `described`: corrector and control of each
    run."""
    values = {entry["name"]: entry for entry in rows}
    n = next(iter(values.values()))["n"]
    parts = [
        {
            "gap": ("CE gap", ".4f"), "gap_left": ("left", ".4f"), "gap_closed": ("closed", ".1%"),
            "weights": ("weights", ","),
        },
        {
            "kl": ("KL", ".4f"), "kl_left": ("left", ".4f"), "kl_closed": ("closed", ".1%"),
            "minus_first": ("left - first's", ".4f"),
        },
        {"ce_drift": ("CE drift (dictionary off)", ".4f"), "kl_drift": ("KL drift", ".4f")},
    ]  # fmt: skip
    lines, headers = [f"{n:,} predictions; nats/token; 95% intervals over sequences"], []
    for forms in parts:
        cells = [["run", "what", *(title for title, _ in forms.values())]]
        for run, what in described.items():
            shown = [_interval(values.get(f"compare.{run}.{key}"), form) for key, (_, form) in forms.items()]
            cells.append([run, what, *shown])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        shown = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        lines += ["", *shown]
        headers.append(shown[0])
    meanings = {
        "run": "its folder", "what": "corrector and control", "CE gap": "cross-entropy that the splice adds",
        "left": "gap or KL with the corrector on", "closed": "share of it that the corrector closes",
        "weights": "that it trains", "KL": "KL(model || spliced)",
        "left - first's": "KL left, less that of the first run",
        "CE drift (dictionary off)": "cross-entropy that the corrector adds alone",
        "KL drift": "KL(model || corrector alone)",
    }  # fmt: skip
    return "\n".join([*lines, "", *legend("  ".join(headers), meanings)])
