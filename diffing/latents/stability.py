r"""Which latents come back when the same crosscoder is trained again: runs matched latent by latent.

    match      of latent j in another run: the alive latent k of largest cosine of [d_base; d_tuned], each latent's two
               decoders end to end in training space
    survival   share of latents whose match has a cosine of at least 0.7
    same       share of latents whose match has that cosine and the same verdict

Of each latent of the first run: in how many of the others it came back, and with the same verdict (`returns`). Over all
ordered pairs of runs, by verdict and for the first 32 by rank. The control matches against the other run with
its coordinates permuted: what chance alone gives. Source: ours; the cosine of 0.7 as in Paulo and Belrose 2025 (arXiv
2501.16615). Reading order: `matches`, `stability`, `returns`.
"""

from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
import torch
from jaxtyping import Float, Int

from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.records import Record
from crosscoders.common.results import row
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.formats.load import load_crosscoder
from crosscoders.formats.ours import trained_on
from crosscoders.models.names import identity
from diffing.latents.decoder_norms import joint_directions
from diffing.latents.table import read_table
from diffing.latents.verdict import VERDICTS, alive_latents

COSINE, TOP = 0.7, 32
FORMAT_VERSION = 1


class TrainedRun(NamedTuple):
    """A finished run with its latent table."""

    crosscoder: Crosscoder
    table: pandas.DataFrame


class Matches(NamedTuple):
    """For each alive latent of one run its nearest alive latent of another."""

    latents: Int[np.ndarray, " alive"]
    partners: Int[np.ndarray, " alive"]
    cosine: Float[np.ndarray, " alive"]


def read_runs(folders: list[str]) -> list[TrainedRun]:
    """Return runs on one pair and hook point.

    Raises:
        InputError: fewer than two, one named twice, or runs on different pairs or of different width.
    """
    if len({Path(folder).resolve() for folder in folders}) < max(2, len(folders)):
        raise InputError(f"stability needs two or more different runs; it got {', '.join(folders) or 'none'}.")
    runs = [TrainedRun(load_crosscoder(folder), read_table(Path(folder))) for folder in folders]
    first = _source(folders[0]) | {"d_model": runs[0].crosscoder.b_dec.shape[1]}
    for folder, run in zip(folders, runs, strict=True):
        now = _source(folder) | {"d_model": run.crosscoder.b_dec.shape[1]}
        for key, value in first.items():
            if now[key] != value:
                raise InputError(f"run {folder!r} has another {key} than {folders[0]!r}. Compare runs of one pair.")
    return runs


def _source(folder: str) -> dict[str, Any]:
    cache = trained_on(Path(folder))
    return {key: identity(cache.get(key)) for key in ("hook_point", "base", "tuned")}


def matches(run: TrainedRun, other: TrainedRun, *, permute: int | None = None) -> Matches:
    """Return nearest latents; `permute`: seed of a permutation of the other run's coordinates, for the control."""
    latents, candidates = alive_latents(run.table), alive_latents(other.table)
    mine = joint_directions(run.crosscoder, latents)
    theirs = joint_directions(other.crosscoder, candidates)
    if permute is not None:
        order = torch.randperm(theirs.shape[1] // 2, generator=torch.Generator().manual_seed(permute))
        theirs = torch.cat([half[:, order] for half in theirs.chunk(2, dim=1)], dim=1)
    best = [(chunk @ theirs.T).max(dim=1) for chunk in mine.split(4096)]
    cosine, nearest = (torch.cat([maxima[i] for maxima in best]).numpy() for i in (0, 1))
    return Matches(latents, candidates[nearest], cosine)


def stability(runs: list[TrainedRun], *, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows stability.<verdict>.{survival,same}, .top_32.*, .all.*, and .control.survival; n counts latents over
    all ordered pairs of runs, and `_least` is the smallest share among these pairs."""
    hits: dict[str, list[tuple[int, int, int]]] = {}
    for i, j in permutations(range(len(runs)), 2):
        matched = matches(runs[i], runs[j])
        survives = matched.cosine >= COSINE
        verdict, partner = (run.table["verdict"].to_numpy() for run in (runs[i], runs[j]))
        same = survives & (verdict[matched.latents] == partner[matched.partners])
        groups = {word: verdict[matched.latents] == word for word in VERDICTS}
        groups[f"top_{TOP}"] = runs[i].table["rank"].to_numpy()[matched.latents] <= TOP
        groups["all"] = np.full(len(matched.latents), True)
        for name, inside in groups.items():
            if inside.any():
                counted = (int(survives[inside].sum()), int(same[inside].sum()), int(inside.sum()))
                hits.setdefault(name, []).append(counted)
        control = matches(runs[i], runs[j], permute=seed).cosine >= COSINE
        hits.setdefault("control", []).append((int(control.sum()), 0, len(control)))
    rows = []
    for name, counts in hits.items():
        n = sum(count[2] for count in counts)
        for k, what in enumerate(("survival",) if name == "control" else ("survival", "same")):
            shares = [count[k] / count[2] for count in counts]
            value = sum(count[k] for count in counts) / n
            rows.append(row(f"stability.{name}.{what}", value, "fraction", n))
            rows.append(row(f"stability.{name}.{what}_least", min(shares), "fraction", len(shares)))
    return rows


class Returns(Record):
    """stability.json: how often each alive latent of a run came back in other runs."""

    version = FORMAT_VERSION
    again = "run diffing stability again"
    format_version: int
    runs: list[str]
    """The others."""
    table_hash: str
    """Of the run's latents.json."""
    latents: list[int]
    came_back: list[int]
    same_verdict: list[int]


def returns(runs: list[TrainedRun]) -> pandas.DataFrame:
    """Return for each alive latent of the first run (index) in how many of the others its match has a cosine of 0.7 or
    more (`came_back`), and in how many that one has the same verdict too (`same_verdict`)."""
    first = runs[0]
    latents = alive_latents(first.table)
    verdict = first.table["verdict"].to_numpy()
    came_back, same = np.zeros((2, len(latents)), dtype=np.int64)
    for other in runs[1:]:
        matched = matches(first, other)
        survives = matched.cosine >= COSINE
        came_back += survives
        same += survives & (verdict[latents] == other.table["verdict"].to_numpy()[matched.partners])
    return pandas.DataFrame({"came_back": came_back, "same_verdict": same}, index=latents)


def write_returns(folders: list[str], table: pandas.DataFrame) -> Path:
    """Write `returns` to stability.json of the first run."""
    path = Path(folders[0]) / "stability.json"
    files.write_json(
        path,
        {
            "format_version": FORMAT_VERSION,
            "runs": folders[1:],
            "table_hash": files.hash_file(Path(folders[0]) / "latents.json"),
            "latents": table.index.tolist(),
            "came_back": table["came_back"].tolist(),
            "same_verdict": table["same_verdict"].tolist(),
        },
    )
    return path


def read_returns(run: Path) -> pandas.DataFrame | None:
    """Return what `write_returns` wrote of a run; None where there is nothing of its table as it is now."""
    path = run / "stability.json"
    if not path.is_file():
        return None
    recorded = files.read_model(path, Returns)
    if recorded["table_hash"] != files.hash_file(run / "latents.json"):
        return None
    columns = {name: recorded[name] for name in ("came_back", "same_verdict")}
    table = pandas.DataFrame(columns, index=recorded["latents"])
    table.attrs["n_runs"] = len(recorded["runs"])
    return table
