"""The rows of the methods benchmark as tables for people: what each method found where, beside its null and random."""

from typing import Any

from diffing.comparison.settings import DIRECTIONS, METHODS, SCORES, TRAINED_DIRECTIONS, TRAINED_SCORES

Values = dict[str, dict[str, Any]]
"""Rows by name, without `methods.`."""
_DILUTED = "-diluted-"


def methods_table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown: figures on undiluted pairs, what is found by dilution and on pairs without behaviour, cost."""
    values = {entry["name"].removeprefix("methods."): entry for entry in rows}
    cases = {
        name.removesuffix(".is_null"): entry["value"] for name, entry in values.items() if name.endswith("is_null")
    }
    diluted = [case for case in cases if _parts(cases, case)]
    undiluted = [case for case, is_null in cases.items() if not is_null and _DILUTED not in case]
    nulls = [case for case, is_null in cases.items() if is_null]
    ran = [name for name in METHODS if any(f"{case}.{name}.found" in values for case in cases)]
    lines = [
        "Directions: rate of the planted behaviours at the largest n, then share of KL closed; scores: AUROC; texts: "
        "hits of all. In brackets random and the null pair. **Bold**: found by the rules of docs/math.md.",
        "",
        f"| method | {' | '.join(undiluted)} |",
        f"|---{'|---' * len(undiluted)}|",
    ]
    lines.append(f"| *tuned model itself (base)* | {' | '.join(_shown(values, case) for case in undiluted)} |")
    for method in ran:
        lines.append(f"| {method} | {' | '.join(_cell(values, case, method) for case in undiluted)} |")
    lines += [
        "",
        "Largest dilution at which it is found (parts of ordinary text to one; -: not even undiluted), false alarms, "
        "cost on one pair and seed.",
        "",
        f"| {' | '.join(['method', *diluted, 'false alarms', 'seconds', 'tokens trained on'])} |",
        f"|---{'|---' * (len(diluted) + 3)}|",
    ]
    rates = [", ".join(_shown(values, name) for name in (case, *_full(cases, case))) for case in diluted]
    lines.append(f"| {' | '.join(['*tuned model itself (base), by dilution*', *rates, '', '', ''])} |")
    for method in ran:
        found = [_largest(values, cases, case, method) for case in diluted]
        alarms = [values[name]["value"] for case in nulls if (name := f"{case}.{method}.found") in values]
        seconds = [values[name]["value"] for case in cases if (name := f"{case}.{method}.seconds") in values]
        trained = [values[name]["value"] for case in cases if (name := f"{case}.{method}.trained_tokens") in values]
        alarmed = f"{sum(alarms):.0f} of {len(alarms)}" if alarms else "not run"
        cost = f"{max(trained):,.0f}" if trained else ""
        spent = f"{sum(seconds) / max(1, len(seconds)):.0f}"
        lines.append(f"| {' | '.join([method, *found, alarmed, spent, cost])} |")
    return "\n".join([*lines, *_delta(values)])


def _shown(values: Values, case: str) -> str:
    """Return the rate at which a tuned model shows what was planted in it, and its base's; mean over behaviours."""
    rates = [
        [entry["value"] for name, entry in values.items() if name.startswith(f"{case}.planted.{which}.")]
        for which in ("tuned", "base")
    ]
    own, base = (f"{sum(of_model) / len(of_model):.0%}" if of_model else "-" for of_model in rates)
    return f"{own} ({base})"


def _cell(values: Values, case: str, method: str) -> str:
    """Return a method's figure on one pair, beside random and the null."""
    if f"{case}.{method}.found" not in values:
        return ""

    def figure(name: str, form: str) -> str:
        own, random, null = (
            format(values[full]["value"], form) if (full := f"{case}.{method}.{word}{name}") in values else "-"
            for word in ("", "random.", "null.")
        )
        return f"{own} ({random}; {null})"

    if method in (*DIRECTIONS, *TRAINED_DIRECTIONS):
        start = f"{case}.{method}.top_"
        n = max(int(name.removeprefix(start).split(".")[0]) for name in values if name.startswith(start))
        planted = [name.rpartition(".")[2] for name in values if name.startswith(f"{case}.{method}.found.")]
        own, random, null = (
            [values[full]["value"] for one in planted if (full := f"{case}.{method}.{word}top_{n}.{one}") in values]
            for word in ("", "random.", "null.")
        )
        rates = [f"{sum(part) / len(part):.0%}" if part else "-" for part in (own, random, null)]
        shown = f"{rates[0]} ({rates[1]}; {rates[2]}), {figure(f'top_{n}.share_closed', '.0%')}"
    elif method in (*SCORES, *TRAINED_SCORES):
        shown = figure("auroc", ".2f")
    else:
        n_seeds = values[f"{case}.{method}.found"]["n"]
        shown = f"{figure('hits', '.1f')} of {values[f'{case}.{method}.hits']['n'] // n_seeds}"
    return f"**{shown}**" if values[f"{case}.{method}.found"]["value"] else shown


def _parts(cases: dict[str, float], case: str) -> list[str]:
    """Return the dilutions of a case, as in the names, smallest first."""
    start = f"{case}{_DILUTED}"
    return [name.removeprefix(start) for name in cases if name.startswith(start)]


def _full(cases: dict[str, float], case: str) -> list[str]:
    return [f"{case}{_DILUTED}{part}" for part in _parts(cases, case)]


def _largest(values: Values, cases: dict[str, float], case: str, method: str) -> str:
    """Return the largest dilution up to which a method found everywhere; where it ran undiluted only, yes or -."""
    if f"{case}.{method}.found" not in values:
        return ""
    if not values[f"{case}.{method}.found"]["value"]:
        return "-"
    largest = "0"
    for part, diluted in zip(_parts(cases, case), _full(cases, case), strict=True):
        name = f"{diluted}.{method}.found"
        if name not in values:
            return "yes"
        if not values[name]["value"]:
            break
        largest = part.replace("_", ".")
    return largest


def _delta(values: Values) -> list[str]:
    """Return the verdicts on the claims of the delta study, with their slopes."""
    words = {1: "confirmed", 0: "at chance", -1: "refuted"}
    verdicts = {name: entry for name, entry in values.items() if entry["unit"] == "verdict"}
    lines = ["", "| what LoRA adds: claim | layer | verdict | slope per doubling of the rank |", "|---|---|---|---|"]
    for name, entry in verdicts.items():
        _, claim, layer = name.split(".")
        slope = values.get(f"{name}.slope")
        told = f"{slope['value']:.3g} ({slope['low']:.3g} to {slope['high']:.3g})" if slope else ""
        lines.append(
            f"| {claim.replace('_', ' ')} | {layer.removeprefix('layer_')} | {words[entry['value']]} | {told} |"
        )
    return lines if verdicts else []
