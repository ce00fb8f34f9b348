"""Rows, table and words about a decomposed fine-tune."""

from typing import Any, NamedTuple

import pandas
import torch

from crosscoders.common.progress import Progress
from crosscoders.common.results import legend, row
from diffing.decomposition import baselines
from diffing.decomposition.curves import Point, by_site, curve, ranked, robust, written
from diffing.decomposition.evaluation import Explained, attacked, explained, reference_of
from diffing.decomposition.language import Kept, LanguageTask
from diffing.decomposition.loop import generator_of
from diffing.decomposition.model import Decomposition
from diffing.decomposition.readouts import Reading, moments, read_effects, read_importances, read_pieces
from diffing.decomposition.settings import DecomposeSettings
from diffing.decomposition.similarity import chosen_pieces, clusters, similarity
from diffing.decomposition.sites import Delta
from diffing.topk_lora.distil import Setting

SIZES = (1, 4, 16, 64, 256)
CURVE_BATCHES, EFFECT_BATCHES = 4, 8
"""Held-out batches that curves and effects are measured on."""
PLATEAU = 4
"""Steps of the adversary over those asked for, at which its plateau is looked for."""


class Report(NamedTuple):
    """What `diffing decompose` says."""

    rows: list[dict[str, Any]]
    table: pandas.DataFrame
    pieces: list[dict[str, Any]]
    """The first pieces with their effects."""
    kept: Kept
    curves: dict[str, list[Point]]


def report(
    setting: Setting,
    decomposition: Decomposition,
    deltas: dict[str, Delta],
    of_rest: Kept,
    others: list[Decomposition],
    settings: DecomposeSettings,
) -> Report:
    """Read everything on the held-out documents."""
    task, batches = LanguageTask(), setting.held_out
    measured = explained(decomposition, task, batches)
    alive = measured.alive()
    reading = read_importances(setting, decomposition, alive)
    table = read_pieces(setting, decomposition, measured, reading)
    if len(table):
        numbers = dict(zip(reading.pieces, clusters(reading.importances).tolist(), strict=True))
        table["cluster"] = [numbers[site, piece] for site, piece in zip(table["site"], table["piece"], strict=True)]
    first = (
        [(str(site), int(piece)) for site, piece in zip(table["site"], table["piece"], strict=True)]
        if len(table)
        else []
    )
    first = first[: settings.top]
    effects = read_effects(setting, decomposition, first, batches[:EFFECT_BATCHES])
    pieces = [
        {str(key): value for key, value in entry.items()} | effect._asdict()
        for entry, effect in zip(table.head(settings.top).to_dict("records"), effects, strict=True)
    ]
    of_curves = all_curves(setting, decomposition, deltas, measured)
    rows = [
        *_rows_of(measured, of_rest, reading, table),
        *_attack_rows(decomposition, setting, measured, settings.attack_steps),
    ]
    rows += [entry for name, points in of_curves.items() for entry in curve_rows(name, points, measured.n_positions)]
    rows += _robust_rows(setting, decomposition, measured, settings.attack_steps)
    own = chosen_pieces(baselines.trained(decomposition), alive)
    for number, other in enumerate(others):
        theirs = chosen_pieces(baselines.trained(other), explained(other, task, batches).alive())
        found = similarity(own, theirs)
        rows.append(row(f"decompose.similarity.{number}", found.cosine, "cosine", found.n_pieces))
        rows.append(row(f"decompose.similarity.{number}.null", found.null, "cosine", found.n_pieces))
    return Report(rows, table, pieces, of_rest, of_curves)


def all_curves(
    setting: Setting, decomposition: Decomposition, deltas: dict[str, Delta], measured: Explained
) -> dict[str, list[Point]]:
    """Return the curves of the pieces and of the baselines, each ranked by what its pieces write."""
    task, batches = LanguageTask(), setting.held_out
    reference = reference_of(decomposition, task, batches[:CURVE_BATCHES])
    bases = {
        "svd": baselines.svd(deltas), "weighted_svd": baselines.weighted_svd(deltas, moments(setting, decomposition)),
        "rotation": baselines.rotation(deltas, 0), "lora": baselines.lora(setting.tuned, list(deltas)),
    }  # fmt: skip
    found = {}
    progress = Progress("curves", total=1 + len(bases), unit="basis")
    for name, pieces in {"pieces": None, **bases}.items():
        if pieces is None:
            one, weights = decomposition, measured.mean
        elif set(pieces) == set(deltas):
            one, weights = baselines.with_pieces(setting.tuned, deltas, pieces), None
            one = one.to(next(setting.tuned.parameters()).device)
        else:
            progress.update(1)
            continue
        order = ranked(written(one, task, batches, weights))
        sizes = [size for size in SIZES if size < len(order)] + [len(order)]
        found[name] = curve(one, task, batches[:CURVE_BATCHES], order, sizes, reference)
        progress.update(1)
    progress.close()
    return found


def curve_rows(name: str, points: list[Point], n: int) -> list[dict[str, Any]]:
    """Return the rows of one basis."""
    return [
        row(f"decompose.{kind}.{name}.{point.n_pieces}", getattr(point, kind), "share of the KL to explain", n)
        for point in points
        for kind in ("sufficiency", "necessity")
    ]


def _rows_of(measured: Explained, of_rest: Kept, reading: Reading, table: pandas.DataFrame) -> list[dict[str, Any]]:
    n, n_pieces = measured.n_positions, sum(len(of_site) for of_site in measured.highest.values())
    rows = [row(f"decompose.kl.{name}", value, "nats/token", n) for name, value in of_rest._asdict().items()]
    rows.append(row("decompose.alive", len(reading.pieces), "pieces", n_pieces))
    rows.append(row("decompose.l0", measured.l0, "pieces per token", n))
    rows += [row(f"decompose.unexplained.{name}", v, "share of the KL to explain", n)
             for name, v in measured.unexplained.items()]  # fmt: skip
    if len(table):
        by_site = table.groupby("site")["energy"].sum()
        rows.append(row("decompose.energy", float(by_site.mean()), "share of ||D||^2, mean over sites", len(by_site)))
        rows.append(row("decompose.clusters", int(table["cluster"].nunique()), "clusters", len(table)))
    return rows


def _attack_rows(
    decomposition: Decomposition, setting: Setting, measured: Explained, steps: int
) -> list[dict[str, Any]]:
    batch, most = setting.held_out[0], PLATEAU * steps
    losses = attacked(decomposition, LanguageTask(), batch, measured.reference, steps=most)
    n = int(batch.attention_mask.sum())
    return [
        row(f"decompose.adversary.{done}", losses[done], "share of the KL to explain", n) for done in (0, steps, most)
    ]


def _robust_rows(
    setting: Setting, decomposition: Decomposition, measured: Explained, steps: int
) -> list[dict[str, Any]]:
    """Return what all pieces and half of them protect, beside random sets of that size."""
    task, batch = LanguageTask(), setting.held_out[0]
    order = ranked(written(decomposition, task, setting.held_out, measured.mean))
    half = max(1, sum(map(len, measured.alive().values())) // 2)
    drawn = torch.randperm(len(order), generator=generator_of(0, 0))[:half].tolist()
    sets = {"pieces": order[:half], "random": [order[i] for i in drawn]}
    rows = []
    for name, chosen in sets.items():
        shares = robust(decomposition, task, batch, by_site(chosen), measured.reference, steps=steps)
        rows.append(row(f"decompose.robust.{name}.{half}", shares[-1], "share protected", measured.n_positions))
    return rows


def summary(read: Report) -> str:
    """Say the figures and the first pieces in words."""
    value = {entry["name"].removeprefix("decompose."): entry["value"] for entry in read.rows}
    lines = [
        "",
        f"{value['alive']:.0f} pieces are alive, {value['l0']:.2f} on a token; without the remainder "
        f"{value['unexplained.pieces']:.1%} of the KL to explain is left, with importances as masks "
        f"{value['unexplained.importances']:.1%}, rounded {value['unexplained.rounded']:.1%}; after adversary steps: "
        + ", ".join(f"{n.removeprefix('adversary.')} {v:.1%}" for n, v in value.items() if n.startswith("adversary.")),
        "",
        "Share of the KL to explain that the first n pieces give on the base (and that is lost without them):",
    ]
    for name, points in read.curves.items():
        shares = "  ".join(f"{p.n_pieces}: {p.sufficiency:.2f} ({p.necessity:.2f})" for p in points)
        lines.append(f"  {name:<13} {shares}")
    header = "  on tokens  cluster  KL without it: needed, idle  mostly in"
    lines += ["", "The pieces that write most:", header]
    for piece in read.pieces:
        lines.append(
            f"  {piece['rate']:>9.1%}  {piece['cluster']:>7}  {piece['kl_needed']:>12.3f}, {piece['kl_idle']:.4f}  "
            f"{piece['main_label_share']:>8.0%} {piece['main_label']}  {piece['context']}  raises "
            f"{' '.join(map(repr, piece['raised'][:3]))}  [{piece['site']} {piece['piece']}]"
        )
    meanings = {
        "on tokens": "share on which it is on", "cluster": "of pieces that are on together",
        "KL without it: needed, idle": "nats/token, where it is on and where it is off",
        "mostly in": "share and label of documents, strongest >>token<<, tokens that it raises, [map number]",
    }  # fmt: skip
    return "\n".join([*lines, *legend(header, meanings)])
