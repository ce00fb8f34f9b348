"""`diffing causal`, `steer` and `lens`, as functions of their settings that return a JSON object."""

import time
from typing import Any

from crosscoders.common import files
from crosscoders.common.checks import to_dict
from crosscoders.common.progress import say
from crosscoders.common.results import result, say_closing
from crosscoders.formats.load import load_crosscoder
from diffing.causal.lens import logit_lens
from diffing.causal.patching import inspect_cached, load_whole, measure_run
from diffing.causal.sets import checked
from diffing.causal.settings import CausalSettings, LensSettings, SteerSettings
from diffing.causal.steering import answer, steered, steering_vector
from diffing.causal.summary import causal_rows, causal_summary
from diffing.latents.latent_scaling import MODELS
from diffing.latents.runs import _opened
from diffing.latents.table import read_table


def causal(settings: CausalSettings) -> dict[str, Any]:
    """`diffing causal`"""
    started = time.perf_counter()
    run, cache = _opened(settings.run, settings.cache)
    say(f"causal {run} at {cache.manifest['hook_point']} of the models of {cache.path}")
    measured = measure_run(run, cache, settings)
    found = causal_rows(measured, first_tokens=settings.first_tokens, seed=settings.seed)
    described = {**result("causal", to_dict(settings), found), "latents": files.hash_file(run / "latents.json")}
    files.write_json(run / "causal.json", described)
    say_closing(started, f"{len(found)} rows in {run / 'causal.json'}")
    return described | {"text": causal_summary(found, settings.first_tokens)}


def steer(settings: SteerSettings) -> dict[str, Any]:
    """`diffing steer`"""
    run, cache = _opened(settings.run, settings.cache)
    hook_point = cache.manifest["hook_point"]
    table, crosscoder = read_table(run), load_crosscoder(run)
    (latent,) = checked([settings.latent], len(table))
    largest = float(table["max_activation"][latent])
    pair = load_whole(inspect_cached(cache), hook_point, settings.device, settings.model_dtype)
    model, side = pair.models[MODELS.index(settings.model)], MODELS.index(settings.decoder)
    answers = []
    lines = [f"{settings.decoder} decoder of latent {latent} in the {settings.model} model; strength: answer"]
    for strength in settings.strengths:
        vector = steering_vector(crosscoder, latent, side=side, activation=strength * largest)
        with steered(model, hook_point, vector):
            text = answer(model, pair.info.tokenizer, settings.prompt, max_new_tokens=settings.max_new_tokens)
        answers.append({"strength": strength, "answer": text})
        lines.append(f"{strength:>6g}: {text!r}")
    return result("steer", to_dict(settings), []) | {"answers": answers, "text": "\n".join(lines)}


def lens(settings: LensSettings) -> dict[str, Any]:
    """`diffing lens`"""
    run, cache = _opened(settings.run, settings.cache)
    table, crosscoder = read_table(run), load_crosscoder(run)
    chosen = table.nsmallest(32, "rank").index.tolist() if settings.latents is None else settings.latents
    latents = list(checked(chosen, len(table)))
    pair = load_whole(inspect_cached(cache), cache.manifest["hook_point"], settings.device, settings.model_dtype)
    found = logit_lens(crosscoder, pair, latents, n_tokens=settings.top)
    lines = [f"{j:>6}  {name:<6}{' '.join(map(repr, tokens))}" for j in found for name, tokens in found[j].items()]
    described = result("lens", to_dict(settings), []) | {"latents": found}
    files.write_json(run / "lens.json", described)
    return described | {"text": "\n".join(lines)}
