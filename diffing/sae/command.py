"""`diffing sae`: one SAE on the activations of both models -> OUT/sae.json and OUT/sae.parquet.

Order: everything that can be wrong, by configurations; activations of the pair and of the null into caches, as
`crosscoders cache` makes them; rates; attribution and patching on chats; thresholds; twins.
"""

import io
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import torch

from crosscoders import ActivationCache, CacheConfig, cache_activations
from crosscoders.common import files
from crosscoders.common.checks import to_dict
from crosscoders.common.devices import choose_device
from crosscoders.common.errors import InputError
from crosscoders.common.progress import about, say
from crosscoders.common.results import result, row, say_closing
from crosscoders.models.names import hash_model, require_two_models
from crosscoders.models.pair import ModelPair, PairInfo, inspect_pair, load_pair
from crosscoders.text.chats import Chat, read_chats
from diffing.causal.patching import measure
from diffing.causal.summary import causal_rows
from diffing.latents.contexts import strongest_examples
from diffing.latents.table import cache_tokenizer
from diffing.null.runs import null_cache
from diffing.sae.dictionaries import directions, inspect_sae, require_twins
from diffing.sae.patching import SharedExchange, attribute, latent_sets
from diffing.sae.rates import Rates, compare_rates, in_both
from diffing.sae.settings import SaeSettings
from diffing.sae.summary import sae_summary
from diffing.sae.thresholds import first, orders_of, threshold_rows, with_ranks
from diffing.sae.twins import Alignment, alignment, quality_rows, require_aligned, splice_rows
from sae_lora.dictionaries.frozen import DictionaryInfo, FrozenDictionary
from sae_lora.dictionaries.loading import read_dictionary

FORMAT, FORMAT_VERSION = "diffing-sae", 1
DIRECTION = "base_to_tuned"


@dataclass(frozen=True)
class Inputs:
    """What a run of the command has checked before weights load."""

    settings: SaeSettings
    info: DictionaryInfo
    twin: DictionaryInfo | None
    pair: PairInfo
    chats: list[Chat]

    @property
    def cache_config(self) -> CacheConfig:
        return _cache_config(self.settings, self.info.hook_point)


def sae(settings: SaeSettings) -> dict[str, Any]:
    """Run `diffing sae`."""
    started, out = time.perf_counter(), Path(settings.out)
    inputs = inspect(settings)
    device = choose_device(settings.device)
    dictionary = read_dictionary(inputs.info).to(device)
    twin = None if inputs.twin is None else read_dictionary(inputs.twin).to(device)
    aligned = None
    if twin is not None:
        aligned = alignment(directions(dictionary), directions(twin), settings.seed)
        require_aligned(aligned, settings.sae, str(settings.tuned_sae))
    cache = cache_activations(inputs.cache_config)
    say(f"read {settings.sae} in both models at {inputs.info.hook_point}")
    rates = {"sae": compare_rates(dictionary, cache, seed=settings.seed)}
    table, entries = with_causes(inputs, dictionary, rates["sae"], settings.tuned, "sae")
    if twin is not None and aligned is not None:
        with about("tuned SAE"):
            rates["tuned_sae"] = compare_rates(twin, cache, seed=settings.seed)
        table, rows = with_twin(table, rates["tuned_sae"].table, aligned)
        entries += rows
    null = read_null(inputs, dictionary, cache, out)
    entries += threshold_rows(table, None if null is None else null[0], settings.n_latents)
    if null is not None:
        entries += null[1]
        table = table.join(null[0][_shared_columns(null[0])].add_prefix("null_"))
    entries += quality_rows(rates)
    if inputs.chats:
        both = {"sae": dictionary} | ({} if twin is None else {"tuned_sae": twin})
        pair = _load(inputs, settings.tuned)
        entries += splice_rows(both, pair, inputs.chats, batch_rows=settings.batch_rows, seed=settings.seed)
    shown = {order: first(table, order, settings.n_latents) for order in orders_of(table)}
    described = {
        "format": FORMAT, "format_version": FORMAT_VERSION, **result("sae", to_dict(settings), entries),
        "dictionary": dictionary.identity(), "tuned_dictionary": None if twin is None else twin.identity(),
        "cache": {"path": str(cache.path), "hash": cache.manifest_hash},
        "null": None if settings.null is None else {"name": settings.null, "hash": hash_model(settings.null)},
        "orders": {order: [_plain_row(table, latent) for latent in chosen] for order, chosen in shown.items()},
        "examples": contexts_of(dictionary, cache, sorted({j for chosen in shown.values() for j in chosen})),
    }  # fmt: skip
    parquet = io.BytesIO()
    table.to_parquet(parquet)
    files.write_bytes(out / "sae.parquet", parquet.getvalue())
    files.write_json(out / "sae.json", described)
    say_closing(started, f"{len(table):,} latents in {out / 'sae.parquet'}, {len(entries)} rows in {out / 'sae.json'}")
    return described | {"text": sae_summary(described)}


def inspect(settings: SaeSettings) -> Inputs:
    """Check everything that can be wrong, before weights load.

    Raises:
        InputError: dictionaries, models, a null or data that do not fit each other.
    """
    is_patched = settings.n_documents > 0
    info = inspect_sae(settings.sae, settings.base, settings.hook_point, is_patched=is_patched)
    twin = None
    if settings.tuned_sae is not None:
        hook_point = settings.hook_point or info.hook_point
        twin = inspect_sae(settings.tuned_sae, settings.tuned, hook_point, is_patched=is_patched)
        require_twins(info, twin)
    pair = inspect_pair(settings.base, settings.tuned, [info.hook_point])
    require_two_models(settings.base, settings.tuned)
    if settings.null is not None:
        require_null(settings, info.hook_point, pair.tokenizer.name_or_path)
    config = _cache_config(settings, info.hook_point)
    chats = read_chats(config.data_config(), pair.tokenizer, settings.n_documents) if settings.n_documents else []
    return Inputs(settings, info, twin, pair, chats)


def require_null(settings: SaeSettings, hook_point: str, tokenizer: str) -> None:
    """Raise InputError unless the null is another tune of the same base, as far as configurations say it."""
    assert settings.null is not None
    try:
        inspect_pair(settings.base, settings.null, [hook_point], tokenizer=tokenizer)
    except InputError as error:
        raise InputError(f"null {settings.null!r} is no tune of this base: {error}") from None
    if hash_model(settings.null) in (hash_model(settings.tuned), hash_model(settings.base)):
        raise InputError(
            f"null {settings.null!r} is the tuned model or the base itself. Give a model that was tuned without the "
            "new behaviour."
        )


def _cache_config(settings: SaeSettings, hook_point: str) -> CacheConfig:
    shared = (
        "base tuned data n_tokens context_length chat_template template_date model_dtype device batch_rows seed".split()
    )
    given = {name: getattr(settings, name) for name in shared}
    return CacheConfig(**given, hook_point=hook_point, out=str(Path(settings.out) / "cache"))


def _load(inputs: Inputs, tuned: str) -> ModelPair:
    settings, info = inputs.settings, inputs.pair
    if tuned != settings.tuned:
        tokenizer = info.tokenizer.name_or_path
        info = inspect_pair(settings.base, tuned, [inputs.info.hook_point], tokenizer=tokenizer)
    return load_pair(
        settings.base, tuned, inputs.info.hook_point,
        device=settings.device, dtype=settings.model_dtype, info=info, whole=True,
    )  # fmt: skip


def with_causes(
    inputs: Inputs, dictionary: FrozenDictionary, rates: Rates, tuned: str, name: str
) -> tuple[pandas.DataFrame, list[dict[str, Any]]]:
    """Return the table of rates with attribution and KL closed, and rows about them; `tuned`: the model compared."""
    settings, table, entries = inputs.settings, rates.table.copy(), []
    if inputs.chats:
        pair = _load(inputs, tuned)
        attributed = attribute(dictionary, pair, inputs.chats, batch_rows=settings.batch_rows)
        table["attribution"] = attributed.values.numpy()
        table["attribution_stderr"] = attributed.stderr.numpy()
        groups = {f"first_by_{order}": first(table, order, settings.n_latents) for order in ("change", "attribution")}
        chosen = sorted({latent for group in groups.values() for latent in group})
        sets = latent_sets(chosen, groups)
        exchange = SharedExchange(dictionary, chosen)
        measured = measure(exchange, pair, inputs.chats, {DIRECTION: sets}, batch_rows=settings.batch_rows)
        table["kl_closed"] = math.nan
        rows = {entry["name"]: entry for entry in causal_rows(measured, seed=settings.seed)}
        kl = rows[f"causal.{DIRECTION}.none.kl"]["value"]
        for latent in chosen:
            share = rows[f"causal.{DIRECTION}.latent_{latent}.share_closed"]
            table.loc[latent, "kl_closed"] = kl * share["value"]
            table.loc[latent, ["kl_closed_low", "kl_closed_high"]] = [
                math.nan if share[side] is None else kl * share[side] for side in ("low", "high")
            ]
        for key in ("none.kl", "all.share_closed", *(f"{group}.share_closed" for group in groups)):
            entries.append(rows[f"causal.{DIRECTION}.{key}"] | {"name": f"{name}.patched.{key}"})
    return with_ranks(table), entries


def with_twin(
    table: pandas.DataFrame, of_twin: pandas.DataFrame, aligned: Alignment
) -> tuple[pandas.DataFrame, list[dict[str, Any]]]:
    """Return the table with what the twin is at each number, and rows about both."""
    cosine = aligned.cosine.numpy()
    table = table.assign(twin_cosine=cosine, twin_turn=1 - cosine, twin_rate_tuned=of_twin["rate_tuned"])
    table["twin_rate_change"] = table["twin_rate_tuned"] - table["rate_base"]
    n = len(table)
    return with_ranks(table), [
        row("sae.twins.aligned", aligned.aligned, "fraction", n),
        row("sae.twins.aligned_permuted", aligned.permuted, "fraction", n),
        row("sae.twins.cosine_median", float(aligned.cosine.median()), "cosine", n),
    ]


def read_null(
    inputs: Inputs, dictionary: FrozenDictionary, cache: ActivationCache, out: Path
) -> tuple[pandas.DataFrame, list[dict[str, Any]]] | None:
    """Return the same table and rows for the null in place of the tuned model; None without a null."""
    settings = inputs.settings
    if settings.null is None:
        return None
    with about("null"):
        opened = null_cache(cache, settings.null, out / "null-cache", settings.device)
        say(f"read {settings.sae} in the base and the null {settings.null}")
        rates = compare_rates(dictionary, opened, seed=settings.seed)
        return with_causes(inputs, dictionary, rates, settings.null, "sae.null")


def contexts_of(dictionary: FrozenDictionary, cache: ActivationCache, latents: list[int]) -> dict[str, Any]:
    """Return the documents in which each latent is strongest, in either model."""
    index = torch.tensor(latents, dtype=torch.int64)
    if not latents:
        return {}
    return strongest_examples(
        lambda x: in_both(dictionary, x, index), cache, latents, cache_tokenizer(cache), n_examples=4
    )


def _shared_columns(table: pandas.DataFrame) -> list[str]:
    return [name for name in ("rate_tuned", "mean_change", "change", "attribution", "kl_closed") if name in table]


def _plain_row(table: pandas.DataFrame, latent: int) -> dict[str, Any]:
    values = json.loads(table.loc[[latent]].to_json(orient="records", double_precision=10))[0]  # undefined: null
    return {"latent": latent, **values}
