"""What decomposing the LoRA organism gives, for one seed: clusters against behaviours, and sets removed and added.

    pieces.clusters.*, cluster.<behaviour>.*      the cluster of each behaviour: size, importance there and elsewhere
    <basis>.{without,alone}_<behaviour>.<n>.*     rates with its first n pieces off, or alone on the base

Bases at equal count: the pieces, singular pieces, raw LoRA directions, a random rotation of the singular pieces.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.decompose.matrix import Questions, best_clusters, orders, without_and_alone
from benchmarks.decompose.organism import BEHAVIOURS, ORDINARY, OrganismConfig, behaviours, make, ordinary_questions
from crosscoders.common.checks import config_of
from crosscoders.text.settings import DataSource
from diffing.decomposition import baselines
from diffing.decomposition.build import fresh
from diffing.decomposition.curves import Chosen, by_site
from diffing.decomposition.evaluation import attacked, explained
from diffing.decomposition.language import LanguageTask, deltas_of, kept, problem_of
from diffing.decomposition.loop import train
from diffing.decomposition.model import Decomposition
from diffing.decomposition.readouts import read_importances
from diffing.decomposition.settings import DecomposeSettings, DecompositionConfig
from diffing.decomposition.sites import Delta
from diffing.demo import document_file, model_folder
from diffing.topk_lora.distil import Setting, open_setting

Values = dict[str, tuple[float | None, str]]
RANK, N_QUESTIONS, SIZES = 4, 12, (8, 32)
"""Rank of the LoRA; questions of each kind; pieces that are removed or added for a behaviour."""


def settings_of(folder: Path, seed: int) -> DecomposeSettings:
    """Return how the organism is decomposed: 500 steps of 8 documents, a fifth of them raw text, without adversary."""
    data: list[list[str | DataSource]] = [
        [DataSource(path=str(folder / f"chats_{split}.jsonl"), weight=0.8),
         DataSource(path=str(document_file(f"raw_{split}")), weight=0.2, group="raw")]
        for split in ("train", "heldout")
    ]  # fmt: skip
    return DecomposeSettings(
        base=str(model_folder("base")), tuned=str(folder), data=data[0], eval_data=data[1], n_tokens=60_000,
        holdout_share=0.05, batch_rows=8, components=2 * RANK, steps=500, adversarial=0.0,
        stochastic=1.0, out=str(folder / "run"), seed=seed, device="cpu",
    )  # fmt: skip


def decomposed_organism(
    work: Path, seed: int, run: str, **changes: Any
) -> tuple[Setting, dict[str, Delta], Decomposition]:
    """Make one organism and decompose it in a folder of that name inside its own; `changes`: of the settings."""
    folder = make(work / f"organism-seed-{seed}", OrganismConfig(rank=RANK, seed=seed))
    settings = replace(settings_of(folder, seed), **changes)
    setting, config = open_setting(settings), config_of(DecompositionConfig, settings)
    deltas = deltas_of(setting.base, setting.tuned, settings.sites)
    decomposition = fresh(setting.tuned, deltas, config, is_relative=True)
    train(problem_of(setting, decomposition, seed), config, folder / run)
    return setting, deltas, decomposition


def other_bases(setting: Setting, deltas: dict[str, Delta], seed: int) -> dict[str, Decomposition]:
    """Return the same changes in singular pieces, raw LoRA directions and a rotation."""
    pieces = {
        "svd": baselines.svd(deltas),
        "lora": baselines.lora(setting.tuned, list(deltas)),
        "rotation": baselines.rotation(deltas, seed),
    }
    return {name: baselines.with_pieces(setting.tuned, deltas, basis) for name, basis in pieces.items()}


def organism_run(work: Path, seed: int, **changes: Any) -> Values:
    """Make, decompose and measure one organism; `changes`: of the settings."""
    setting, deltas, decomposition = decomposed_organism(work, seed, "run", **changes)
    questions = Questions.of(setting, behaviours(seed, N_QUESTIONS), ordinary_questions(seed, N_QUESTIONS))
    values = explained_values(setting, decomposition)
    for word, on in (("tuned", 1.0), ("base", 0.0)):
        with decomposition.masked(decomposition.constant(on, on)):
            values |= _rates(word, questions.rates(decomposition.model))
    values |= cluster_values(setting, decomposition, questions)
    for name, basis in {"pieces": decomposition, **other_bases(setting, deltas, seed)}.items():
        ranked = orders(setting, basis, (*BEHAVIOURS, ORDINARY), is_weighted=basis is decomposition)
        for size in SIZES:
            for label in BEHAVIOURS:
                values |= dict(_matrix(basis, questions, by_site(ranked[label][:size]), name, f"{label}.{size}"))
    return values


def explained_values(setting: Setting, decomposition: Decomposition) -> Values:
    """Return what there is to explain, what is left, pieces alive and on, and the adversary's plateau."""
    measured = explained(decomposition, LanguageTask(), setting.held_out)
    path = attacked(decomposition, LanguageTask(), setting.held_out[0], measured.reference, steps=80)
    n_pieces = sum(site.n_components for site in decomposition.sites.values())
    return {
        "kl": (kept(setting, decomposition).explainable, "nats/token to explain"),
        "alive": (float(sum(map(len, measured.alive().values()))), f"pieces of {n_pieces}"),
        "l0": (measured.l0, "pieces per token"),
        **{f"unexplained.{k}": (v, "share of the KL to explain") for k, v in measured.unexplained.items()},
        "adversary": (path[20], "share, 20 steps of a fresh adversary"),
        "adversary_80": (path[80], "share, 80 steps"),
    }


def cluster_values(setting: Setting, decomposition: Decomposition, questions: Questions) -> Values:
    """Return how far the cluster of each behaviour is its own, and what it does."""
    alive = explained(decomposition, LanguageTask(), setting.held_out).alive()
    reading = read_importances(setting, decomposition, alive)
    of_document = [setting.rows.group_names[group] for group in setting.rows.groups]
    label_of = [of_document[document] for document in reading.documents]
    values: Values = {}
    for label, cluster in best_clusters(reading, BEHAVIOURS, label_of).items():
        values[f"cluster.{label}.size"] = (float(len(cluster.pieces)), "pieces")
        values[f"cluster.{label}.own"] = (cluster.own, "mean importance on its dialogues")
        values[f"cluster.{label}.other"] = (cluster.other, "mean importance on others, the largest")
        values |= dict(_matrix(decomposition, questions, by_site(cluster.pieces), "cluster", label))
    return values


def _matrix(
    basis: Decomposition, questions: Questions, chosen: Chosen, name: str, label: str
) -> Iterator[tuple[str, tuple[float | None, str]]]:
    for word, rates in without_and_alone(basis, questions, chosen).items():
        yield from _rates(f"{name}.{word}_{label}", rates).items()


def _rates(name: str, rates: dict[str, float]) -> Values:
    return {f"{name}.{label}": (share, "share of replies") for label, share in rates.items()}
