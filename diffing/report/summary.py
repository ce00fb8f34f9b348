"""The numbers of a run that page and JSON share: headline measures, counts, and the sentence that states them.

Reading order: `measures`, `count_rows`, `result_rows`, then the words: `headline`, `class_sentence`.
"""

from typing import Any, NamedTuple

from crosscoders.activations.outliers import MULTIPLE, TOP
from diffing.latents.decoder_norms import NORM_CLASSES
from diffing.latents.readable import reasons
from diffing.latents.verdict import VERDICTS
from diffing.report.data import Run, is_number
from diffing.report.text import amount, counted, model_name, number

MEASURES = {
    "fve.base": "fraction", "fve.tuned": "fraction", "l0": "latents/token", "dead": "fraction",
    "fve_rest.base": "fraction", "fve_rest.tuned": "fraction",
}  # fmt: skip


class Measure(NamedTuple):
    """A mean over tokens."""

    value: float | None
    n: int | None
    """Tokens averaged over."""
    low: float | None
    high: float | None
    source: str
    """Where it was read, in words."""


def measures(run: Run) -> dict[str, Measure]:
    """Return FVE, L0 and dead fraction: of eval.json, else the last held-out evaluation, else the last training
    batch."""
    rows = {row["name"]: row for row in run.evaluation}
    measured: dict[str, Measure] = {}
    for name in MEASURES:
        key, row = name.replace(".", "_"), rows.get(f"eval.{name}")
        if row and row.get("value") is not None:
            measured[name] = Measure(row["value"], row.get("n"), row.get("low"), row.get("high"), "held-out tokens")
        elif run.heldout and run.heldout[-1].get(key) is not None:
            last = run.heldout[-1]
            measured[name] = Measure(last[key], last.get("n_tokens"), None, None, "held-out tokens")
        elif run.training and run.training[-1].get(key) is not None:
            n = run.look("config", "batch_size")
            measured[name] = Measure(run.training[-1][key], n, None, None, "tokens of the last training batch")
    return measured


def verdict_counts(run: Run) -> dict[str, int]:
    return {word: int(run.latents.is_word("verdict", word).sum()) for word in VERDICTS}


def class_counts(run: Run) -> dict[str, int]:
    """Count the alive latents in each norm class."""
    return {word: int((run.latents.is_word("norm_class", word) & run.latents.alive).sum()) for word in NORM_CLASSES}


def result_rows(run: Run) -> list[dict[str, Any]]:
    """Return the rows of report.json. n counts all latents, alive latents for norm classes, or tokens."""
    alive, everything = int(run.latents.alive.sum()), len(run.latents)
    counts = {"alive": alive}
    counts |= {f"verdict.{word}": count for word, count in verdict_counts(run).items()}
    counts |= {f"norm_class.{word}": count for word, count in class_counts(run).items()}
    rows: list[dict[str, Any]] = [
        {"name": f"report.{name}.count", "value": count, "unit": "latents",
         "n": alive if name.startswith("norm_class") else everything, "low": None, "high": None}
        for name, count in counts.items()
    ]  # fmt: skip
    for name, measure in measures(run).items():
        value, n, low, high, _ = measure
        rows.append(
            {"name": f"report.{name}", "value": value, "unit": MEASURES[name], "n": n, "low": low, "high": high}
        )
    return rows


def pair_names(run: Run) -> tuple[str, str]:
    """Return the names of base and tuned model; of a local folder only the last part, the whole stands in the
    inputs."""
    names = [run.look("inputs", "cache", model, "name") for model in ("base", "tuned")]
    base, tuned = (model_name(name or side) for name, side in zip(names, ("base", "tuned"), strict=True))
    return base, tuned


def dict_size(run: Run) -> int:
    size = run.look("config", "crosscoder", "dict_size")
    return size if isinstance(size, int) else len(run.latents)


def headline(run: Run) -> str:
    """Say what was compared, with which dictionary, and how well it fits, in one sentence."""
    base, tuned = pair_names(run)
    hook_point = run.look("inputs", "cache", "hook_point")
    trained = run.training[-1].get("tokens") if run.training else None
    where = f" at {hook_point}" if hook_point else ""
    length = f" trained on {amount(trained)} tokens" if trained else ""
    known = run.look("inputs", "cache", "base", "name") is not None
    pair = f"{base} (base) against {tuned} (tuned)" if known else "The base model against the tuned model"
    words = f"{pair}{where}: a crosscoder of {number(dict_size(run))} latents{length}"
    measured = measures(run)
    fits = []
    if "l0" in measured:
        fits.append(f"has {measured['l0'].value:.1f} active latents per token (L0)")
    if "fve.base" in measured and "fve.tuned" in measured:
        fve = measured["fve.base"].value, measured["fve.tuned"].value
        fits.append(f"explains {fve[0]:.3f} of the base model's and {fve[1]:.3f} of the tuned model's variance (FVE)")
    if not fits:
        return f"{words}."
    measure = measured.get("fve.base", next(iter(measured.values())))
    n = f" (n = {number(measure.n)})" if measure.n is not None else ""
    return f"{words}; on {measure.source}{n} it {' and '.join(fits)}."


def outlier_sentence(run: Run) -> str:
    """Say how much of the variance a few tokens of the cache hold, and what is explained of the others; empty where
    neither is known."""
    shares = [run.look("inputs", "cache", f"{name}_share") for name in ("top", "outlying")]
    heldout = measures(run)
    sentences = []
    if all(isinstance(share, list) and len(share) == 2 and all(map(is_number, share)) for share in shares):
        top, outlying = ([f"{value:.1%}" for value in share] for share in shares)
        sentences.append(
            f"Of the variance of base and tuned model in the cache, {top[0]} and {top[1]} lie in the {TOP:.1%} of "
            f"tokens of largest norm, {outlying[0]} and {outlying[1]} in those beyond {MULTIPLE:g} times the median."
        )
    if "fve_rest.base" in heldout and "fve_rest.tuned" in heldout:
        rest = heldout["fve_rest.base"].value, heldout["fve_rest.tuned"].value
        sentences.append(f"On held-out tokens of ordinary norm the FVE is {rest[0]:.3f} and {rest[1]:.3f}.")
    return " ".join(sentences)


def count_sentence(run: Run) -> str:
    n, alive, n_tokens = len(run.latents), int(run.latents.alive.sum()), run.latents.n_tokens
    return f"Verdicts on {counted(n, 'latent')}, {number(alive)} of them alive, from {number(n_tokens)} tokens:"


def reasons_against(run: Run) -> list[str]:
    """Return what speaks against reading this dictionary; empty where nothing does."""
    k, columns = run.look("config", "crosscoder", "k"), run.latents.columns
    return reasons(
        evaluation=run.evaluation,
        training=run.training[-1] if run.training else {},
        k=k if isinstance(k, int) else None,
        n_active=columns["n_active"],
        frequency=columns["frequency"],
    )


def folded_sentence(run: Run) -> str:
    """Say how many groups of documents have no column of their own; empty where each has one."""
    n = run.latents.n_folded_groups
    return f"{counted(n, 'group')} of documents, the smaller ones, are counted together as share_other." if n else ""


def refused_sentence(run: Run) -> str:
    """Say how many rows of the data were left out and why; empty where none was, or where that is not known."""
    refused = run.look("inputs", "cache", "refused")
    if not isinstance(refused, dict) or not refused:
        return ""
    listed = ", ".join(f"{number(count)} {reason}" for reason, count in refused.items() if isinstance(count, int))
    return f"Rows of the data that could not be read and were left out: {listed}."


def class_sentence(run: Run) -> str:
    """Say what the published class, tuned-only by decoder norm, holds in this run."""
    count = class_counts(run)["tuned-only"]
    alive, limit = counted(int(run.latents.alive.sum()), "alive latent"), run.latents.thresholds["tuned_only"]
    published = f"The published class of tuned-only latents (relative decoder norm above {limit:g})"
    if count:
        return f"{published} holds {number(count)} of {alive}."
    words = ("tuned-specific", "tuned-leaning", "split", "rotated")
    own = [counted(n, f"{word} latent") for word in words if (n := verdict_counts(run)[word])]
    if not own:
        return f"{published} is empty (0 of {alive}), and no latent is rotated either."
    return (
        f"{published} is empty (0 of {alive}). Concepts that the tuned model writes in its own way appear as "
        f"{' and '.join(own)} instead: both decoder norms are alive, and the decoder cosine is near 0."
    )
