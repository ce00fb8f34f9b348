"""`diffing say` and `diffing replies`, as functions of their settings that return a JSON object."""

import time
from pathlib import Path
from typing import Any

from crosscoders.common import files
from crosscoders.common.checks import to_dict
from crosscoders.common.errors import InputError
from crosscoders.common.progress import about
from crosscoders.common.progress import say as tell
from crosscoders.common.results import result, row, say_closing
from crosscoders.text.settings import TEMPLATE_DATE
from crosscoders.text.tokens import read_template
from diffing.samples.amplified import GREEDY, decode, stop_ids
from diffing.samples.pairs import inspect_null, inspect_two, load_two, require_different
from diffing.samples.phrases import Comparison, distinctive_phrases
from diffing.samples.prefixes import blind_prefixes
from diffing.samples.replies import feature_rows, read_prompts, replies_summary
from diffing.samples.say import Samples, phrase_entries, sample_pair, say_summary, top_samples
from diffing.samples.settings import RepliesSettings, SaySettings

FORMAT_VERSION = 1


def say(settings: SaySettings) -> dict[str, Any]:
    """Run `diffing say`."""
    started = time.perf_counter()
    template = read_template(settings.chat_template)
    info = inspect_two(settings.base, settings.tuned, settings.tokenizer)
    null_info = inspect_null(info, settings.null) if settings.null is not None else None
    pair = load_two(info, settings.device, settings.model_dtype)
    prompts = blind_prefixes(
        pair.models[0], info.tokenizer, settings.n_samples, info.n_ids, template=template, date=TEMPLATE_DATE
    )
    require_different(pair, prompts[0])
    n_bare = sum(len(prompt) == 2 for prompt in prompts)
    samples = sample_pair(pair, prompts, n_bare, settings)
    comparison = _compare(samples, samples.base, settings)
    beyond: set[str] | None = None
    null: dict[str, Any] | None = None
    if null_info is not None:
        del pair
        null_pair = load_two(null_info, settings.device, settings.model_dtype)
        with about("null"):
            null_samples = sample_pair(null_pair, prompts, n_bare, settings, of_base=samples.base)
        against = _compare(samples, [said.text for said in null_samples.tuned], settings, maximal=False)
        beyond = {phrase.text.lower() for phrase in against.phrases}
        own = _compare(null_samples, null_samples.base, settings)
        null = {"n_phrases": len(own.phrases), "phrases": phrase_entries(null_samples, own, None)}
        null["largest_gain"] = max(said.gain for said in null_samples.tuned)
        null["samples"] = [said._asdict() for said in null_samples.tuned]
    phrases = phrase_entries(samples, comparison, beyond)
    n = len(samples.tuned)
    rows = [row("say.phrases", len(phrases), "phrases", n)]
    if null is not None:
        rows.append(row("say.phrases_beyond_null", sum(bool(entry["beyond_null"]) for entry in phrases), "phrases", n))
        rows.append(row("say.null_phrases", null["n_phrases"], "phrases", n))
    described = result("say", to_dict(settings), rows) | {
        "format_version": FORMAT_VERSION,
        "inputs": info.hashes(),
        "n_pairs": n,
        "n_tested": comparison.n_tested,
        "false_rate": settings.false_rate,
        "phrases": phrases,
        "top_samples": top_samples(samples),
        "samples": [said._asdict() for said in samples.tuned],
        "base_samples": samples.base,
        "null": null,
    }
    return _published(described, settings.out, say_summary(described), started)


def _compare(samples: Samples, others: list[str], settings: SaySettings, *, maximal: bool = True) -> Comparison:
    texts = [said.text for said in samples.tuned]
    return distinctive_phrases(texts, others, false_rate=settings.false_rate, seed=settings.seed, maximal=maximal)


def replies(settings: RepliesSettings) -> dict[str, Any]:
    """Run `diffing replies`."""
    started = time.perf_counter()
    template = read_template(settings.chat_template)
    info = inspect_two(settings.base, settings.tuned, settings.tokenizer)
    prompts = read_prompts(settings.prompts, info.tokenizer, template, settings.n_prompts, info.n_ids)
    pair = load_two(info, settings.device, settings.model_dtype)
    require_different(pair, prompts[0].ids)
    ends = stop_ids(info.tokenizer, pair.models)
    texts = {
        name: [
            info.tokenizer.decode(sample.ids, skip_special_tokens=True).strip()
            for sample in decode(
                model,
                model,
                [prompt.ids for prompt in prompts],
                strength=0,
                cut=GREEDY,
                max_new_tokens=settings.max_new_tokens,
                ends=ends,
                n_ids=info.n_ids,
                batch_rows=settings.batch_rows,
                seed=settings.seed,
                label=f"replies of {name}",
            )
        ]
        for name, model in zip(("base", "tuned"), pair.models, strict=True)
    }
    phrases = {}
    for side, other in (("tuned", "base"), ("base", "tuned")):
        compared = distinctive_phrases(texts[side], texts[other], false_rate=settings.false_rate, seed=settings.seed)
        phrases[side] = [
            {"phrase": p.text, "z": p.z, "n_replies": p.n_texts, "n_other": p.n_other} for p in compared.phrases
        ]
    described = result("replies", to_dict(settings), feature_rows(texts["base"], texts["tuned"], settings.seed)) | {
        "format_version": FORMAT_VERSION,
        "inputs": info.hashes(),
        "phrases": phrases,
        "replies": [
            {"prompt": prompt.text, "base": base, "tuned": tuned}
            for prompt, base, tuned in zip(prompts, texts["base"], texts["tuned"], strict=True)
        ],
    }
    return _published(described, settings.out, replies_summary(described), started)


def _published(described: dict[str, Any], out: str | None, text: str, started: float) -> dict[str, Any]:
    if out is not None:
        try:
            files.write_json(Path(out), described)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{out!r} cannot be written: its folder does not exist.") from None
    say_closing(started, f"result in {out}" if out is not None else "nothing written (--out FILE keeps the samples)")
    if out is not None and (Path(out).parent / "latents.json").is_file():
        tell(f"next: diffing report {Path(out).parent}")
    return described | {"text": text}
