"""What a calibration says: `null_summary` for people, `result_rows` for `--json`."""

from typing import Any

from crosscoders.common.results import row
from diffing.null.rates import SCORES


def null_summary(calibration: dict[str, Any]) -> str:
    """Say the thresholds of the main score and the fixed ones, with the counts of every seed."""
    main, seed = next(iter(SCORES)), calibration["seed"]
    lines = [
        "",
        f"Specific latents by {main}, the larger of |nu_error| and |nu_reconstruction|, among those with a relative",
        f"decoder norm from 0.5. A threshold is fixed on a null crosscoder of seed {seed}; counts of other",
        "seeds stand in brackets, and the rate with its 95% interval is over those of the null. None: where a further",
        "null crosscoder has a tenth of a latent on average.",
    ]
    for entry in calibration["thresholds"]:
        if entry["score"] == main:
            at = "any" if entry["threshold"] is None else f"{entry['threshold']:.3f}"
            allowed = f"{entry['rate']:.1%}" if entry["rate"] else "none"
            lines.append(f"  {entry['null']} at {allowed}, threshold {at}:  {counts_text(entry['counts'])}")
            lines.append(f"      rate {rate_text(entry)}")
    moved = [f"{kind} {change:.1%}" for kind, change in calibration.get("weight_change", {}).items()]
    lines += [f"How far the weights moved from the base, as a share of their norm: {', '.join(moved)}."]
    lines += ["Thresholds that no null decided:"]
    lines += [f"  {entry['words']}:  {counts_text(entry['counts'])}" for entry in calibration["fixed"]]
    return "\n".join(lines)


def counts_text(counts: dict[str, list[dict[str, int]]]) -> str:
    """Write counts by kind, other seeds in brackets."""
    parts = []
    for kind, entries in counts.items():
        first, *others = [str(entry["count"]) for entry in entries]
        parts.append(f"{kind} {first}" + (f" ({', '.join(others)})" if others else ""))
    return "  ".join(parts)


def rate_text(entry: dict[str, Any]) -> str:
    """Write a rate with its interval and count."""
    if entry["false_positive_rate"] is None:
        return "no alive latent"
    interval = f"{entry['low']:.2%} to {entry['high']:.2%}"
    n = f"{entry['n']:,} latents that count as {entry['n_effective']:,.0f}"
    return f"{entry['false_positive_rate']:.2%} ({interval}; {n})"


def result_rows(calibration: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of `--json`."""
    rows = []
    for entry in calibration["thresholds"]:
        name = f"null.{entry['null']}.{entry['score']}.{rate_name(entry['rate'])}"
        first = entry["counts"]["tuned"][0]
        rows.append(row(f"{name}.count", first["count"], "latents", first["n"]))
        rate = entry["false_positive_rate"]
        rows.append(row(f"{name}.false_positive_rate", rate, "fraction", entry["n"], entry["low"], entry["high"]))
    for kind, change in calibration.get("weight_change", {}).items():
        rows.append(row(f"null.weight_change.{kind}", change, "fraction", 1))
    return rows


def rate_name(rate: float) -> str:
    """Write a rate as a part of a dotted name: `zero`, `percent_1`, `percent_0_5`."""
    return f"percent_{100 * rate:g}".replace(".", "_") if rate else "zero"
