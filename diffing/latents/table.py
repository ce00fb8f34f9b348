"""Step 4 of the data flow: run folder + cache -> one row of evidence per latent.

`scale_run` is what `diffing scale` does: one pass over the cache gives Latent Scaling and context shares, another one
the examples of the latents that rank first, and two more the partners of latents that look specific and the divergence
of twins, where there are any. Files in RUN:
latents.json, latents.parquet, examples.json, cards.json, positions.json, twins.json.
"""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.activations.cache import ActivationCache
from crosscoders.common import files
from crosscoders.common.devices import choose_device
from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.progress import Progress, say
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.formats.load import load_crosscoder
from crosscoders.models.pair import inspect_pair
from diffing.latents.cards import Histograms, neighbours
from diffing.latents.contexts import TEMPLATE, ContextSums, examples, group_tokens, n_folded
from diffing.latents.decoder_norms import decoder_cosine, norm_class
from diffing.latents.latent_scaling import LatentScales, ScalingSums
from diffing.latents.partners import with_partners
from diffing.latents.positions import PLACES, PositionSums
from diffing.latents.records import FORMAT_VERSION, LatentRecord, require_one_table
from diffing.latents.siblings import with_siblings
from diffing.latents.twins import Pairs, add_twins, divergence, false_pairs, twin_pairs
from diffing.latents.verdict import Thresholds, ranks, specificity, verdicts


def scale_run(
    run: Path, cache: ActivationCache, *, n_tokens: int | None = None, n_examples: int = 512, device: str = "auto"
) -> pandas.DataFrame:
    """Make the latent table of a finished run and write it beside the weights.

    Raises:
        InputError: the crosscoder does not fit the cache, or there are no two models.
        EnvironmentFault: the run folder cannot be written, or another process writes there.
    """
    with files.exclusive(run):
        return _scale_run(run, cache, n_tokens, n_examples, device)


def _scale_run(
    run: Path, cache: ActivationCache, n_tokens: int | None, n_examples: int, device: str
) -> pandas.DataFrame:
    crosscoder = load_crosscoder(run, device=str(choose_device(device)))
    require_fit(crosscoder, cache)
    table, scales, shares = cache_table(crosscoder, cache, n_tokens)
    table = with_positions(table, shares)
    table, twins = with_twins(crosscoder, table, cache, scales.n_tokens)
    chosen = [int(latent) for latent in table.nsmallest(n_examples, "rank").query("n_active > 0").index]
    say(f"examples of the {len(chosen)} latents that rank first")
    spread = Histograms(table.loc[chosen, "max_activation"].tolist())
    contexts = examples(crosscoder, cache, chosen, cache_tokenizer(cache), n_tokens=n_tokens, observe=spread.add)
    histograms = {str(latent): counts for latent, counts in zip(chosen, spread.counts.tolist(), strict=True)}
    listed = {str(latent): [round(v, 6) for v in row] for latent, row in enumerate(shares.tolist())}
    parquet = io.BytesIO()
    table.to_parquet(parquet)
    beside: dict[str, dict[str, Any]] = {
        "positions.json": {"places": PLACES, "shares": listed},
        "twins.json": twins,
        "examples.json": {"latents": contexts},
        "cards.json": {"histograms": histograms, "neighbours": neighbours(crosscoder, table, chosen)},
    }
    written = {
        name: files.write_json(run / name, {"format_version": FORMAT_VERSION, **value})
        for name, value in beside.items()
    }
    written["latents.parquet"] = files.write_bytes(run / "latents.parquet", parquet.getvalue())
    write_table(run, table, scales, cache, written)  # last: it says which the other files are
    return table


def cache_table(
    crosscoder: Crosscoder, cache: ActivationCache, n_tokens: int | None
) -> tuple[pandas.DataFrame, LatentScales, Float[Tensor, "dict_size places"]]:
    """Return the latent table over the first tokens of a cache, with partners, and what else `scale_cache` gives."""
    scales, contexts, shares = scale_cache(crosscoder, cache, n_tokens=n_tokens)
    batches = (tokens.activations for tokens in cache.batches(4096, 0, scales.n_tokens))
    return with_partners(crosscoder, latent_table(crosscoder, scales, contexts), batches), scales, shares


def with_twins(
    crosscoder: Crosscoder, table: pandas.DataFrame, cache: ActivationCache, n_tokens: int
) -> tuple[pandas.DataFrame, dict[str, list[dict[str, Any]]]]:
    """Return the table with the columns of `twins.add_twins`, and all twins and false twins with their divergence."""
    pairs = twin_pairs(crosscoder, table)
    control = false_pairs(crosscoder, table, pairs)
    both = Pairs(*(torch.cat(sides) for sides in zip(pairs, control, strict=True)))
    batches = (tokens.activations for tokens in cache.batches(4096, 0, n_tokens)) if len(both.tuned) else ()
    divergences = divergence(crosscoder, table, both, batches)
    n = len(pairs.tuned)
    columns = (both.tuned.tolist(), both.base.tolist(), both.cosine.tolist(), divergences.tolist())
    listed = [
        {"tuned": i, "base": j, "cosine": cosine, "divergence": apart}
        for i, j, cosine, apart in zip(*columns, strict=True)
    ]
    return add_twins(table, pairs, divergences[:n]), {"twins": listed[:n], "control": listed[n:]}


def require_fit(crosscoder: Crosscoder, cache: ActivationCache) -> None:
    """Raise InputError when the crosscoder reads another width or number of models than the cache holds."""
    for name, has, needs in (
        ("d_model", cache.d_model, crosscoder.config.d_model),
        ("n_models", cache.n_models, crosscoder.config.n_models),
    ):
        if has != needs:
            raise InputError(
                f"cache {str(cache.path)!r} has {name} = {has} but the crosscoder reads {needs}. "
                "Use the cache it was trained on."
            )


def scale_cache(
    crosscoder: Crosscoder, cache: ActivationCache, *, n_tokens: int | None = None, batch_size: int = 4096
) -> tuple[LatentScales, ContextSums, Float[Tensor, "dict_size places"]]:
    """Return Latent Scaling, context shares and shares by `response_positions.PLACES`, over the first `n_tokens` of a
    cache (default: all), in one pass."""
    n_tokens = min(n_tokens or len(cache), len(cache))
    # At least 32 batches, the blocks of the jackknife; and pre-activations of 256 MiB at most.
    batch_size = max(1, min(batch_size, math.ceil(n_tokens / 32), 2**26 // crosscoder.config.dict_size))
    scaling = ScalingSums(crosscoder)
    groups = cache.manifest["groups"]
    contexts = ContextSums(crosscoder.config.dict_size, groups, group_tokens(cache, n_tokens))
    positions = PositionSums(crosscoder.config.dict_size)
    progress = Progress("scale", total=n_tokens, unit="tok")
    for tokens in cache.batches(batch_size, 0, n_tokens):
        latents = scaling.add(tokens.activations)
        contexts.add(latents, tokens)
        positions.add(latents, tokens)
        progress.update(len(tokens.token_ids))
    progress.close()
    return scaling.result(), contexts, positions.shares()


def latent_table(crosscoder: Crosscoder, scales: LatentScales, contexts: ContextSums | None = None) -> pandas.DataFrame:
    """Return a table of one row per latent: norms, cosine, ratios with standard errors, counts, shares, verdict,
    rank."""
    norms = crosscoder.decoder_norms.detach().cpu()
    relative = crosscoder.relative_decoder_norm.detach().cpu().double()
    table = scales.to_pandas()
    leading = pandas.DataFrame(
        {
            "norm_class": norm_class(relative.tolist()),
            "relative_decoder_norm": relative.numpy(),
            "decoder_norm_base": norms[:, 0].double().numpy(),
            "decoder_norm_tuned": norms[:, 1].double().numpy(),
            "decoder_cosine": decoder_cosine(crosscoder).detach().cpu().double().numpy(),
        },
        index=table.index,
    )
    table = with_siblings(crosscoder, pandas.concat([leading, table], axis=1))
    table["specificity"] = specificity(table)
    table["rank"] = ranks(table)
    table.insert(0, "verdict", verdicts(table))
    if contexts is not None:
        shares = contexts.shares().numpy()
        strongest = shares.argmax(axis=1)
        table["template_share"] = shares[:, contexts.names.index(TEMPLATE)]
        fires = table["n_active"] > 0
        table["main_context"] = [contexts.names[i] if f else None for i, f in zip(strongest, fires, strict=True)]
        table["main_context_share"] = shares[np.arange(len(shares)), strongest]
        for i, name in enumerate(contexts.names[:-1]):
            table[f"share_{name}"] = shares[:, i]
    return table


def with_positions(table: pandas.DataFrame, shares: Float[Tensor, "dict_size places"]) -> pandas.DataFrame:
    """Return the table with template_share_before_response (the last 8 tokens before one) and
    response_share_first_9."""
    before, first = PLACES.index("template_other"), PLACES.index("response_later")
    return table.assign(
        template_share_before_response=shares[:, :before].sum(dim=1).numpy(),
        response_share_first_9=shares[:, before + 1 : first].sum(dim=1).numpy(),
    )


def write_table(
    run: Path,
    table: pandas.DataFrame,
    scales: LatentScales,
    cache: ActivationCache,
    written: Mapping[str, files.Written] | None = None,
) -> None:
    """Write RUN/latents.json: the table by columns, undefined numbers as null. `written`: the files beside it."""
    columns = {"latent": table.index.tolist()}
    for name in table.columns:
        columns[name] = [_plain(value) for value in table[name].tolist()]
    described: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "n_tokens": scales.n_tokens,
        "n_blocks": scales.n_blocks,
        "n_folded_groups": n_folded(cache.manifest["groups"]),
        "cache": {"path": str(cache.path), "hash": cache.manifest_hash},
        "thresholds": Thresholds()._asdict(),
        "columns": columns,
        "files": {name: entry._asdict() for name, entry in (written or {}).items()},
    }
    files.write_json(run / "latents.json", described)


def _plain(value: Any) -> Any:
    return None if value is pandas.NA or (isinstance(value, float) and not math.isfinite(value)) else value


def read_table(run: Path) -> pandas.DataFrame:
    """Return the latent table that `diffing scale` wrote.

    Raises:
        InputError: there is none.
        CorruptData: it cannot be read, or has another number of latents than latents.json.
    """
    if not (run / "latents.json").is_file():
        raise InputError(f"{str(run)!r} has no latent table (latents.json). Make it first: diffing scale {run}")
    require_one_table(run)
    listed = files.read_model(run / "latents.json", LatentRecord)["columns"]
    try:
        table = pandas.read_parquet(run / "latents.parquet")
    except (OSError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise CorruptData(f"{run / 'latents.parquet'} cannot be read ({cause}). Run diffing scale again.") from None
    if table.index.tolist() != listed["latent"]:
        raise CorruptData(f"{run / 'latents.parquet'} and latents.json list other latents. Run diffing scale again.")
    return table


def require_latents(latents: list[int], dict_size: int) -> tuple[int, ...]:
    """Return the latents, or raise one line that says what is wrong with the list."""
    if not latents:
        raise InputError("latents is an empty list, so there is nothing to do. Name at least one, or leave it out.")
    wrong = [j for j in latents if not 0 <= j < dict_size]
    if wrong:
        raise InputError(f"there is no latent {wrong[0]}: this crosscoder has latents 0 to {dict_size - 1}.")
    if len(set(latents)) < len(latents):
        raise InputError(f"latents {latents} names one of them twice. Name each once.")
    return tuple(latents)


def cache_tokenizer(cache: ActivationCache) -> Any:
    """Return the tokenizer with which a cache was made."""
    config = cache.manifest["config"]
    return inspect_pair(
        config["base"], config["tuned"], [config["hook_point"]], tokenizer=config["tokenizer"]
    ).tokenizer
