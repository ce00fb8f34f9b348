"""What sets of pieces do to each planted behaviour: replies with a set switched off, and with it alone on the base.

`Questions.rates` reads behaviours by the phrases of greedy replies; ordinary questions by how many replies stay those
of the tuned model. `purity` and `orders` are about importances: which cluster belongs to which behaviour, and pieces
in the order of what they write on one behaviour's dialogues less on the others'.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from crosscoders.text.tokens import tokenize_prompt
from diffing.comparison.truth import Behaviour, shows
from diffing.decomposition.curves import Chosen, masks_with, written
from diffing.decomposition.evaluation import explained
from diffing.decomposition.language import LanguageTask
from diffing.decomposition.model import Decomposition
from diffing.samples.amplified import GREEDY, decode
from diffing.topk_lora.distil import Setting

NEW_TOKENS, ROWS = 24, 64


class Questions(NamedTuple):
    """Prompts of each behaviour and ordinary ones, with the tuned model's replies to the latter."""

    tokenizer: Any
    planted: list[tuple[Behaviour, list[list[int]]]]
    ordinary: list[list[int]]
    replies: list[list[int]]

    @classmethod
    def of(cls, setting: Setting, behaviours: Sequence[Behaviour], ordinary: Sequence[str]) -> "Questions":
        """Return the questions as tokens, and the tuned model's replies to the ordinary ones."""
        planted = [(one, [tokenize_prompt(setting.tokenizer, text) for text in one.prompts]) for one in behaviours]
        others = [tokenize_prompt(setting.tokenizer, text) for text in ordinary]
        return cls(setting.tokenizer, planted, others, replies(setting.tuned, setting.tokenizer, others))

    def rates(self, model: Any) -> dict[str, float]:
        """Return the share of replies with each behaviour's phrase, and of ordinary replies that are unchanged."""
        shares = {}
        for behaviour, prompts in self.planted:
            texts = [self.tokenizer.decode(ids) for ids in replies(model, self.tokenizer, prompts)]
            shares[behaviour.name] = sum(shows(text, behaviour) for text in texts) / len(texts)
        now = replies(model, self.tokenizer, self.ordinary)
        same = sum(a == b for a, b in zip(now, self.replies, strict=True))
        return shares | {"ordinary": same / len(now)}


def replies(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return greedy replies of at most NEW_TOKENS tokens."""
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    with torch.inference_mode():
        samples = decode(
            model, model, prompts, strength=0, cut=GREEDY, max_new_tokens=NEW_TOKENS,
            ends={end, tokenizer.eos_token_id}, n_ids=len(tokenizer), batch_rows=ROWS, seed=0,
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


def purity(
    importances: Float[np.ndarray, "tokens pieces"],
    labels: Int[np.ndarray, " tokens"],
    clusters: Int[np.ndarray, " pieces"],
) -> Float[np.ndarray, "clusters labels"]:
    """Return the mean importance of the pieces of each cluster on the tokens of each label, 0 to n labels - 1."""
    n_labels = int(labels.max()) + 1
    means = np.stack([importances[labels == label].mean(axis=0) for label in range(n_labels)], axis=1)
    return np.stack([means[clusters == number].mean(axis=0) for number in range(int(clusters.max()) + 1)])


def orders(
    setting: Setting, decomposition: Decomposition, labels: Sequence[str], *, is_weighted: bool
) -> dict[str, list[tuple[str, int]]]:
    """Return for each label the pieces, those first that write more on its dialogues than on any other's.

    is_weighted: what a piece writes counts times its mean importance, for pieces that have one.
    """
    of_row = np.array(setting.rows.group_names)[setting.rows.groups]
    amounts: dict[str, Mapping[str, torch.Tensor]] = {}
    for label in labels:
        batches = [b.take(torch.from_numpy(np.flatnonzero(of_row[b.numbers] == label))) for b in setting.held_out]
        batches = [batch for batch in batches if len(batch.ids)]
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
