"""Training curves: lines of train.jsonl -> figures of at most 400 points a line.

Reading order: `training_figures`, `place`, `curves`, then the axes and means.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from diffing.report.figures import BASE, TUNED, Figure, rounded, spec
from diffing.report.text import counted, number

MAX_CURVE_POINTS = 400


class Log(NamedTuple):
    """Lines of train.jsonl with their place on the horizontal axis."""

    training: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    per_point: int
    """Logged batches averaged into one point of a curve."""
    unit: str
    x: Float[np.ndarray, " points"]
    """Tokens or steps of each point of a curve."""
    at: Float[np.ndarray, " evaluations"]
    """The same of each held-out evaluation."""


def training_figures(training: list[dict[str, Any]], heldout: list[dict[str, Any]]) -> tuple[list[Figure], str]:
    """Draw FVE of both models, L0, loss and dead fraction against tokens, and the sentence that holds for all of
    them."""
    if not training and not heldout:
        return [], ""
    log = place(training, heldout)
    fve = np.concatenate([column(rows, f"fve_{model}") for rows in (training, heldout) for model in ("base", "tuned")])
    below = int((fve < 0).sum())
    fve_axis = {"range": [-0.02, 1.02]} if below else {}
    fve_words = f"{number(below)} logged values below 0 are off the axis." if below else ""
    dead_words = "Line: latents not active for dead_after_tokens in training."
    dead_words += " Diamonds: latents not active on any held-out token." if heldout else ""
    two = [("fve_base", "base", BASE), ("fve_tuned", "tuned", TUNED)]
    from_zero = {"rangemode": "tozero"}
    figures = [
        Figure("fve", "Fraction of variance explained", fve_words, curves(log, two, fve_axis)),
        Figure("l0", "Active latents per token (L0)", "", curves(log, [("l0", "L0", "#6a6fb5")], from_zero)),
        Figure("loss", "Training loss", "", curves(log, [("loss", "loss", "#5c7f67")], loss_axis(training))),
        Figure("dead", "Dead fraction", dead_words, curves(log, [("dead", "dead", "#a3745a")], from_zero)),
    ]
    sentence = f"{number(len(training))} logged training batches, "
    sentence += "one point each" if log.per_point == 1 else f"each point is the mean of {log.per_point} of them"
    if heldout:
        n = sorted({entry["n_tokens"] for entry in heldout if entry.get("n_tokens") is not None})
        n_words = f"n = {' or '.join(map(number, n))} tokens each" if n else "n not recorded"
        sentence += f"; diamonds: {counted(len(heldout), 'evaluation')} on held-out tokens ({n_words})"
        sentence += ". Lines use the training gate, diamonds the inference gate"
    return figures, f"{sentence}."


def place(training: list[dict[str, Any]], heldout: list[dict[str, Any]]) -> Log:
    """Return the tokens seen where the log has them, else steps; an evaluation stands at the tokens of its step."""
    tokens, step, tested = column(training, "tokens"), column(training, "step"), column(heldout, "step")
    known = ~np.isnan(tokens)
    per_point = max(1, -(-len(training) // MAX_CURVE_POINTS))
    if not known.any():
        return Log(training, heldout, per_point, "steps", thin(step, per_point), tested)
    at = np.interp(tested, step[known], tokens[known])
    return Log(training, heldout, per_point, "tokens", thin(tokens, per_point), at)


def curves(log: Log, keys: list[tuple[str, str, str]], yaxis: dict[str, Any]) -> dict[str, Any]:
    """Draw one line for each (key, label, colour), and a diamond for each held-out evaluation."""
    traces: list[dict[str, Any]] = []
    for key, label, colour in keys:
        line, points = thin(column(log.training, key), log.per_point), column(log.heldout, key)
        if not np.isnan(line).all():
            style = {"color": colour, "width": 1.6}
            traces.append({"mode": "lines", "name": label, "x": rounded(log.x), "y": rounded(line), "line": style})
        if not np.isnan(points).all():
            marker = {"color": colour, "symbol": "diamond", "size": 8}
            name = f"{label}, held out"
            traces.append(
                {"mode": "markers", "name": name, "x": rounded(log.at), "y": rounded(points), "marker": marker}
            )
    xaxis = {"title": {"text": log.unit}, "rangemode": "tozero"}
    return spec(
        [{"type": "scatter", **trace} for trace in traces], height=250, xaxis=xaxis, yaxis={"nticks": 6, **yaxis}
    )


def column(entries: list[dict[str, Any]], key: str) -> Float[np.ndarray, " entries"]:
    values = [entry.get(key) for entry in entries]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def thin(values: Float[np.ndarray, " entries"], per_point: int) -> Float[np.ndarray, " points"]:
    """Return the means of `per_point` neighbours; NaN where all of them are."""
    padded = np.concatenate([values, np.full(-len(values) % per_point, np.nan)]).reshape(-1, per_point)
    n = (~np.isnan(padded)).sum(axis=1)
    return np.where(n > 0, np.nansum(padded, axis=1) / np.maximum(n, 1), np.nan)


def loss_axis(training: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a log axis with ticks at 1, 2 and 5 times powers of ten, where all losses are positive."""
    loss = column(training, "loss")
    loss = loss[~np.isnan(loss)]
    if not len(loss) or loss.min() <= 0:
        return {}
    powers = range(int(np.floor(np.log10(loss.min()))), int(np.ceil(np.log10(loss.max()))) + 1)
    ticks = [float(f"{step}e{power}") for power in powers for step in ((1, 2, 5) if len(powers) <= 4 else (1,))]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
