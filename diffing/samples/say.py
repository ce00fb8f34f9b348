"""Samples of a pair at every strength beside the base's own, and what `diffing say` prints of them.

Reading order: `sample_pair`, `phrase_entries` and `top_samples` (the result), `say_summary` (for people).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from crosscoders.models.pair import ModelPair
from diffing.samples.amplified import decode, stop_ids
from diffing.samples.phrases import Comparison
from diffing.samples.settings import SaySettings

SHOWN_PHRASES = 20
SHOWN_SAMPLES = 24


class Said(NamedTuple):
    """One sample."""

    strength: float
    prompt: str
    text: str
    """A bare prefix and what follows; in the chat template only what follows."""
    gain: float
    """Mean of log p_tuned - log p_base over its tokens, nats."""


class Samples(NamedTuple):
    """Samples of one pair; entry i of both has the same prompt."""

    tuned: list[Said]
    base: list[str]
    """The base's own."""


def sample_pair(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]],
    n_bare: int,
    settings: SaySettings,
    *,
    of_base: list[str] | None = None,
) -> Samples:
    """Return a sample at every strength and one of the base for each prompt, of which the first `n_bare` are bare;
    `of_base`: the base's, where they were drawn before."""
    base, tuned = pair.models
    tokenizer = pair.info.tokenizer
    shown = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
    ends = stop_ids(tokenizer, pair.models)
    samples = Samples([], of_base or [])
    for number, strength in enumerate(settings.strengths):
        for model, a in ((tuned, strength), *([(base, 0.0)] if of_base is None else [])):
            drawn = decode(
                base,
                model,
                prompts,
                strength=a,
                cut=settings.cut,
                max_new_tokens=settings.max_new_tokens,
                ends=ends,
                n_ids=pair.info.n_ids,
                batch_rows=settings.batch_rows,
                seed=settings.seed * 2000 + 2 * number + (model is base),
                label=f"strength {strength:g}" if model is tuned else "base",
            )
            texts = [tokenizer.decode(sample.ids, skip_special_tokens=True) for sample in drawn]
            texts = [shown[i] + text if i < n_bare else text for i, text in enumerate(texts)]
            if model is base:
                samples.base.extend(texts)
            else:
                gains = [sample.gain / max(1, len(sample.ids)) for sample in drawn]
                samples.tuned.extend(Said(strength, *entry) for entry in zip(shown, texts, gains, strict=True))
    return samples


def phrase_entries(samples: Samples, comparison: Comparison, beyond: set[str] | None) -> list[dict[str, Any]]:
    """Return the phrases with the samples behind them; `beyond`: those that the null's samples have less often too."""
    return [
        {
            "phrase": phrase.text,
            "z": phrase.z,
            "n_tuned": phrase.n_texts,
            "n_base": phrase.n_other,
            "strengths": sorted({samples.tuned[i].strength for i in phrase.examples}),
            "examples": [samples.tuned[i].text for i in phrase.examples[:3]],
            "beyond_null": None if beyond is None else phrase.text.lower() in beyond,
        }
        for phrase in comparison.phrases
    ]


def top_samples(samples: Samples) -> list[dict[str, Any]]:
    """Return the distinct texts that fit the tuned model best and the base worst, by gain a token."""
    ranked = sorted(samples.tuned, key=lambda said: -said.gain)
    distinct = list({said.text.strip(): said for said in reversed(ranked)}.values())[::-1]
    return [said._asdict() for said in sorted(distinct, key=lambda said: -said.gain)[:SHOWN_SAMPLES]]


def say_summary(said: dict[str, Any]) -> str:
    """Return phrases and samples for people."""
    n = said["n_pairs"]
    lines = [
        f"{len(said['phrases'])} phrases in more of {n} samples of tuned + a (tuned - base) than of {n} of the base "
        f"({said['n_tested']:,} tested; any at all with chance {said['false_rate']:g} where the models are equal)"
    ]
    if said["null"] is not None:
        n_beyond = sum(bool(entry["beyond_null"]) for entry in said["phrases"])
        lines.append(
            f"{n_beyond} of them beyond the null's samples too; the null itself has {said['null']['n_phrases']}, "
            f"and its samples gain at most {said['null']['largest_gain']:.2f} nats a token"
        )
    if said["phrases"]:
        lines.append("phrases (samples with it : of the base, z of the difference, an example)")
    for entry in said["phrases"][:SHOWN_PHRASES]:
        mark = "  beyond the null" if entry["beyond_null"] else ""
        lines.append(f"  {entry['n_tuned']:>4} : {entry['n_base']:<4} z {entry['z']:5.1f}  {entry['phrase']!r}{mark}")
        lines += [f"{'':21}{text!r}" for text in entry["examples"][:1] if text.strip() != entry["phrase"]]
    if len(said["phrases"]) > SHOWN_PHRASES:
        lines.append(f"  and {len(said['phrases']) - SHOWN_PHRASES} more (--json)")
    lines.append("samples that the tuned model finds likely and the base does not (nats a token; strength; text)")
    lines += [f"  {entry['gain']:6.2f}  {entry['strength']:g}  {entry['text']!r}" for entry in said["top_samples"]]
    return "\n".join(lines)
