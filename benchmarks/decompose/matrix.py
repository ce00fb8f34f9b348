"""What sets of pieces do to each planted behaviour: replies with a set off, and with it alone on the base.

`Questions.rates` reads behaviours by the phrases of greedy replies; ordinary questions by how many replies stay those
of the tuned model. `best_clusters` says which cluster belongs to which behaviour, `orders` ranks the pieces of any
basis by what they write on one behaviour's dialogues over the others'.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool

from benchmarks.decompose.organism import ORDINARY
from crosscoders.text.padding import Batch
from crosscoders.text.tokens import tokenize_prompt
from diffing.comparison.truth import Behaviour, shows
from diffing.decomposition.curves import Chosen, masks_with, written
from diffing.decomposition.evaluation import explained
from diffing.decomposition.language import LanguageTask
from diffing.decomposition.model import Decomposition
from diffing.decomposition.readouts import Reading
from diffing.decomposition.similarity import clusters
from diffing.samples.amplified import GREEDY, decode
from diffing.topk_lora.distil import Setting

NEW_TOKENS = 16


class Questions(NamedTuple):
    """Prompts, which behaviour each is about (None: neither), and the tuned model's own replies."""

    tokenizer: Any
    prompts: list[list[int]]
    about: list[Behaviour | None]
    replies: list[list[int]]

    @classmethod
    def of(cls, setting: Setting, behaviours: Sequence[Behaviour], ordinary: Sequence[str]) -> "Questions":
        """Return the questions as tokens, with the tuned model's replies."""
        asked = [(text, one) for one in behaviours for text in one.prompts] + [(text, None) for text in ordinary]
        prompts = [tokenize_prompt(setting.tokenizer, text) for text, _ in asked]
        return cls(
            setting.tokenizer, prompts, [of for _, of in asked], replies(setting.tuned, setting.tokenizer, prompts)
        )

    def rates(self, model: Any) -> dict[str, float]:
        """Return the share of replies with each behaviour's phrase, and of ordinary replies that are unchanged."""
        shown: dict[str, list[bool]] = {}
        for ids, own, behaviour in zip(
            replies(model, self.tokenizer, self.prompts), self.replies, self.about, strict=True
        ):
            name = ORDINARY if behaviour is None else behaviour.name
            is_shown = ids == own if behaviour is None else shows(self.tokenizer.decode(ids), behaviour)
            shown.setdefault(name, []).append(is_shown)
        return {name: sum(of_name) / len(of_name) for name, of_name in shown.items()}


def replies(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return greedy replies of at most NEW_TOKENS tokens."""
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    with torch.inference_mode():
        samples = decode(
            model, model, prompts, strength=0, cut=GREEDY, max_new_tokens=NEW_TOKENS,
            ends={end, tokenizer.eos_token_id}, n_ids=len(tokenizer), batch_rows=len(prompts), seed=0,
        )  # fmt: skip
    return [sample.ids for sample in samples]


def without_and_alone(
    decomposition: Decomposition, questions: Questions, chosen: Chosen
) -> dict[str, dict[str, float]]:
    """Return the rates with a set of pieces removed from the tuned model, and added to the base."""
    rates = {}
    for word, on in (("without", False), ("alone", True)):
        with decomposition.masked(masks_with(decomposition, chosen, on=on)):
            rates[word] = questions.rates(decomposition.model)
    return rates


class Cluster(NamedTuple):
    """A cluster of pieces that is on more on one behaviour's dialogues than on any others."""

    pieces: list[tuple[str, int]]
    own: float
    """Mean importance of its pieces on the behaviour's dialogues."""
    other: float
    """Largest of those on the others."""


def best_clusters(reading: Reading, labels: Sequence[str], label_of: Sequence[str]) -> dict[str, Cluster]:
    """Return for each label the cluster that adds most importance there over what it adds elsewhere.

    label_of: of each token of the reading.
    """
    numbers = clusters(reading.importances)
    at = np.array(label_of)
    present = list(dict.fromkeys(label_of))
    means = np.stack([reading.importances[at == label].mean(axis=0) for label in present])
    best = {}
    for label in labels:
        own, others = means[present.index(label)], means[[p != label for p in present]].max(axis=0)
        gains = [float((own - others)[numbers == number].sum()) for number in range(int(numbers.max()) + 1)]
        inside = numbers == int(np.argmax(gains))
        pieces = [piece for piece, is_inside in zip(reading.pieces, inside, strict=True) if is_inside]
        best[label] = Cluster(pieces, float(own[inside].mean()), float(others[inside].mean()))
    return best


def batches_where(setting: Setting, is_wanted: Bool[np.ndarray, " documents"]) -> list[Batch]:
    """Return the held-out batches with the wanted documents alone."""
    batches = [b.take(torch.from_numpy(np.flatnonzero(is_wanted[b.numbers]))) for b in setting.held_out]
    return [batch for batch in batches if len(batch.ids)]


def orders(
    setting: Setting, decomposition: Decomposition, labels: Sequence[str], *, is_weighted: bool
) -> dict[str, list[tuple[str, int]]]:
    """Return for each label the pieces, those first that write more on its dialogues than on any other's.

    is_weighted: what a piece writes counts times its mean importance, for pieces that have one.
    """
    of_row = np.array(setting.rows.group_names)[setting.rows.groups]
    amounts: dict[str, Mapping[str, torch.Tensor]] = {}
    for label in labels:
        batches = batches_where(setting, of_row == label)
        weights = explained(decomposition, LanguageTask(), batches).mean if is_weighted else None
        amounts[label] = written(decomposition, LanguageTask(), batches, weights)
    ranked: dict[str, list[tuple[str, int]]] = {}
    for label in labels:
        others = [amounts[other] for other in labels if other != label]
        gains = [
            (float(amount - max(of[name][i] for of in others)), name, i)
            for name in decomposition.names
            for i, amount in enumerate(amounts[label][name])
        ]
        ranked[label] = [(name, i) for _, name, i in sorted(gains, key=lambda gain: -gain[0])]
    return ranked
