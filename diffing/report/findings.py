"""The first screen: what was found, named by contexts; how much of it a null has; what it causes.

Reading order: `specific_latents`, then one sentence each, `context_bars`.
"""

from collections import Counter
from typing import NamedTuple

from diffing.latents.nulls import NULL, counts_beside
from diffing.latents.verdict import STRONG, WEAK
from diffing.report.causes import CAUSAL, DIRECTIONS, percent
from diffing.report.data import Run
from diffing.report.text import clip, counted, number

SIDES = (*STRONG, *WEAK)
"""The verdicts that give a latent to one model, which they name first."""
SHOWN_CONTEXTS = 12
NO_CONTEXT = "no context"


def specific_latents(run: Run) -> list[int]:
    """Return the rows of the alive latents that are specific to a model or lean to it, best rank first."""
    verdicts = run.latents.columns["verdict"]
    return [i for i in run.latents.order if run.latents.alive[i] and verdicts[i] in SIDES]


def contexts_of(run: Run, verdict: str) -> Counter[str]:
    """Count the latents of a verdict by where they fire most."""
    columns = run.latents.columns
    rows = [i for i in specific_latents(run) if columns["verdict"][i] == verdict]
    return Counter(columns["main_context"][i] or NO_CONTEXT for i in rows)


def answer(run: Run) -> list[str]:
    """Return one sentence for each model's own latents: how many, and where they fire; or that there is none."""
    alive = number(int(run.latents.alive.sum()))
    strong = [_counted(run, verdict, "specific to the {} model") for verdict in STRONG]
    weak = [
        _counted(run, verdict, "leaning to the {} model, a weak verdict that a null has to confirm") for verdict in WEAK
    ]
    none = f"No latent is specific to either model: 0 of {alive} alive ones."
    return [*(list(filter(None, strong)) or [none]), *filter(None, weak)]


def _counted(run: Run, verdict: str, words: str) -> str:
    counts = contexts_of(run, verdict)
    if not counts:
        return ""
    named = [f"{clip(context, 40)} ({number(n)})" for context, n in counts.most_common(SHOWN_CONTEXTS)]
    n, more = counts.total(), " …" if len(counts) > SHOWN_CONTEXTS else ""
    alive, verb = number(int(run.latents.alive.sum())), "is" if n == 1 else "are"
    words = words.format(verdict.partition("-")[0])
    return (
        f"{counted(n, 'latent')} of {alive} alive ones {verb} {words}; "
        f"where most of their activation lies: {', '.join(named)}{more}."
    )


def null_answer(run: Run) -> tuple[str, str]:
    """Return how many of them a pair without the behaviour has, and the command that would say it."""
    if not run.nulls:
        return "How many of them come without any change of behaviour is not known: no null was run.", NULL.format(
            run=run.path
        )
    beside = counts_beside(run.nulls)
    parts = [f"{verdict}: {beside[verdict]}" for verdict in SIDES if verdict in beside]
    return f"A crosscoder of a null pair has as many by the same rule: {'; '.join(parts)}.", ""


def causal_answer(run: Run) -> tuple[str, str]:
    """Return what the first latents do to the predictions, beside random ones, and the command that would say it."""
    for direction, entry in run.causal.items():
        shares = {patched.name: patched.share for patched in entry["sets"]}
        first = next((name for name in shares if name.startswith("top_") and name.endswith(".scaling")), None)
        if first is None or shares[first] is None:
            continue
        size = first.removeprefix("top_").removesuffix(".scaling")
        others = {"random ones": "random", "those by decoder norm": "norm", "those by decoder difference": "difference"}
        beside = [
            f"{words} {percent(share)}"
            for words, rank in others.items()
            if (share := shares.get(f"top_{size}.{rank}")) is not None
        ]
        return (
            f"Exchanged between the models ({DIRECTIONS[direction][0]}), the first {size} latents close "
            f"{'; '.join([f'{percent(shares[first])} of the KL between their predictions', *beside])}.",
            "",
        )
    return "What they do to the predictions is not known.", CAUSAL.format(run=run.path)


class Bar(NamedTuple):
    """Specific latents that fire mostly in one context."""

    context: str
    parts: list[tuple[str, int, float]]
    """Verdict, latents, and their share of the longest bar, per cent."""


def context_bars(run: Run) -> list[Bar]:
    """Return the picture of the first screen, longest bar first; empty where no latent is specific."""
    counts = {verdict: contexts_of(run, verdict) for verdict in SIDES}
    total: Counter[str] = sum(counts.values(), Counter())
    longest = max(total.values(), default=1)
    return [
        Bar(clip(name, 40), [(v, of[name], 100 * of[name] / longest) for v, of in counts.items() if of[name]])
        for name, _ in total.most_common(SHOWN_CONTEXTS)
    ]
