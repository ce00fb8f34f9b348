"""Model, dictionaries and tokens, checked by configurations and headers before any weights load."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from crosscoders.common import files
from crosscoders.common.devices import model_dtype
from crosscoders.common.errors import InputError
from crosscoders.common.seals import checksum
from crosscoders.models import hooks, loading, points
from crosscoders.models.limits import require_readable
from crosscoders.models.names import hash_model, load_auto, require_no_lost_path
from crosscoders.models.skeleton import skeleton
from crosscoders.text.packing import separated
from crosscoders.text.padding import Batch, padding_id
from crosscoders.text.tokens import Rows, pad_rows, tokenize_documents
from sae_lora.dictionaries.frozen import DictionaryInfo, FrozenDictionary, Side, require_fit, require_spliceable
from sae_lora.dictionaries.loading import inspect_dictionary, read_dictionary
from sae_lora.fitting.settings import TextConfig
from sae_lora.splicing import special_ids


class Plan(NamedTuple):
    """What is known before weights load."""

    model: str
    model_hash: str
    skeleton: nn.Module
    """The model without weights."""
    n_layers: int
    infos: list[DictionaryInfo]
    rows: Rows
    keep_ids: list[int]
    pad_id: int
    other: dict[str, str] | None = None
    """Name and hash of the crosscoder's other model."""

    def batches(self, batch_rows: int, device: torch.device, order: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield all sequences once, in an order that is a pure function of the plan; or the batches of these
        numbers."""
        batches = self.rows.batches(batch_rows)
        for number in range(len(batches)) if order is None else order:
            yield pad_rows(self.rows, batches[number], self.pad_id).to(device)

    def token_hash(self) -> str:
        """Return sha256 over the checksums of the token ids and of the borders of sequences."""
        return files.hash_json([checksum(array.tobytes()) for array in (self.rows.ids, self.rows.offsets)])


def make_plan(
    config: TextConfig,
    model: str,
    dictionaries: list[tuple[str, str | None]],
    side: Side | None = None,
    *,
    fitted_to: dict[str, str] | None = None,
    foreign: bool = False,
    other: str | None = None,
) -> Plan:
    """Check everything that can be wrong with model, dictionaries and data.

    fitted_to: name and hash of the model of an adapter, which has to be this one. foreign: the dictionaries are of
    another model. other: the other model of a crosscoder, for latents of the pair.

    Raises:
        InputError: a model or dictionary that is not there, two that do not fit each other, two dictionaries at one
            hook point, a hook point that the model does not have, another model than the adapter's; too few tokens.
        CorruptData: a damaged dictionary.
    """
    require_no_lost_path(model)
    loading.require_whole(model)
    model_config = load_auto(model, "config")
    loading.require_loadable(model, model_config)
    text = model_config.get_text_config()
    infos = [
        inspect_dictionary(path, hook_point=point, side=side, model_type=text.model_type)
        for path, point in dictionaries
    ]
    model_hash = hash_model(model)
    if fitted_to is not None and fitted_to["hash"] != model_hash:
        raise InputError(
            f"model {model!r} is not the one that the adapter was fitted to ({fitted_to['name']}): their weights "
            "differ. Give that one with --model."
        )
    modules = skeleton(model)
    for info in infos:
        require_spliceable(info)
        known = {"d_model": points.width(text, info.hook_point), "n_layers": text.num_hidden_layers}
        require_fit(info, **known, model_name=model, model_hash=None if foreign else model_hash)
        hooks.find_module(modules, info.hook_point)
    if foreign and all(model_hash in info.model_hashes for info in infos):
        raise InputError(f"foreign_dictionary is set, but {infos[0].path!r} was trained on {model!r}. Leave it out.")
    beside = None if other is None else _beside(other, infos, model_hash)
    if beside is not None:
        infos = [replace(infos[0], settings={**infos[0].settings, "other_model": beside["hash"]})]
    if len({info.hook_point for info in infos}) < len(infos):
        raise InputError(f"two dictionaries sit at {infos[0].hook_point!r}. Give one for each hook point.")
    tokenizer = load_auto(config.tokenizer or model, "tokenizer")
    rows = tokenize_documents(config.data_config(), tokenizer)
    if config.pack:
        rows = separated(rows, tokenizer).packed(config.n_tokens // config.context_length, config.context_length)
    require_readable(rows, [model], tokenizer)
    infos.sort(key=lambda info: points.place(info.hook_point))
    return Plan(
        model, model_hash, modules, text.num_hidden_layers, infos, rows, special_ids(tokenizer),
        padding_id(tokenizer, int(text.vocab_size)), beside,
    )  # fmt: skip


def _beside(other: str, infos: list[DictionaryInfo], model_hash: str) -> dict[str, str]:
    """Return the name and hash of the other model, after checking that the one dictionary is a side of their
    crosscoder."""
    if len(infos) > 1 or infos[0].side not in ("base", "tuned"):
        raise InputError(
            f"other_model {other!r} is for one crosscoder of two models with side base or tuned. Leave it out."
        )
    require_no_lost_path(other)
    text, other_hash = load_auto(other, "config").get_text_config(), hash_model(other)
    known = {"d_model": points.width(text, infos[0].hook_point), "n_layers": text.num_hidden_layers}
    require_fit(infos[0], **known, model_name=other, model_hash=other_hash)
    if other_hash == model_hash:
        raise InputError(f"other_model {other!r} is the model itself. Give the other one of the crosscoder's pair.")
    return {"name": other, "hash": other_hash}


def load_dictionaries(plan: Plan, config: TextConfig, device: torch.device) -> list[FrozenDictionary]:
    """Load the dictionaries of a plan, from the lowest on."""
    other = None
    if plan.other is not None:
        n_layers = points.layer_of(plan.infos[0].hook_point) + 1
        other = _pretrained(plan.other["name"], config, device, n_layers)
    read = [point for info in plan.infos for point in info.settings.get("hook_points", ())]  # over layers of the model
    if read:
        other = _pretrained(plan.model, config, device, 1 + max(points.layer_of(point) for point in read))
    return [read_dictionary(info, other).to(device) for info in plan.infos]


def load_model(plan: Plan, config: TextConfig, device: torch.device) -> nn.Module:
    """Load the whole model, frozen and in evaluation mode.

    Raises:
        InputError, CorruptData: weights that do not load.
    """
    return _pretrained(plan.model, config, device)


def _pretrained(name: str, config: TextConfig, device: torch.device, n_layers: int | None = None) -> nn.Module:
    model: nn.Module = loading.load_model(name, model_dtype(config.model_dtype, device), n_layers=n_layers)
    return model.eval().requires_grad_(False).to(device)
