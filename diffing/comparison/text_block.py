"""Texts: what a method prints for people to read, and whether the planted phrase is in its first lines.

Lists of tokens count telling tokens of the phrases among the first 20, samples count those of 100 that show a phrase.
Beside each, the same from random: the base's own samples, random tokens, and the lens of random vectors.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from crosscoders.common.results import row
from crosscoders.models.pair import ModelPair
from crosscoders.models.resume import read_out
from crosscoders.text.decoding import token_text
from crosscoders.text.tokens import read_template
from diffing.baselines.diff_mining import by_frequency, by_topic, token_frequencies
from diffing.baselines.mean_difference import difference_lens
from diffing.baselines.observation import Observed
from diffing.baselines.weight_svd import amplified_, weight_delta
from diffing.comparison.patched_replies import own_replies
from diffing.comparison.settings import CompareSettings
from diffing.comparison.truth import FIRST_SAMPLES, FIRST_TOKENS, Behaviour, hits, shows, telling_tokens
from diffing.samples.prefixes import blind_prefixes
from diffing.samples.replies import read_prompts
from diffing.samples.say import sample_pair
from diffing.samples.settings import SaySettings

AMPLIFIED = 2.0
"""Strength of the weight delta in samples of weight amplification."""


class Texts:
    """What one pair gives people to read, method by method; `seed` is that of samples."""

    def __init__(
        self, pair: ModelPair, observed: Observed, settings: CompareSettings, seed: int, null: Observed | None
    ) -> None:
        self.pair, self.observed, self.settings, self.seed, self.null = pair, observed, settings, seed, null
        self.generator = np.random.default_rng(seed)

    def of(self, method: str) -> dict[str, list[str]]:
        """Return lists of texts of a method: `own`, and `random` beside it."""
        made: dict[str, Callable[[], dict[str, list[str]]]] = {
            "say": self.said,
            "replies": self.replied,
            "mined-tokens": self.mined,
            "mined-topics": self.mined_topics,
            "difference-lens": self.lens,
            "weight-amplification": self.amplified,
        }
        return made[method]()

    def said(self) -> dict[str, list[str]]:
        """Samples of the amplified difference, by gain a token, beside the base's own."""
        settings = SaySettings(
            base=self.pair.info.base, tuned=self.pair.info.tuned, n_samples=self._per_strength(4),
            max_new_tokens=self.settings.max_new_tokens, seed=self.seed,
        )  # fmt: skip
        samples = sample_pair(self.pair, *self._prefixes(settings.n_samples), settings)
        ranked = sorted(samples.tuned, key=lambda said: -said.gain)
        return {"own": [said.text for said in ranked], "random": samples.base}

    def replied(self) -> dict[str, list[str]]:
        """Replies of the tuned model to prompts about nothing in particular, beside the base's."""
        template = read_template(self.settings.chat_template)
        prompts = read_prompts(None, self.pair.info.tokenizer, template, self.settings.n_samples, self.pair.info.n_ids)
        ids = [prompt.ids for prompt in prompts]
        base, tuned = (
            self._decoded(own_replies(model, self.pair, ids, self.settings.max_new_tokens))
            for model in self.pair.models
        )
        return {"own": tuned, "random": base}

    def mined(self) -> dict[str, list[str]]:
        """Tokens by frequency, with the null's taken off, beside random tokens."""
        n_ids = self.pair.info.n_ids
        null = None if self.null is None else token_frequencies(self.null, n_ids)
        mined = by_frequency(self.observed, n_ids, null)
        return {"own": mined.texts(self.pair.info.tokenizer, FIRST_TOKENS), "random": self._random_tokens()}

    def mined_topics(self) -> dict[str, list[str]]:
        """Tokens of three topics in turn, beside random tokens."""
        topics = by_topic(self.observed, self.pair.info.n_ids, seed=self.seed)
        lists = [topic.texts(self.pair.info.tokenizer, FIRST_TOKENS) for topic in topics]
        turns = [text for texts in zip(*lists, strict=True) for text in texts]
        return {"own": list(dict.fromkeys(turns))[:FIRST_TOKENS], "random": self._random_tokens()}

    def lens(self) -> dict[str, list[str]]:
        """Tokens of the mean difference, all tokens and the first positions in turn, beside those of random vectors."""
        lenses = difference_lens(self.pair, self.observed, n_positions=3, top=FIRST_TOKENS)
        weight = next(self.pair.models[1].parameters())
        drawn = self.generator.standard_normal((len(lenses), self.pair.info.d_model))
        logits = read_out(self.pair.models[1], torch.from_numpy(drawn).to(weight.device, weight.dtype))
        best = logits[:, : len(self.pair.info.tokenizer)].topk(FIRST_TOKENS).indices
        others = [[self._text(int(token)) for token in tokens] for tokens in best]
        return {"own": _in_turn([lens.tokens for lens in lenses]), "random": _in_turn(others)}

    def amplified(self) -> dict[str, list[str]]:
        """Replies of the model with twice the weight delta, beside the base's own."""
        n = self.settings.n_samples
        prompts = self._prefixes(n)[0]
        base = self.pair.models[0]
        own = self._decoded(own_replies(base, self.pair, prompts, self.settings.max_new_tokens))
        with amplified_(base, weight_delta(*self.pair.models), AMPLIFIED) as model:
            told = self._decoded(own_replies(model, self.pair, prompts, self.settings.max_new_tokens))
        return {"own": told, "random": own}

    def _per_strength(self, n_strengths: int) -> int:
        return max(2, self.settings.n_samples // n_strengths)

    def _prefixes(self, n: int) -> tuple[list[list[int]], int]:
        """Return prompts that nobody chose, and how many of them are bare."""
        template = read_template(self.settings.chat_template)
        info = self.pair.info
        prompts = blind_prefixes(
            self.pair.models[0], info.tokenizer, n, info.n_ids, template=template, date=self.settings.template_date
        )
        return prompts, sum(len(prompt) == 2 for prompt in prompts)

    def _decoded(self, replies: list[list[int]]) -> list[str]:
        return [str(self.pair.info.tokenizer.decode(ids, skip_special_tokens=True)) for ids in replies]

    def _random_tokens(self) -> list[str]:
        n = min(self.pair.info.n_ids, len(self.pair.info.tokenizer))
        return [self._text(int(token)) for token in self.generator.choice(n, FIRST_TOKENS, replace=False)]

    def _text(self, token: int) -> str:
        return token_text(self.pair.info.tokenizer, token)


def _in_turn(lists: list[list[str]]) -> list[str]:
    return list(dict.fromkeys(text for texts in zip(*lists, strict=True) for text in texts))[:FIRST_TOKENS]


TOKEN_LISTS = ("mined-tokens", "mined-topics", "difference-lens")


def text_rows(method: str, texts: dict[str, list[str]], tokenizer: Any, truth: list[Behaviour]) -> list[dict[str, Any]]:
    """Return rows texts.<method>[.random].hits: telling tokens among the first 20, or samples of 100 with a phrase."""
    telling = telling_tokens(tokenizer, truth)
    rows = []
    for which, listed in texts.items():
        name = f"texts.{method}" if which == "own" else f"texts.{method}.{which}"
        if method in TOKEN_LISTS:
            rows.append(row(f"{name}.hits", hits(listed, telling), "tokens", len(listed[:FIRST_TOKENS])))
        else:
            first = listed[:FIRST_SAMPLES]
            shown = sum(any(shows(text, behaviour) for behaviour in truth) for text in first)
            rows.append(row(f"{name}.hits", shown, "samples", len(first)))
    return rows
