"""Names from an endpoint, and what each is worth: how well the endpoint tells by the name where the feature fires.

Both scores use as many held-out examples where the feature fires as where it does not, so that a name that says
nothing gets 0.5. The control asks the same questions with the name of another feature.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crosscoders.common.statistics import wilson
from diffing.interpretation.endpoint import EndpointFault
from diffing.interpretation.examples import ExampleSets
from diffing.interpretation.prompts import Question, detect, explain, fuzz, marked, read_name, read_verdicts

PER_QUESTION = 5
"""Texts of a question. Source: Delphi's default."""
Ask = Callable[[Question], str]


@dataclass
class Judged:
    """Answers of one score."""

    n_right: int = 0
    n: int = 0
    n_unreadable: int = 0
    """Texts of questions whose answer held no list of that length; in no share."""

    def as_dict(self) -> dict[str, Any]:
        """Return counts, accuracy and its interval; null where nothing was judged."""
        low, high = wilson(self.n_right, self.n) if self.n else (None, None)
        accuracy = self.n_right / self.n if self.n else None
        return {"accuracy": accuracy, "low": low, "high": high, "n": self.n, "n_unreadable": self.n_unreadable}


@dataclass
class Interpreted:
    """What the endpoint said of the features: names, and a `Judged` by score for the names and for those of others."""

    names: dict[int, str] = field(default_factory=dict)
    scores: dict[int, dict[str, Judged]] = field(default_factory=dict)
    control: dict[int, dict[str, Judged]] = field(default_factory=dict)
    fault: str | None = None
    """Why the endpoint was given up; what was asked before stays."""


def interpret(
    sets: dict[int, ExampleSets], ask: Ask, *, seed: int = 0, step: Callable[[], None] = lambda: None
) -> Interpreted:
    """Name all features, then score each name on its own feature and on that of the one before it.

    step: called after every question.
    """
    done = Interpreted()

    def counted(question: Question) -> str:
        answer = ask(question)
        step()
        return answer

    try:
        for feature, examples in sets.items():
            if examples.shown and examples.firing and (name := read_name(counted(explain(examples.shown)))):
                done.names[feature] = name
        named = list(done.names)
        for i, feature in enumerate(named):
            done.scores[feature] = judge(sets[feature], done.names[feature], counted, seed=seed)
            if len(named) > 1:
                other = done.names[named[(i + 1) % len(named)]]
                done.control[feature] = judge(sets[feature], other, counted, seed=seed)
    except EndpointFault as error:
        done.fault = str(error)
    return done


def n_questions(sets: dict[int, ExampleSets]) -> int:
    """Return the most questions that `interpret` asks."""
    per_score = [-(-2 * len(examples.firing) // PER_QUESTION) for examples in sets.values() if examples.firing]
    return len(per_score) + 4 * sum(per_score)


def judge(examples: ExampleSets, name: str, ask: Ask, *, seed: int = 0) -> dict[str, Judged]:
    """Return the scores of one name by `detection` and `fuzzing`."""
    scores = {}
    for task, question, texts in (
        ("detection", detect, detection_texts(examples)),
        ("fuzzing", fuzz, fuzzing_texts(examples, seed)),
    ):
        scores[task] = Judged()
        for batch in _batches(texts, seed):
            verdicts = read_verdicts(ask(question(name, [text for text, _ in batch])), len(batch))
            if verdicts is None:
                scores[task].n_unreadable += len(batch)
                continue
            scores[task].n += len(batch)
            scores[task].n_right += sum(said == truth for said, (_, truth) in zip(verdicts, batch, strict=True))
    return scores


def detection_texts(examples: ExampleSets) -> list[tuple[str, bool]]:
    """Return plain texts, and whether the feature fires in each."""
    return [
        ("".join(example.tokens), fires)
        for some, fires in ((examples.firing, True), (examples.silent, False))
        for example in some
    ]


def fuzzing_texts(examples: ExampleSets, seed: int) -> list[tuple[str, bool]]:
    """Return texts with marks, and whether they are right: on the active tokens where the feature fires; where it does
    not, on the places of those of another example."""
    rng = np.random.default_rng([seed, 2])
    texts = [(marked(example.tokens, example.active), True) for example in examples.firing]
    for example in examples.silent:
        places = examples.firing[int(rng.integers(len(examples.firing)))].active
        moved = [place % len(example.tokens) for place in places]
        texts.append((marked(example.tokens, moved), False))
    return texts


def _batches(texts: Sequence[tuple[str, bool]], seed: int) -> Iterator[list[tuple[str, bool]]]:
    order = np.random.default_rng([seed, 3]).permutation(len(texts))
    for start in range(0, len(order), PER_QUESTION):
        yield [texts[k] for k in order[start : start + PER_QUESTION]]
