r"""The published comparison of L1 and BatchTopK on a base model and its chat fine-tune, with nulls, over seeds.

On the embedded pair: crosscoders of both variants at one L0 (the L1 coefficient is searched on seed 0 until its
held-out L0 is within 5% of that of BatchTopK), three seeds each, and the same on the two embedded null pairs. On your
own pair, `--runs l1=RUN batchtopk=RUN ...` takes scaled run folders (several of one variant: its seeds) and `--cache`
the held-out cache whose chats are measured on; false-positive rates then come from null.json of each variant's first
run, where `diffing null` made one.

A row is a mean over seeds with its 95% interval (Student's t over seeds, null for one), n the seeds on which it is
defined. False-positive rates and `stability` rows count latents instead. Intervals do not cover the choice of chats.
Published figures stand as notes of their rows. `quick`: one seed, 64 chats.
"""

from pathlib import Path
from typing import Any

from benchmarks.chat_pair.published import note
from benchmarks.chat_pair.runs import NULLS, VARIANTS, held_out, measured_rows, prepare
from benchmarks.chat_pair.summary import (
    SIGNED,
    Summary,
    calibrated_rates,
    causal,
    counts,
    false_positive_rates,
    judged,
    judged_run,
    null_rates,
    ratios,
)
from benchmarks.planted import over_seeds
from crosscoders.activations.cache import ActivationCache
from crosscoders.common.errors import InputError
from crosscoders.common.results import row
from crosscoders.training.feed import require_same_source
from diffing.latents.stability import read_runs, stability
from diffing.latents.table import read_table

N_SEEDS = 3
N_CHATS, QUICK_CHATS = 512, 64
Runs = dict[str, list[Path]]
"""Run folders by variant."""


def run(quick: bool, work: Path, runs: tuple[str, ...] = (), cache: str | None = None) -> dict[str, Any]:
    """Return rows `chat-pair.<variant>.*`; `work`: folder in which finished crosscoders are kept.

    Raises:
        InputError: `runs` without `cache` or the other way round, an unknown variant, a run that was not scaled.
    """
    if bool(runs) != (cache is not None):
        raise InputError("chat-pair needs both --runs VARIANT=RUN ... and --cache HELDOUT, or neither of them.")
    nulls: dict[str, Runs] = {}
    if cache is not None:
        chosen, opened = runs_by_variant(runs), ActivationCache(cache)
    else:
        prepared = prepare(work, seeds=range(1 if quick else N_SEEDS))
        chosen, nulls = prepared["tuned"], {null: prepared[null] for null in NULLS}
        opened = ActivationCache(work / "tuned" / "cache-heldout")
    for folder in (folder for folders in chosen.values() for folder in folders):
        require_same_source(folder, opened)
    rows: list[dict[str, Any]] = []
    for variant, folders in chosen.items():
        n_chats = QUICK_CHATS if quick else N_CHATS
        rows += variant_rows(variant, folders, [nulls[null][variant] for null in nulls], opened, n_chats)
    rows += matching(rows)
    left_out = {}
    for variant, folders in chosen.items():
        if not any(entry["name"].startswith(f"chat-pair.{variant}.") and "positive" in entry["name"] for entry in rows):
            left_out[f"{variant}.false_positive_rate"] = f"{folders[0]} has no null.json"
        if len(folders) < 2:
            left_out[f"{variant}.stability"] = "one run only"
    return {"name": "chat-pair", "rows": [with_note(entry) for entry in rows], "left_out": left_out}


def runs_by_variant(runs: tuple[str, ...]) -> Runs:
    """Run folders by variant from VARIANT=RUN.

    Raises:
        InputError: there is no such variant or no such folder.
    """
    folders: Runs = {}
    for pair in runs:
        variant, _, folder = pair.partition("=")
        if variant not in VARIANTS or not Path(folder).is_dir():
            raise InputError(f"--runs {pair!r} is not VARIANT=RUN with a run folder, VARIANT {' or '.join(VARIANTS)}.")
        folders.setdefault(variant, []).append(Path(folder))
    return folders


def variant_rows(
    variant: str, folders: list[Path], nulls: list[list[Path]], opened: ActivationCache, n_chats: int
) -> list[dict[str, Any]]:
    """Return all rows of one variant."""
    start = f"chat-pair.{variant}"
    rows = over_seeds(start, [summarise(folder, opened, n_chats) for folder in folders], signed=SIGNED)
    judged_nulls = {
        null: [judged_run(folder) for folder in of_null] for null, of_null in zip(NULLS, nulls, strict=False)
    }
    extra = false_positive_rates(judged_nulls) or calibrated_rates(folders[0])
    if judged_nulls:
        extra += null_rates([judged_run(folder) for folder in folders], judged_nulls)
    if len(folders) > 1:
        trained = read_runs([str(folder) for folder in folders])
        extra += stability([each._replace(table=judged(each.table)) for each in trained])
    return rows + [entry | {"name": f"{start}.{entry['name']}"} for entry in extra]


def summarise(folder: Path, opened: ActivationCache, n_chats: int) -> Summary:
    """Return all measures of one crosscoder."""
    units = {"l0": "latents/token"}
    quality: Summary = {name: (value, units.get(name, "fraction")) for name, value in held_out(folder).items()}
    table = judged(read_table(folder))
    measured = measured_rows(folder, opened, n_chats)
    sizes: Summary = {
        "chats": (measured[0]["value"], "documents"),
        "response_tokens": (float(measured[1]["n"]), "tokens"),
    }
    return quality | counts(table) | ratios(table) | sizes | causal(measured)


def matching(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return L0 of L1 over that of BatchTopK, mean over seeds by mean over seeds."""
    l0 = {entry["name"]: entry for entry in rows if entry["name"].endswith(".l0")}
    pair = [l0.get(f"chat-pair.{variant}.l0") for variant in VARIANTS]
    if pair[0] is None or pair[1] is None:
        return []
    return [row("chat-pair.l0_ratio", pair[0]["value"] / pair[1]["value"], "ratio", min(p["n"] for p in pair if p))]


def with_note(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the row, with the published figure where there is one."""
    words = note(entry["name"].removeprefix("chat-pair."))
    return entry | ({"note": words} if words else {})
