"""`diffing topk-lora sets`, as a function of its settings that returns a JSON object."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crosscoders.common import files
from crosscoders.common.checks import to_dict
from crosscoders.common.errors import InputError
from crosscoders.common.progress import say
from crosscoders.common.results import legend, result, row, say_closing
from crosscoders.models.pair import inspect_pair, load_pair
from crosscoders.text.settings import DataConfig, DataSource
from diffing.topk_lora.command import ADAPTER, RUN, read_config
from diffing.topk_lora.curves import Point, curves
from diffing.topk_lora.prompts import Prompts, read_prompts, with_replies
from diffing.topk_lora.sets import KEPT, LEFT, Audit, Directions, audit, find_set, matched
from diffing.topk_lora.settings import TopKSetsSettings
from sae_lora.lora.topk import TopKLoRA


class Found(NamedTuple):
    """What the search gave for one behaviour."""

    label: str
    directions: list[tuple[str, int]] | None
    """None: no set of the size that was asked for."""
    audit: Audit | None
    random: list[Audit]
    curves: list[Point]


def find_sets(settings: TopKSetsSettings) -> dict[str, Any]:
    """Run `diffing topk-lora sets`."""
    started, out = time.perf_counter(), Path(settings.run)
    if not (out / RUN).is_file():
        raise InputError(f"{out} holds no TopKLoRA: there is no {RUN}. Run diffing topk-lora fit first.")
    config = read_config(out, settings.device)
    info = inspect_pair(config.base, config.tuned, ["blocks.0.hook_resid_post"])
    search = read_prompts(_sources(settings.prompts), info.tokenizer, per_label=settings.per_label)
    other = read_prompts(_sources(settings.audit), info.tokenizer, per_label=settings.audit_per_label)
    for label in settings.labels or []:
        if label not in search[1] or label not in other[1]:
            raise InputError(f"no prompt has the label {label!r}; there are {', '.join(sorted(set(search[1])))}.")
    pair = load_pair(config.base, config.tuned, "blocks.0.hook_resid_post", device=config.device, info=info, whole=True)
    model = pair.models[0]
    adapter = TopKLoRA.load(model, out / ADAPTER)
    prompts, held_out = (with_replies(model, *read) for read in (search, other))
    generator = np.random.default_rng(settings.seed)
    found = [
        search_one(
            model, Directions(adapter), prompts, held_out, label, settings.max_directions, settings.draws, generator
        )
        for label in settings.labels or sorted(set(prompts.labels))
    ]
    entries = [entry for one in found for entry in set_rows(one)]
    sets = {one.label: one.directions for one in found}
    files.write_json(out / "sets.json", {"rows": entries, "sets": sets, "config": to_dict(settings)})
    say_closing(started, f"{len(found)} searches, in {out / 'sets.json'}")
    return result("topk-lora sets", to_dict(settings), entries) | {"sets": sets, "text": summary(found, settings)}


def _sources(data: str | list[str | DataSource]) -> list[DataSource]:
    return DataConfig(data=data, n_tokens=1).sources()


def search_one(
    model: Any, directions: Directions, prompts: Prompts, held_out: Prompts, label: str, max_directions: int,
    n_draws: int, generator: np.random.Generator,
) -> Found:  # fmt: skip
    """Look for the set of one behaviour, audit it, and audit random sets that write as much."""
    say(f"search the directions behind {label}")
    points = curves(model, directions, prompts, held_out, label, n_draws=n_draws, seed=int(generator.integers(2**31)))
    ablated = find_set(model, directions, prompts, label, max_directions=max_directions)
    if ablated is None:
        return Found(label, None, None, [], points)
    mass = directions.mass(model, prompts.take(prompts.of(label)))
    random = [audit(model, directions, matched(ablated, mass, generator), held_out, label) for _ in range(n_draws)]
    names = directions.names()
    own = audit(model, directions, ablated, held_out, label)
    return Found(label, [names[i] for i in ablated], own, random, points)


def set_rows(found: Found) -> list[dict[str, Any]]:
    """Return the rows of one behaviour; none but the count where no set was found."""
    name = f"topk-lora.{found.label}"
    rows = [curve_row(name, point) for point in found.curves]
    if found.directions is None or found.audit is None:
        return [*rows, row(f"{name}.has_set", 0.0, "whether a set was found", 1)]
    rows += [
        row(f"{name}.has_set", 1.0, "whether a set was found", 1),
        row(f"{name}.directions", len(found.directions), "directions", 1),
        row(
            f"{name}.left_after_ablation", found.audit.left, "share of prompts", found.audit.n, 0, found.audit.left_high
        ),
        row(f"{name}.others_kept", found.audit.kept, f"smallest share of prompts ({found.audit.kept_label})", 1),
    ]
    if found.random:
        left, kept = ([getattr(one, field) for one in found.random] for field in ("left", "kept"))
        rows.append(row(f"{name}.random.left", float(np.mean(left)), "share", len(left), min(left), max(left)))
        rows.append(row(f"{name}.random.others_kept", float(np.mean(kept)), "share", len(kept), min(kept), max(kept)))
    return rows


def curve_row(name: str, point: Point) -> dict[str, Any]:
    """Return the row of one size; its interval is 1.96 standard errors of the paired difference to random sets."""
    low, high = (point.share + sign * 1.96 * point.stderr for sign in (-1, 1))
    whole = f"{name}.{point.curve}.{point.n_directions}"
    return row(whole, point.share, "share of prompts", point.n_prompts, low, high) | {"random": point.random}


def summary(found: list[Found], settings: TopKSetsSettings) -> str:
    """Say the sets in words."""
    lines = ["", f"Sets without which at most {LEFT:.0%} of a behaviour is left, every direction needed for that:"]
    header = "  behaviour       directions  left (95% up to)   others kept, worst       random sets: left, kept"
    lines.append(header)
    for one in found:
        if one.directions is None or one.audit is None:
            lines.append(f"  {one.label:<14}  none of <= {settings.max_directions} directions")
            continue
        worst = f"{one.audit.kept:.2f} {one.audit.kept_label}"
        random = f"{np.mean([a.left for a in one.random]):.2f}, {np.mean([a.kept for a in one.random]):.2f}"
        verdict = "" if one.audit.left <= LEFT and one.audit.kept >= KEPT else "   (not selective)"
        lines.append(
            f"  {one.label:<14}  {len(one.directions):>10}  {one.audit.left:.2f} ({one.audit.left_high:.2f}) of "
            f"{one.audit.n:<4}  {worst:<22}  {random}{verdict}"
        )
    meanings = {
        "behaviour": "label of its prompts",
        "directions": "in the set",
        "left (95% up to)": "share of the prompts, of n, that still show it without the set, and the interval's end",
        "others kept, worst": "least share of another behaviour that is left, and which",
        "random sets: left, kept": f"means of sets as large, {settings.draws} drawn",
    }
    return "\n".join([*lines, *legend(header, meanings)])
