"""What is reported of one crosscoder, by row name without its prefix: (value or None where undefined, unit)."""

import math

import pandas

from benchmarks.planted.runs import Run
from benchmarks.planted.scores import SCORES, Score, alive_rows, judge, weak

COMPOSED = ("norm", "published_verdict", "without_siblings", "verdict", "verdict_or_leaning")
"""Scores whose flagged latents are counted by what they match."""

RIGHT_VERDICTS = {
    "shared": {"shared"},
    "tuned-only": {"tuned-specific"},
    "base-only": {"base-specific"},
    "rotated": {"rotated", "decoupled"},
    "rescaled": {"shared", "shrunk", "decoupled"},
    "split": {"shared", "rotated", "decoupled", "split"},
    "recomposed": {"rotated", "decoupled"},
    "divided": {"rotated", "decoupled", "split", "shared"},
}
"""Verdicts that are right for the best latent of a feature, by class; rescaled from gain 0.2 on."""

KINDS = ("tuned-only", "rescaled", "split", "recomposed", "divided", "rotated", "shared", "unmatched", "weak")

GAIN_ESTIMATES = {"gain_error": "error", "norm_gain_error": "norm", "activation_gain_error": "activation_no_bias"}

Summary = dict[str, tuple[float | None, str]]


def summarise(run: Run) -> Summary:
    """Return all measures of one crosscoder."""
    measures: Summary = {}
    n_tuned_only = int((run.truth.table["class"] == "tuned-only").sum())
    for name, score in SCORES.items():
        for measure, value in judge(run.table, score, n_tuned_only).items():
            measures[f"{name}.{measure}"] = (None if math.isnan(value) else value, "fraction")
    latents = alive_rows(run.table)
    for name in COMPOSED:
        measures |= composition(name, SCORES[name], latents)
    measures |= verdicts_by_class(run.truth.table, latents)
    measures |= gain_errors(latents)
    measures["features.missed"] = (float(len(run.truth.table) - len(best_latents(latents))), "features")
    measures["latents.alive"] = (float(len(latents)), "latents")
    measures["latents.unmatched"] = (float((latents["class"] == "unmatched").sum()), "latents")
    measures["l0"] = (run.evaluation.l0, "latents/token")
    for model, fve in zip(("base", "tuned"), run.evaluation.fve, strict=True):
        measures[f"fve.{model}"] = (fve, "fraction")
    return measures


def composition(name: str, score: Score, latents: pandas.DataFrame) -> Summary:
    """Return what the flagged latents match, as counts, and precision when gains below 0.2 ("weak") count as wrong."""
    flagged = latents[score.value(latents) >= score.bound]
    kinds = flagged["class"].where(~weak(flagged), "weak")
    measures: Summary = {f"{name}.flagged.{kind}": (float((kinds == kind).sum()), "latents") for kind in KINDS}
    precision = float((kinds == "tuned-only").mean()) if len(flagged) else None
    return {**measures, f"{name}.precision_with_weak": (precision, "fraction")}


def verdicts_by_class(features: pandas.DataFrame, latents: pandas.DataFrame) -> Summary:
    """Return the share of the features of a class whose best latent has a right verdict; missed features count as
    wrong."""
    verdict = best_latents(latents).set_index("feature")["verdict"].reindex(features.index)
    measures: Summary = {}
    for name, right in RIGHT_VERDICTS.items():
        planted = (features["class"] == name) & ~weak(features)
        child = features["parent"] >= 0
        for suffix, chosen in (("", planted), (".child", planted & child), (".orphan", planted & ~child)):
            if chosen.any() and (not suffix or name == "tuned-only"):
                measures[f"verdict.recall.{name}{suffix}"] = (float(verdict[chosen].isin(right).mean()), "fraction")
    return measures


def gain_errors(latents: pandas.DataFrame) -> Summary:
    """Return the median absolute error of the gain of rescaled features, by their best latents, in the units of x.

    The first three rows of an estimate are over gains from 0.2 on, and `.held` too, which compares with the gain of
    what the latent holds; the others are by gain.
    """
    best = best_latents(latents[latents["class"] == "rescaled"])
    strong = ~weak(best)
    measures: Summary = {}
    for name, column in GAIN_ESTIMATES.items():
        error = (best[f"gain_by_{column}"] - best["gain"]).abs()
        parts = {"": strong, ".child": strong & best["child"], ".orphan": strong & ~best["child"]}
        if name != "activation_gain_error":
            parts |= {f".{gain:g}": best["gain"] == gain for gain in sorted(best["gain"].unique())}
        for suffix, chosen in parts.items():
            if chosen.any():
                measures[name + suffix] = (float(error[chosen].median()), "gain")
        if strong.any():
            of_held = (best[f"gain_by_{column}"] - best["held_gain"]).abs()[strong]
            measures[f"{name}.held"] = (float(of_held.median()), "gain")
    return measures


def best_latents(table: pandas.DataFrame) -> pandas.DataFrame:
    """Return the latent of largest correlation of each feature that has one."""
    matched = table[table["feature"] >= 0]
    return matched.loc[matched.groupby("feature")["correlation"].idxmax()]
