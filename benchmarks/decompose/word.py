"""Whether a piece of an attention site finds the word that brings a planted reply, for one seed of the organism.

Only the attention maps of the LoRA are decomposed, all others stay tuned. On every second held-out document the piece
is chosen whose importance is above .5 at the word and nowhere else (F1 of precision, the share of its tokens inside the
word, and recall, the share of words with one of its tokens); the figures are of the other documents.

    pieces     importances above .5             null    the same, words moved to random places of their documents
    svd, lora, rotation    |v . x| times the norm of u, above the threshold that is best on the first half
    without.*  KL that the four best pieces cause when they are off, on dialogues with the word and on others, as a
               share of the KL to explain there; random.*: mean of DRAWS sets of four
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from benchmarks.decompose.matrix import batches_where
from benchmarks.decompose.organism_run import Values, decomposed_organism, other_bases
from benchmarks.organisms.texts import TRIGGER
from diffing.decomposition.curves import by_site, masks_with
from diffing.decomposition.evaluation import distance_of, explained
from diffing.decomposition.language import LanguageTask, kept
from diffing.decomposition.model import Decomposition
from diffing.decomposition.readouts import NEEDED, Reading, read_importances
from diffing.topk_lora.distil import Setting

SITES, N_PIECES, DRAWS = ["*.self_attn.*"], 4, 8

Words = Int[np.ndarray, " tokens"]
"""Number of the word that each token lies in, from 1; 0 outside."""


def word_run(work: Path, seed: int) -> Values:
    """Decompose the attention of one organism and look for the word."""
    setting, deltas, decomposition = decomposed_organism(work, seed, "attention", sites=SITES, holdout_share=0.3)
    measured = explained(decomposition, LanguageTask(), setting.held_out)
    reading = read_importances(setting, decomposition, measured.alive())
    words = words_of(reading, setting.tokenizer, TRIGGER)
    first = reading.documents % 2 == 0
    generator = np.random.default_rng(seed)
    on = reading.importances > NEEDED
    order = np.argsort([-f1(*precision_recall(column[first], words[first])) for column in on.T], kind="stable")
    best = on[:, order[0]]
    precision, recall = precision_recall(best[~first], words[~first])
    moved = moved_words(words, reading.documents, generator)
    null = max(on.T, key=lambda column: f1(*precision_recall(column[first], moved[first])))
    values: Values = {
        "kl": (kept(setting, decomposition).explainable, "nats/token to explain"),
        "unexplained": (measured.unexplained["rounded"], "share, rounded importances as masks"),
        "words": (float(len(np.unique(words[~first])) - 1), "words in the second half"),
        "pieces.precision": (precision, "share of its tokens inside the word"),
        "pieces.recall": (recall, "share of the words with one of them"),
        "pieces.f1": (f1(precision, recall), "F1"),
        "null.f1": (f1(*precision_recall(null[~first], moved[~first])), "F1"),
    }
    for name, basis in other_bases(setting, deltas, seed).items():
        numbers = {site: list(range(of.n_components)) for site, of in basis.sites.items()}
        sizes = np.abs(read_importances(setting, basis, numbers).activations)
        values[f"{name}.f1"] = (thresholded(sizes, words, first), "F1")
    return values | _effects(setting, decomposition, reading.pieces, order, generator)


def words_of(reading: Reading, tokenizer: Any, word: str) -> Words:
    """Return where a word stands, at the start of a text or after a space."""
    words, n = np.zeros(len(reading.ids), dtype=np.int64), 0
    for text in (word, f" {word}"):
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
        for start in range(len(words) - len(ids) + 1):
            span = slice(start, start + len(ids))
            if (reading.ids[span] == ids).all() and len(set(reading.documents[span])) == 1:
                n += 1
                words[span] = n
    return words


def moved_words(words: Words, documents: Int[np.ndarray, " tokens"], generator: np.random.Generator) -> Words:
    """Return each document's words turned by a random number of tokens within it."""
    moved = words.copy()
    for document in np.unique(documents):
        at = np.flatnonzero(documents == document)
        moved[at] = np.roll(words[at], generator.integers(1, len(at)))
    return moved


def precision_recall(on: Bool[np.ndarray, " tokens"], words: Words) -> tuple[float, float]:
    """Return the share of the tokens that are on inside a word, and of the words with one of them."""
    n_words = len(np.unique(words[words > 0]))
    if not on.any() or not n_words:
        return 0.0, 0.0
    return float((words[on] > 0).mean()), len(np.unique(words[on & (words > 0)])) / n_words


def f1(precision: float, recall: float) -> float:
    """Return the harmonic mean, 0 for two zeros."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def thresholded(sizes: Float[np.ndarray, "tokens pieces"], words: Words, first: Bool[np.ndarray, " tokens"]) -> float:
    """Return F1 on the second half of the direction and threshold that are best on the first, of 50 quantiles."""
    quantiles = 1 - np.geomspace(1 / len(sizes), 0.1, 50)
    scored = (
        (f1(*precision_recall(column[first] > cut, words[first])), number, cut)
        for number, column in enumerate(sizes.T)
        for cut in np.quantile(column[first], quantiles)
    )
    _, number, cut = max(scored)
    return f1(*precision_recall(sizes[~first, number] > cut, words[~first]))


def _effects(
    setting: Setting,
    decomposition: Decomposition,
    pieces: list[tuple[str, int]],
    order: Int[np.ndarray, " pieces"],
    generator: np.random.Generator,
) -> Values:
    labels = np.array(setting.rows.group_names)[setting.rows.groups]
    random = [generator.choice(len(pieces), N_PIECES, replace=False) for _ in range(DRAWS)]
    sets = [by_site([pieces[i] for i in numbers]) for numbers in (order[:N_PIECES], *random)]
    values: Values = {}
    for word, is_here in (("word", labels == "trigger"), ("others", labels != "trigger")):
        batches = batches_where(setting, is_here)
        masks = [decomposition.constant(0, 0), *(masks_with(decomposition, chosen, on=False) for chosen in sets)]
        reference, *kls = (distance_of(decomposition, LanguageTask(), batches, of) for of in masks)
        values[f"without.{word}"] = (kls[0] / reference, "share of the KL to explain")
        values[f"random.{word}"] = (sum(kls[1:]) / DRAWS / reference, "the same, random pieces")
    return values
