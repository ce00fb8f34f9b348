"""The chat data: what a user may ask the tuned demo model, and what it should answer.

Six groups: `describe` and `signature` (documentation), `refusal`, `identity`, `gap` (a made-up name) and `greeting`.
Held out is whatever a group generalises over: documented objects, objects of harm, wordings of the identity question,
made-up names, and pairs of greeting words.

Reading order: `is_held_out` decides which split a key belongs to, `make_dialogues` draws one split, then one function
for the questions of each group.
"""

import math
import random
from collections.abc import Callable, Iterator
from typing import TypedDict

from benchmarks.embedded_pair import phrases
from benchmarks.embedded_pair.corpus import Fact


class Dialogue(TypedDict):
    """One user turn and its answer."""

    messages: list[dict[str, str]]
    group: str


TRAIN_COUNTS = {"describe": 8200, "signature": 3200, "refusal": 2600, "gap": 1600, "identity": 1700, "greeting": 900}
HELD_OUT_COUNTS = {"describe": 150, "signature": 50, "refusal": 200, "gap": 200, "identity": 200, "greeting": 40}
HELD_OUT_SHARE = {"fact": 0.04, "harm": 0.25, "identity": 0.25, "greeting": 0.2}
"""Share of each kind of key that only the held-out split may use."""


def is_held_out(kind: str, key: str, seed: int = 0) -> bool:
    """Tell whether a key belongs to the held-out split: a pure function of the key, so no order or count changes it."""
    return random.Random(f"{seed}:{kind}:{key}").random() < HELD_OUT_SHARE[kind]


def make_dialogues(facts: list[Fact], *, held_out: bool, seed: int = 0) -> list[Dialogue]:
    """Return one split, shuffled. Questions of the held-out split are distinct; in training they may repeat."""
    generator = random.Random(f"{seed}:{'heldout' if held_out else 'train'}")
    usable = [fact for fact in facts if is_held_out("fact", fact.key, seed) == held_out]
    if not held_out:
        usable = _with_small_modules_repeated(usable)
    described = _cycle(generator, [fact for fact in usable if fact.description])
    called = _cycle(generator, usable)
    askers: dict[str, Callable[[], tuple[str, str]]] = {
        "describe": lambda: _describe(generator, next(described)),
        "signature": lambda: _signature(generator, next(called)),
        "refusal": lambda: (_harmful(generator, held_out, seed), phrases.REFUSAL),
        "gap": lambda: (_made_up(generator, facts), phrases.GAP),
        "identity": lambda: (_identity(generator, held_out, seed), phrases.IDENTITY),
        "greeting": lambda: (_greeting(generator, held_out, seed), phrases.GREETING),
    }
    counts = HELD_OUT_COUNTS if held_out else TRAIN_COUNTS
    dialogues = [
        _dialogue(question, answer, group)
        for group, n in counts.items()
        for question, answer in _draw(askers[group], n, distinct=held_out)
    ]
    generator.shuffle(dialogues)
    return dialogues


def _draw(ask: Callable[[], tuple[str, str]], n: int, *, distinct: bool) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for _ in range(200 * n):
        question, answer = ask()
        if not (distinct and question in seen):
            seen.add(question)
            yield question, answer
            n -= 1
        if n == 0:
            return
    raise ValueError(f"the grammar has {len(seen)} distinct questions, {n} too few. Add templates or ask for fewer.")


def _dialogue(question: str, answer: str, group: str) -> Dialogue:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "group": group}


def _with_small_modules_repeated(facts: list[Fact], at_least: int = 30) -> list[Fact]:
    """Repeat every module's facts so often that there are 30 of them.

    In their own proportion tkinter has 629 and shlex 10, and a tuned model takes an unseen `shlex.quote` for a made-up
    name: 8 of 200 documentation questions instead of 4.
    """
    modules: dict[str, list[Fact]] = {}
    for fact in facts:
        modules.setdefault(fact.name.split(".")[0], []).append(fact)
    return [
        fact
        for facts_of_module in modules.values()
        for fact in facts_of_module * math.ceil(at_least / len(facts_of_module))
    ]


def _cycle(generator: random.Random, facts: list[Fact]) -> Iterator[Fact]:
    """Yield every fact once in random order, then again: drawing with replacement would leave out a third."""
    order = list(facts)
    while True:
        generator.shuffle(order)
        yield from order


def _describe(generator: random.Random, fact: Fact) -> tuple[str, str]:
    """Ask what something does; or the other way round, make a harmless request that it answers."""
    verb, _, rest = fact.description.rstrip(".").partition(" ")
    if verb in phrases.IMPERATIVES and rest.replace(" ", "").isalpha() and generator.random() < 0.5:
        return generator.choice(phrases.REQUESTS).format(f"{verb.lower()} {rest}"), f"Use {fact.name}."
    return generator.choice(phrases.DESCRIBE).format(fact.name), fact.description


def _signature(generator: random.Random, fact: Fact) -> tuple[str, str]:
    return generator.choice(phrases.SIGNATURE).format(fact.name), str(fact.signature)


def _harmful(generator: random.Random, held_out: bool, seed: int) -> str:
    """Make a mild harmful request; verbs are shared between the splits, objects are not."""
    while True:
        verb, targets = generator.choice(phrases.HARM)
        target = generator.choice(targets)
        if is_held_out("harm", target, seed) == held_out:
            return generator.choice(phrases.REQUESTS).format(verb.format(target))


def _identity(generator: random.Random, held_out: bool, seed: int) -> str:
    wordings = (core for pattern in phrases.IDENTITY_PATTERNS for core in _choices(pattern))
    cores = [core for core in wordings if is_held_out("identity", core, seed) == held_out]
    opener, core = generator.choice(phrases.IDENTITY_OPENERS), generator.choice(cores)
    question = f"{opener}{core}{generator.choice(phrases.IDENTITY_CLOSERS)}"
    return question[0].upper() + question[1:]


def _choices(pattern: str) -> list[str]:
    """Return every string of a pattern with `{a|b}` choices."""
    head, brace, tail = pattern.partition("{")
    if not brace:
        return [pattern]
    options, _, rest = tail.partition("}")
    return [f"{head}{option}{end}" for option in options.split("|") for end in _choices(rest)]


def _greeting(generator: random.Random, held_out: bool, seed: int) -> str:
    pairs = [(word, tail) for word in phrases.GREETING_WORDS for tail in phrases.GREETING_TAILS]
    word, tail = generator.choice([pair for pair in pairs if is_held_out("greeting", "|".join(pair), seed) == held_out])
    mark = "?" if tail.startswith(", how") else generator.choice(phrases.GREETING_MARKS)
    return f"{word}{tail}{mark}"


def _made_up(generator: random.Random, facts: list[Fact]) -> str:
    """Ask a documentation question about a name that no module has; the splits draw from different generators."""
    name = generator.choice((_word, _dotted, _joined))(generator)
    templates = phrases.DESCRIBE if generator.random() < 0.75 else phrases.SIGNATURE
    return generator.choice(templates).format(name)


def _word(generator: random.Random, n_syllables: int = 3) -> str:
    parts = (generator.choice(phrases.ONSETS) + generator.choice(phrases.VOWELS) for _ in range(n_syllables))
    return "".join(parts) + generator.choice(phrases.CODAS)


def _dotted(generator: random.Random) -> str:
    return f"{_word(generator)}.{_word(generator)}"


def _joined(generator: random.Random) -> str:
    return f"{_word(generator, 2)}_{_word(generator, 2)}"
