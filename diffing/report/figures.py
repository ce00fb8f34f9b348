"""Plotly figures of latents, binned so that a page stays small at any dictionary size; `curves` has those of training.

Reading order: `spec`, `norm_figure`, `cosine_figure`, `nu_figure`. Each figure comes with the sentence that
says its n and what is left out. Figures hold numbers and our own words only, never text from a file.
"""

from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float

from diffing.latents.decoder_norms import NORM_CLASSES
from diffing.report.data import Latents
from diffing.report.text import amount, counted, number

MAX_SCATTER_POINTS = 5_000
BEST_POINTS = 500
NU_RANGE = (-0.1, 1.5)
GREY = "#8a8a8a"
BASE, TUNED = "#2f86c9", "#d55e00"
CLASS_COLOURS = {"base-only": BASE, "shared": "#8f8f8f", "tuned-only": TUNED, "other": "#b79f5a"}
# Okabe and Ito's colours, lightened where they would vanish on a dark page, and a symbol each for the colour-blind.
VERDICT_STYLES = {
    "tuned-specific": (TUNED, "star"),
    "base-specific": (BASE, "diamond"),
    "tuned-leaning": (TUNED, "star-open"),
    "base-leaning": (BASE, "diamond-open"),
    "split": ("#cc79a7", "cross"),
    "rotated": ("#cc79a7", "circle"),
    "shrunk": ("#e69f00", "triangle-down"),
    "decoupled": ("#009e73", "square"),
    "shared": ("#8f8f8f", "circle-open"),
    "undetermined": ("#9aa7b5", "x-thin-open"),
}


class Figure(NamedTuple):
    """A figure with its words."""

    name: str
    """Fixed id in the page."""
    title: str
    caption: str
    spec: dict[str, Any]
    """Plotly data and layout."""


def spec(traces: list[dict[str, Any]], **layout: Any) -> dict[str, Any]:
    """Return data and layout as plain data, after Plotly's own check of both."""
    axis = {
        "gridcolor": "rgba(138,138,138,.25)",
        "zeroline": False,
        "linecolor": GREY,
        "ticks": "outside",
        "tickcolor": GREY,
        "automargin": True,
    }
    whole = {
        "template": go.layout.Template(),
        "height": 300,
        "margin": {"l": 48, "r": 12, "t": 34, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "dragmode": False,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        **layout,
    }
    whole["xaxis"] = axis | whole.get("xaxis", {})
    whole["yaxis"] = axis | whole.get("yaxis", {})
    plain: dict[str, Any] = go.Figure(data=traces, layout=whole).to_plotly_json()
    plain["layout"].pop("template")
    return plain


def rounded(values: Float[np.ndarray, " values"]) -> list[float | None]:
    """Round to four significant digits; None for NaN."""
    return [None if np.isnan(value) else float(f"{value:.4g}") for value in values]


def line_at(axis: str, value: float) -> dict[str, Any]:
    """Draw a dotted line across the figure at one value of an axis."""
    other = "y" if axis == "x" else "x"
    ends = {f"{axis}0": value, f"{axis}1": value, f"{other}0": 0, f"{other}1": 1, f"{other}ref": "paper"}
    return {"type": "line", "line": {"color": GREY, "width": 1, "dash": "dot"}, **ends}


# ----------------------------------------------------------------------------------------------------------- decoders


def norm_figure(latents: Latents) -> Figure:
    """Draw a histogram of the relative decoder norm over alive latents, a colour for each norm class."""
    value = latents.numbers("relative_decoder_norm")
    drawn = latents.alive & ~np.isnan(value)
    low, high = latents.thresholds["base_only"], latents.thresholds["tuned_only"]
    traces, words = [], []
    for name in NORM_CLASSES:
        chosen = drawn & latents.is_word("norm_class", name)
        words.append(f"{number(int(chosen.sum()))} {name}")
        traces.append(bars(value[chosen], (0.0, 1.0), f"{name} ({number(int(chosen.sum()))})", CLASS_COLOURS[name]))
    xaxis = {"title": {"text": "relative decoder norm (0 base, 1 tuned)"}, "range": [0, 1], "dtick": 0.1}
    yaxis, lines = log_axis(value[drawn], (0.0, 1.0)), [line_at("x", at) for at in (low, 0.4, 0.6, high)]
    shown = spec(traces, barmode="stack", bargap=0.04, shapes=lines, xaxis=xaxis, yaxis=yaxis)
    caption = (
        f"n = {number(int(drawn.sum()))} alive latents in 50 bins, counts on a log axis: {', '.join(words)}. Dotted "
        f"lines: base-only up to {low:g}, shared from 0.4 to 0.6, tuned-only from {high:g}. {left_out(latents, drawn)}"
    )
    return Figure("decoder-norm", "Relative decoder norm", caption, shown)


def cosine_figure(latents: Latents) -> Figure:
    """Draw a histogram of the cosine between the two decoders over alive latents."""
    value, limit = latents.numbers("decoder_cosine"), latents.thresholds["rotated_cosine"]
    drawn = latents.alive & ~np.isnan(value)
    below = int((value[drawn] < limit).sum())
    xaxis = {"title": {"text": "cosine of base decoder and tuned decoder"}, "range": [-1, 1], "dtick": 0.25}
    traces, yaxis = [bars(value[drawn], (-1.0, 1.0), "latents", "#7d88c4")], log_axis(value[drawn], (-1.0, 1.0))
    shown = spec(traces, bargap=0.04, showlegend=False, shapes=[line_at("x", limit)], xaxis=xaxis, yaxis=yaxis)
    caption = (
        f"n = {number(int(drawn.sum()))} alive latents in 50 bins, counts on a log axis: {number(below)} below "
        f"{limit:g} (dotted line), where the two models write in different directions. {left_out(latents, drawn)}"
    )
    return Figure("decoder-cosine", "Decoder cosine", caption, shown)


def left_out(latents: Latents, drawn: Bool[np.ndarray, " latents"]) -> str:
    others = int((~latents.alive).sum())
    undefined = int((latents.alive & ~drawn).sum())
    more = f", and {number(undefined)} where it is undefined" if undefined else ""
    bound = latents.thresholds["min_active"]
    return f"Left out: {number(others)} not alive (active on fewer than {bound:g} tokens){more}."


def bars(values: Float[np.ndarray, " values"], ends: tuple[float, float], name: str, colour: str) -> dict[str, Any]:
    counts, edges = np.histogram(np.clip(values, *ends), bins=50, range=ends)  # a cosine may round to above 1
    some = counts > 0  # an empty bin has no place on a log axis
    return {
        "type": "bar",
        "name": name,
        "x": rounded((edges[:-1] + edges[1:])[some] / 2) or [None],  # with None a class of 0 stands in the legend too
        "y": counts[some].tolist() or [None],
        "width": (ends[1] - ends[0]) / 50,
        "marker": {"color": colour},
        "showlegend": True,
        "hovertemplate": "%{x}: %{y} latents<extra></extra>",
    }


def log_axis(values: Float[np.ndarray, " values"], ends: tuple[float, float]) -> dict[str, Any]:
    """Return a log axis from half a latent, so that a bin of one latent has height, to above the highest bin."""
    highest = max(1, int(np.histogram(values, bins=50, range=ends)[0].max()))
    ticks = [step * 10**power for power in range(7) for step in ((1, 2, 5) if highest < 100 else (1,))]
    ends_of_axis = [np.log10(0.5), np.log10(highest) + 0.15]
    return {"type": "log", "title": {"text": "latents"}, "range": ends_of_axis, "tickvals": ticks}


# ------------------------------------------------------------------------------------------------------------- ratios


def nu_figure(latents: Latents) -> Figure:
    """Draw nu_error against nu_reconstruction, a point for each alive latent, or a heat map where there are too
    many."""
    error, reconstruction = latents.numbers("nu_error"), latents.numbers("nu_reconstruction")
    drawn = latents.alive & ~np.isnan(error) & ~np.isnan(reconstruction)
    low, high = NU_RANGE
    outside = int((drawn & ((error < low) | (error > high) | (reconstruction < low) | (reconstruction > high))).sum())
    x, y = np.clip(error, low, high), np.clip(reconstruction, low, high)
    chosen, traces, words = drawn, [], ""
    if drawn.sum() > MAX_SCATTER_POINTS:
        best = [i for i in latents.order if drawn[i]][:BEST_POINTS]
        chosen = np.zeros_like(drawn)
        chosen[best] = True
        traces.append(heatmap(x[drawn], y[drawn]))
        words = f" Shading counts all of them in 64 x 64 cells (log scale); points are the {len(best)} best-ranked."
    for verdict in VERDICT_STYLES:
        picked = chosen & latents.is_word("verdict", verdict)
        if picked.any():
            traces.append(points(latents, x, y, verdict, picked))
    limits = latents.thresholds["nu_error"], latents.thresholds["nu_reconstruction"]
    axis = {"range": [low - 0.05, high + 0.05], "dtick": 0.2, "tick0": 0}
    xaxis, yaxis = axis | {"title": {"text": "nu_error"}}, axis | {"title": {"text": "nu_reconstruction"}}
    lines = [line_at("x", limits[0]), line_at("y", limits[1])]
    shown = spec(traces, height=520, hovermode="closest", shapes=lines, xaxis=xaxis, yaxis=yaxis)
    caption = (
        f"n = {counted(int(drawn.sum()), 'alive latent')}.{words} Outside {low} to {high}, and drawn on its border: "
        f"{number(outside)}. Dotted lines: the thresholds {limits[0]:g} and {limits[1]:g}. Low on both axes: "
        "the base model lacks the tuned decoder's direction, because the concept is new or because it is rotated. "
        f"{left_out(latents, drawn)}"
    )
    return Figure("nu", "nu_error against nu_reconstruction", caption, shown)


def points(
    latents: Latents,
    x: Float[np.ndarray, " latents"],
    y: Float[np.ndarray, " latents"],
    verdict: str,
    chosen: Bool[np.ndarray, " latents"],
) -> dict[str, Any]:
    colour, symbol = VERDICT_STYLES[verdict]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"{verdict} ({number(int(chosen.sum()))})",
        "x": rounded(x[chosen]),
        "y": rounded(y[chosen]),
        "text": [f"latent {latents.columns['latent'][i]}" for i in np.flatnonzero(chosen)],
        "marker": {
            "color": colour,
            "symbol": symbol,
            "size": 8,
            "opacity": 0.85,
            "line": {"width": 1.2, "color": colour},
        },
        "hovertemplate": f"%{{text}}, {verdict}<br>nu_error %{{x}}<br>nu_reconstruction %{{y}}<extra></extra>",
    }


def heatmap(x: Float[np.ndarray, " kept"], y: Float[np.ndarray, " kept"]) -> dict[str, Any]:
    counts, edges, _ = np.histogram2d(x, y, bins=64, range=[NU_RANGE, NU_RANGE])
    centres = rounded((edges[:-1] + edges[1:]) / 2)
    shade = np.where(counts > 0, np.log10(np.maximum(counts, 1)) + 0.3, np.nan).T
    powers = range(int(np.ceil(np.log10(max(counts.max(), 1)))) + 1)
    ticks = {"tickvals": [power + 0.3 for power in powers], "ticktext": [amount(10**power) for power in powers]}
    return {
        "type": "heatmap",
        "x": centres,
        "y": centres,
        "z": [rounded(row) for row in shade],
        "zmin": 0,
        "colorscale": [[0, "rgba(90,115,185,.08)"], [1, "rgba(90,115,185,.95)"]],
        "hoverinfo": "skip",
        "colorbar": {"title": {"text": "latents"}, "thickness": 10, "len": 0.5, "outlinewidth": 0, **ticks},
    }
