"""`diffing causal`, `steer` and `lens`, as functions of their settings that return a JSON object."""

import time
from dataclasses import replace
from typing import Any

from crosscoders.common import files
from crosscoders.common.checks import LEAST_CHATS, to_dict
from crosscoders.common.devices import choose_device
from crosscoders.common.progress import say
from crosscoders.common.results import legend, publish, result, say_closing
from crosscoders.formats.load import load_crosscoder
from crosscoders.text.tokens import read_template
from diffing.causal.lens import logit_lens
from diffing.causal.patching import DIRECTIONS, inspect_cached, load_whole, measure, read_enough_chats
from diffing.causal.sets import choose_sets
from diffing.causal.settings import CausalSettings, LensSettings, SteerSettings
from diffing.causal.steering import answer, steered, steering_vector
from diffing.causal.summary import causal_rows, causal_summary
from diffing.latents.decoder_norms import decoder_difference
from diffing.latents.latent_scaling import MODELS
from diffing.latents.runs import open_run_and_cache
from diffing.latents.table import read_table, require_fit, require_latents


def causal(settings: CausalSettings) -> dict[str, Any]:
    """Run `diffing causal`."""
    started = time.perf_counter()
    run, cache = open_run_and_cache(settings.run, settings.cache)
    say(f"causal {run} at {cache.manifest['hook_point']} of the models of {cache.path}")
    table = read_table(run)
    crosscoder = load_crosscoder(run, device=str(choose_device(settings.device)))
    require_fit(crosscoder, cache)
    difference = decoder_difference(crosscoder).cpu().numpy()
    sets = {
        direction: choose_sets(
            table,
            target,
            difference,
            n_latents=settings.top(),
            draws=settings.random_draws,
            seed=settings.seed,
            match_frequency=settings.match_frequency,
            latents=settings.latents,
        )
        for direction, target in DIRECTIONS.items()
    }
    config = cache.config.data_config()
    if settings.data is not None:
        config = replace(config, data=settings.data)
    info = inspect_cached(cache)
    too_few = f"intervals over fewer than {LEAST_CHATS} say nothing. Name more chats with --data."
    chats = read_enough_chats(config, info, settings.n_documents, too_few)
    pair = load_whole(info, cache.manifest["hook_point"], settings.device, settings.model_dtype)
    measured = measure(
        crosscoder, pair, chats, sets, batch_rows=settings.batch_rows, first_tokens=settings.first_tokens
    )
    entries = causal_rows(measured, first_tokens=settings.first_tokens, seed=settings.seed)
    described = {**result("causal", to_dict(settings), entries), "latents": files.hash_file(run / "latents.json")}
    publish(run / "causal.json", described)
    say_closing(started, f"{len(entries)} rows in {run / 'causal.json'}")
    return described | {"text": causal_summary(entries, settings.first_tokens)}


def steer(settings: SteerSettings) -> dict[str, Any]:
    """Run `diffing steer`."""
    run, cache = open_run_and_cache(settings.run, settings.cache)
    hook_point = cache.manifest["hook_point"]
    table, crosscoder = read_table(run), load_crosscoder(run)
    template = read_template(cache.config.chat_template)
    (latent,) = require_latents([settings.latent], len(table))
    largest = float(table["max_activation"][latent])
    pair = load_whole(inspect_cached(cache), hook_point, settings.device, settings.model_dtype)
    model, side = pair.models[MODELS.index(settings.model)], MODELS.index(settings.decoder)
    template = read_template(cache.manifest["config"].get("chat_template"))
    answers = []
    lines = [f"{settings.decoder} decoder of latent {latent} in the {settings.model} model; strength: answer"]
    for strength in settings.strengths:
        vector = steering_vector(crosscoder, latent, side=side, activation=strength * largest)
        with steered(model, hook_point, vector):
            text = answer(
                model,
                pair.info.tokenizer,
                settings.prompt,
                max_new_tokens=settings.max_new_tokens,
                template=template,
                date=cache.config.template_date,
            )
        answers.append({"strength": strength, "answer": text})
        lines.append(f"{strength:>6g}: {text!r}")
    return result("steer", to_dict(settings), []) | {"answers": answers, "text": "\n".join(lines)}


def lens(settings: LensSettings) -> dict[str, Any]:
    """Run `diffing lens`."""
    run, cache = open_run_and_cache(settings.run, settings.cache)
    table, crosscoder = read_table(run), load_crosscoder(run)
    chosen = table.nsmallest(32, "rank").index.tolist() if settings.latents is None else settings.latents
    latents = list(require_latents(chosen, len(table)))
    pair = load_whole(inspect_cached(cache), cache.manifest["hook_point"], settings.device, settings.model_dtype)
    readings = logit_lens(crosscoder, pair, latents, n_tokens=settings.top)
    header = f"{'latent':>6}  {'of':<6}  most raised"
    lines = [header]
    lines += [
        f"{j:>6}  {name:<6}  {' '.join(map(repr, tokens))}" for j in readings for name, tokens in readings[j].items()
    ]
    meanings = {
        "latent": "its number", "of": "the decoder, through the unembedding of the same model",
        "most raised": f"the {settings.top} tokens whose logits it raises most",
    }  # fmt: skip
    lines += legend(header, meanings)
    described = result("lens", to_dict(settings), []) | {"latents": readings}
    publish(run / "lens.json", described)
    return described | {"text": "\n".join(lines)}
