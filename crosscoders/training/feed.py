"""What `crosscoders train` reads: a cache, or the models while they run. Both give the same batches for one plan.

Held-out tokens are the last ones of the plan, or a cache of their own.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.activations import needs
from crosscoders.activations.cache import ActivationCache
from crosscoders.activations.plan import make_plan
from crosscoders.activations.scored import DTYPES, Moments, Tokens
from crosscoders.activations.settings import CACHE, CacheConfig
from crosscoders.activations.source import open_source
from crosscoders.activations.stream import BufferedStream, cached_stream, live_stream
from crosscoders.common import files, memory
from crosscoders.common.checks import config_of
from crosscoders.common.command_line import parse
from crosscoders.common.devices import choose_device
from crosscoders.common.errors import InputError
from crosscoders.common.memory import PROCESS_BYTES, Need
from crosscoders.formats.ours import trained_on
from crosscoders.models.names import identity
from crosscoders.training.calibration import MAX_TOKENS
from crosscoders.training.checkpoint import RunRecord
from crosscoders.training.loop import Holdout
from crosscoders.training.settings import TrainConfig, TrainSettings

EVAL_TOKENS = 4096
"""Tokens that an evaluation encodes together."""
MEND = "Lower crosscoder.dict_size, batch_size or buffer_tokens."
RECORDED = ("hook_point", "base", "tuned", "tokenizer_hash", "template_hash", "dtype", "drop_bos")
IF_THERE = ("template_date", "refused")
"""Recorded where the template writes a date, and where rows were left out."""


class Feed(NamedTuple):
    """What training needs of its data, and what is recorded of it."""

    stream: BufferedStream
    holdout: Holdout | None
    inputs: dict[str, Any]
    """For run.json and the crosscoder's provenance."""
    memory: str
    """What it will need, in words."""


def open_feed(settings: TrainSettings) -> Feed:
    """Open batches from the cache that the settings name, or from the models of its config, with nothing stored.

    Raises:
        InputError: no such cache or config; too few tokens; an eval_cache of another pair; as `make_plan`.
        CorruptData: the cache is damaged.
    """
    if settings.eval_cache is not None and settings.holdout_tokens:
        raise InputError("holdout_tokens has no effect with eval_cache. Give one of the two.")
    feed = _from_cache(settings) if settings.cache is not None else _from_models(settings)
    if settings.eval_cache is None:
        return feed
    other = ActivationCache(settings.eval_cache)
    inputs = {**feed.inputs, "eval_cache": {"hash": other.manifest_hash}}
    return feed._replace(holdout=lambda: (tokens.activations for tokens in other.batches(EVAL_TOKENS)), inputs=inputs)


def _from_cache(settings: TrainSettings) -> Feed:
    opened = ActivationCache(str(settings.cache))
    n_train = _n_train(settings, len(opened))
    _require_same_pair(settings, opened.manifest)
    needed = memory.require(
        [_train_need(settings, opened.d_model, opened.manifest["dtype"])], MEND, force=settings.force
    )
    stream = cached_stream(
        opened, batch_size=settings.batch_size, buffer_tokens=settings.buffer_tokens, seed=settings.seed,
        n_tokens=n_train,
    )  # fmt: skip
    own = (
        (lambda: (tokens.activations for tokens in opened.batches(EVAL_TOKENS, n_train)))
        if n_train < len(opened)
        else None
    )
    return Feed(stream, own, cache_inputs(opened), needed)


def cache_inputs(opened: ActivationCache) -> dict[str, Any]:
    """Return what is recorded of a cache beside every result made from it."""
    inputs = {"path": str(opened.path), "hash": opened.manifest_hash, "n_tokens": len(opened)}
    statistics = opened.manifest["statistics"]
    shares = {key: statistics[key] for key in ("top_share", "outlying_share") if key in statistics}
    return {"cache": inputs | _recorded(opened.manifest) | shares}


def _recorded(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what a run records of the manifest of its cache, or of the plan that stands in for one."""
    return {key: manifest[key] for key in RECORDED} | {key: manifest[key] for key in IF_THERE if manifest.get(key)}


def _from_models(settings: TrainSettings) -> Feed:
    path = str(settings.live)
    config = read_cache_config(path)
    n_train = _n_train(settings, config.n_tokens)
    plan = make_plan(config)
    planned = plan.fingerprint(str(config.hook_point))
    planned |= {"groups": plan.rows.group_names, "drop_bos": config.drop_bos}
    _require_same_pair(settings, planned)
    needed = memory.require(
        [
            _train_need(settings, plan.info.d_model, config.dtype),
            needs.cache_need(config, plan, n_points=1, device=choose_device(config.device), shards=False),
        ],
        f"{MEND} Or store a cache first.",
        force=settings.force,
    )
    source = open_source(config, plan)
    stream = live_stream(
        source, n_tokens=n_train, batch_size=settings.batch_size, buffer_tokens=settings.buffer_tokens,
        seed=settings.seed, moments=_known_moments(settings, plan.info.d_model),
    )  # fmt: skip
    # No path: there is no cache to go back to. The hash is that of the plan.
    hashed = files.hash_json({key: identity(value) for key, value in planned.items()})
    inputs = {"hash": hashed, "n_tokens": config.n_tokens} | _recorded({**planned, "refused": plan.rows.refused})
    own = (lambda: _in_eval_batches(source.read(n_train, config.n_tokens))) if n_train < config.n_tokens else None
    return Feed(stream, own, {"cache": inputs}, needed)


def _train_need(settings: TrainSettings, d_model: int, dtype: str) -> memory.Need:
    return train_need(
        settings,
        n_models=2,
        d_model=d_model,
        itemsize=DTYPES[dtype].itemsize,
        n_heldout=MAX_TOKENS if settings.eval_cache is not None else settings.holdout_tokens,
        device=choose_device(settings.device),
    )


def _n_train(settings: TrainSettings, n_tokens: int) -> int:
    """Return the number of tokens to train on, without the held-out ones."""
    held_out = settings.holdout_tokens
    if not held_out:
        return n_tokens
    if held_out < 32:
        raise InputError(f"holdout_tokens = {held_out} is too few to evaluate on. Give 1,000 or more.")
    if n_tokens - held_out < settings.batch_size:
        raise InputError(
            f"holdout_tokens = {held_out} leaves {n_tokens - held_out} of {n_tokens} tokens to train on. Lower it."
        )
    return n_tokens - held_out


def _require_same_pair(settings: TrainSettings, trained_on: dict[str, Any]) -> None:
    if settings.eval_cache is None:
        return
    other = ActivationCache(settings.eval_cache)
    for key in ("hook_point", "d_model", "base", "tuned"):
        if identity(trained_on[key]) != identity(other.manifest[key]):
            raise InputError(
                f"eval_cache {str(other.path)!r} has another {key} than {settings.cache or settings.live!r}. "
                "Cache the same pair."
            )


def read_cache_config(path: str) -> CacheConfig:
    """Read the settings of `crosscoders cache` in a YAML file, for one hook point.

    Raises:
        InputError: no such file, a wrong setting, or one that means nothing without a cache.
    """
    if not Path(path).is_file():
        raise InputError(f"config file {path!r} does not exist. Check the path of --live.")
    settings = parse("crosscoders", CACHE, ["--config", path, "--out", "-"]).settings
    for name in ("part", "devices", "max_norm_multiple"):
        if getattr(settings, name) is not None:
            raise InputError(f"{name} in {path!r} has no effect with --live, which has no shards. Remove it.")
    if not isinstance(settings.hook_point, str):
        raise InputError(f"{path!r} names {len(settings.hook_point)} hook points; --live trains on one. Name one.")
    return config_of(CacheConfig, settings)


def _known_moments(settings: TrainSettings, d_model: int) -> Moments | None:
    """Return the moments that the settings give, or that an interrupted run was started with; None: measure them."""
    path = Path(settings.out) / "run.json"
    stream = files.read_model(path, RunRecord)["inputs"].get("stream", {}) if path.is_file() else {}
    norm = settings.mean_norm or [float(value) for value in stream.get("mean_norm", [])]
    if not norm or (settings.input_norm == "centred" and "mean" not in stream):
        return None
    nothing = [[0.0] * d_model for _ in norm]  # sqrt_d uses the norms alone
    return Moments(stream.get("mean", nothing), norm, stream.get("square", [value**2 for value in norm]))


def _in_eval_batches(parts: Iterable[Tokens]) -> Iterator[Float[Tensor, "_ n_models d_model"]]:
    for part in parts:
        yield from part.activations.split(EVAL_TOKENS)


def require_same_source(crosscoder: str | Path, opened: ActivationCache) -> None:
    """Raise InputError when one of our crosscoders was trained on another pair or hook point than the cache holds."""
    trained = trained_on(Path(crosscoder))
    for key in ("hook_point", "base", "tuned"):
        if key in trained and identity(trained[key]) != identity(opened.manifest[key]):
            raise InputError(
                f"cache {str(opened.path)!r} has another {key} ({_named(opened.manifest[key])!r}) than the crosscoder "
                f"was trained on ({_named(trained[key])!r}). Cache the pair and hook point of the crosscoder."
            )


def _named(entry: Any) -> Any:
    return entry["name"] if isinstance(entry, dict) else entry


def train_need(
    config: TrainConfig, *, n_models: int, d_model: int, itemsize: int, n_heldout: int, device: torch.device
) -> Need:
    """Return the memory for weights, gradients and Adam's moments, the latents of a batch, the shuffled buffer, and the
    held-out tokens that calibration reads.

    itemsize: bytes of a stored activation.
    """
    size = config.crosscoder.dict_size
    n_parameters = size * (2 * n_models * d_model + 1) + n_models * d_model
    width = n_models * d_model
    # Pre-activations, and two more of their size in selection or in the dense gradient; inputs and reconstructions.
    batch = config.batch_size * (3 * size + 6 * width) * 4
    # One buffer, and the next one that is filled beside it.
    buffer = min(2 * config.buffer_tokens, max(config.n_tokens, config.batch_size)) * width * itemsize
    buffer += min(n_heldout, MAX_TOKENS) * width * itemsize
    moments = config.adam_bits // 4
    state = (4 + moments) * n_parameters  # a checkpoint: weights and moments, serialised
    if device.type == "cuda":
        return Need(PROCESS_BYTES + 4 * n_parameters + state + buffer, (8 + moments) * n_parameters + batch, device)
    return Need(PROCESS_BYTES + (8 + moments) * n_parameters + max(batch, state) + buffer)
