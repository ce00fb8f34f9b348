"""What a run knows of one latent: its row of the table, why it has its verdict, where it fires, what it causes.

`read_evidence` reads the files of a run once, `latent_page` puts together what they say of a latent.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
from jaxtyping import Float

from crosscoders.activations.cache import ActivationCache
from crosscoders.common import files
from crosscoders.common.records import Record
from crosscoders.dictionary.crosscoder import Crosscoder
from diffing.causal.patching import DIRECTIONS
from diffing.causal.sets import orders
from diffing.interpretation.command import InterpretationRecord
from diffing.latents.contexts import ChosenLatents, examples
from diffing.latents.decoder_norms import decoder_difference
from diffing.latents.nulls import read_nulls
from diffing.latents.table import read_table
from diffing.report.causes import read_causal
from diffing.report.data import Run, finite, read_run
from diffing.report.definitions import definitions
from diffing.report.nulls import beyond

HISTOGRAM_TOKENS = 1 << 15
"""Tokens at the start of the cache from which histograms are made, and examples where the run has none."""
N_BINS = 40
N_EXAMPLES = 8
CONTEXT = 12
"""Tokens before the peak of an example that stand for a latent in a list."""


class Evidence(NamedTuple):
    """The files of a run."""

    run: Run
    """Tables, examples, nulls and causal results, checked."""
    table: pandas.DataFrame
    row_of: dict[int, int]
    """Latent -> its row in the columns of `run.latents`."""
    interpreted: dict[str, Any]
    """Latent as text -> its entry of interpretation.json; empty where that is of another table."""
    positions: dict[str, Any]
    """positions.json: `places`, and `shares` by latent as text."""
    chosen: list[int]
    """Latents of the set `chosen` of causal.json."""


def read_evidence(path: Path) -> Evidence:
    """Read what a run folder says of its latents.

    Raises:
        InputError: it has no latent table, or a file of it lacks something.
        CorruptData: a file cannot be read.
    """
    run = read_run(path)._replace(nulls=read_nulls(path), causal=read_causal(path))
    interpreted: dict[str, Any] = {}
    if (path / "interpretation.json").is_file():
        described = files.read_model(path / "interpretation.json", InterpretationRecord)
        if described["table"] == files.hash_file(path / "latents.json"):
            interpreted = described["latents"]
    positions = _object(path / "positions.json")
    chosen = _object(path / "causal.json").get("config", {}).get("latents") or []
    row_of = {int(latent): row for row, latent in enumerate(run.latents.columns["latent"])}
    return Evidence(run, read_table(path), row_of, interpreted, positions, chosen)


def _object(path: Path) -> dict[str, Any]:
    return files.read_model(path, Record) if path.is_file() else {}


def latent_page(
    evidence: Evidence, crosscoder: Crosscoder, cache: ActivationCache, tokenizer: Any, latent: int
) -> dict[str, Any]:
    """Return the entries of `Session.latent` that need no model."""
    latents = evidence.run.latents
    values = {name: column[evidence.row_of[latent]] for name, column in latents.columns.items()}
    n_tokens = min(HISTOGRAM_TOKENS, len(cache))
    listed = evidence.run.examples.get(latent)
    shown = (
        [example._asdict() for example in listed]
        if listed is not None
        else examples(crosscoder, cache, [latent], tokenizer, n_examples=N_EXAMPLES, n_tokens=n_tokens)[str(latent)]
    )
    return {
        "latent": latent,
        "values": values,
        "verdict": {"word": values["verdict"], "meaning": dict(definitions(latents)[1])[values["verdict"]]},
        "why": _why(values, latents.thresholds),
        "name": evidence.interpreted.get(str(latent), {}).get("name"),
        "predictors": evidence.interpreted.get(str(latent), {}).get("predictors", []),
        "examples": shown,
        "histogram": _histogram(crosscoder, cache, latent, n_tokens),
        "places": _places(evidence.positions, latent),
        "sets": _sets(evidence, crosscoder, latent),
        "beyond_null": beyond(evidence.run, latent),
    }


def _why(values: dict[str, Any], thresholds: dict[str, float]) -> list[dict[str, Any]]:
    """Return the numbers that decide a verdict, each with its standard error and the bounds it is compared with; the
    ratios are those of the side to which the norm leans."""
    suffix = "" if (values["relative_decoder_norm"] or 0.0) >= 0.5 else "_mirror"
    bounds = {
        "n_active": ["min_active"],
        "relative_decoder_norm": ["base_only", "base_leaning", "tuned_leaning", "tuned_only"],
        "decoder_cosine": ["rotated_cosine"],
        f"nu_error{suffix}": ["nu_error"],
        f"nu_reconstruction{suffix}": ["nu_reconstruction"],
        "partner_correlation": ["partner_correlation"],
    }
    return [
        {
            "name": name,
            "value": values.get(name),
            "stderr": values.get(f"{name}_stderr"),
            "bounds": {bound: thresholds[bound] for bound in named},
        }
        for name, named in bounds.items()
    ]


def _histogram(crosscoder: Crosscoder, cache: ActivationCache, latent: int, n_tokens: int) -> dict[str, Any]:
    encode = ChosenLatents(crosscoder, [latent]).encode
    parts = [encode(tokens.activations)[:, 0].numpy() for tokens in cache.batches(4096, 0, n_tokens)]
    return histogram_of(np.concatenate(parts), n_tokens)


def histogram_of(values: Float[np.ndarray, " tokens"], n_tokens: int) -> dict[str, Any]:
    """Return counts of the activations above 0 on the first tokens of a cache."""
    values = values[values > 0]
    counts, edges = np.histogram(values, bins=N_BINS, range=(0.0, float(values.max(initial=0.0)) or 1.0))
    return {
        "counts": counts.tolist(),
        "edges": [round(float(edge), 5) for edge in edges],
        "n_active": len(values),
        "n_tokens": n_tokens,
    }


def _places(positions: dict[str, Any], latent: int) -> list[list[Any]]:
    """Return (place, share of the activation there) around and in a response."""
    shares = positions.get("shares", {}).get(str(latent))
    return [] if shares is None else [list(pair) for pair in zip(positions["places"], shares, strict=True)]


def _sets(evidence: Evidence, crosscoder: Crosscoder, latent: int) -> list[dict[str, Any]]:
    """Return the sets of causal.json that hold the latent, with the share of the KL that each closes."""
    if not evidence.run.causal:
        return []
    difference = decoder_difference(crosscoder).cpu().numpy()
    sets = []
    for direction, entry in evidence.run.causal.items():
        ordered = orders(evidence.table, DIRECTIONS[direction], difference)
        for patched in entry["sets"]:
            first, _, score = patched.name.partition(".")
            if first == "chosen":
                members = evidence.chosen
            elif first.startswith("top_") and score in ordered:
                members = ordered[score][: int(first.removeprefix("top_"))].tolist()
            else:
                continue
            if latent in members and patched.share is not None:
                share = {key: patched.share.get(key) for key in ("value", "low", "high", "n")}
                sets.append({"direction": direction, "set": patched.name, "n_latents": len(members), **share})
    return finite(sets)


def peak_of(listed: list[dict[str, Any]]) -> list[str]:
    """Return the tokens before the peak of the strongest example, the peak, and those after it, as three texts."""
    if not listed:
        return []
    tokens, peak = listed[0]["tokens"], listed[0]["peak"]
    return ["".join(tokens[max(0, peak - CONTEXT) : peak]), tokens[peak], "".join(tokens[peak + 1 : peak + 5])]
