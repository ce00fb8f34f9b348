"""Model, dictionaries and tokens, checked by configurations and headers before any weights load."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from crosscoders import hooks, store
from crosscoders.errors import CorruptData, InputError
from crosscoders.names import load_auto, require_no_lost_path
from crosscoders.pair import hash_model, model_dtype, quiet_transformers
from crosscoders.tokens import Rows, pad_rows, read_template, tokenize_documents
from sae_lora.config import TextConfig
from sae_lora.dictionary import DictionaryInfo, FrozenDictionary, Side, require_fit
from sae_lora.loading import inspect_dictionary, read_dictionary
from sae_lora.splicing import special_ids


class Batch(NamedTuple):
    """Padded sequences on the device of the model."""

    ids: Int[Tensor, "rows seq"]
    attention_mask: Int[Tensor, "rows seq"]
    scored: Bool[Tensor, "rows seq"]
    """Tokens whose prediction counts in cross-entropy: no padding, no BOS."""
    numbers: Int[np.ndarray, " rows"]
    """Number of each sequence."""


class Plan(NamedTuple):
    """What is known before weights load."""

    model: str
    model_hash: str
    n_layers: int
    infos: list[DictionaryInfo]
    rows: Rows
    keep_ids: list[int]
    pad_id: int

    def batches(self, batch_rows: int, device: torch.device) -> Iterator[Batch]:
        """All sequences once, in an order that is a pure function of the plan."""
        for numbers in self.rows.batches(batch_rows):
            found = pad_rows(self.rows, numbers, self.pad_id)
            ids, mask, scored = (
                torch.from_numpy(array).to(device) for array in (found.ids, found.attention_mask, found.scored)
            )
            yield Batch(ids, mask, scored, numbers)

    def token_hash(self) -> str:
        """sha256 over the checksums of the token ids and of the borders of sequences."""
        return store.hash_json([store.checksum(array.tobytes()) for array in (self.rows.ids, self.rows.offsets)])


def make_plan(
    config: TextConfig,
    model: str,
    dictionaries: list[tuple[str, str | None]],
    side: Side | None = None,
    *,
    fitted_to: dict[str, str] | None = None,
) -> Plan:
    """Check everything that can be wrong with model, dictionaries and data.

    fitted_to: name and hash of the model of an adapter, which has to be this one.

    Raises:
        InputError: a model or dictionary that is not there, two that do not fit each other, two dictionaries at one
            hook point, a hook point off the residual stream, another model than the adapter's; too few tokens.
        CorruptData: a damaged dictionary.
    """
    require_no_lost_path(model)
    text = load_auto(model, "config").get_text_config()
    infos = [inspect_dictionary(path, hook_point=point, side=side) for path, point in dictionaries]
    model_hash = hash_model(model)
    if fitted_to is not None and fitted_to["hash"] != model_hash:
        raise InputError(
            f"model {model!r} is not the one that the adapter was fitted to ({fitted_to['name']}): their weights "
            "differ. Give that one with --model."
        )
    for info in infos:
        known = {"d_model": text.hidden_size, "n_layers": text.num_hidden_layers}
        require_fit(info, **known, model_name=model, model_hash=model_hash)
        if not hooks.is_residual(info.hook_point):
            raise InputError(
                f"dictionary {info.path!r} sits at {info.hook_point!r}; fit and eval take hook_resid_pre and _post. "
                "Use sae_lora.splice with a TransformerBridge for others."
            )
    if len({info.hook_point for info in infos}) < len(infos):
        raise InputError(f"two dictionaries sit at {infos[0].hook_point!r}. Give one for each hook point.")
    tokenizer = load_auto(model, "tokenizer")
    rows = tokenize_documents(config.cache_config(model), tokenizer, read_template(config.chat_template))
    if config.pack:
        rows = packed(rows, config.n_tokens // config.context_length, config.context_length)
    pad = tokenizer.pad_token_id
    infos.sort(key=lambda info: (hooks.layer_of(info.hook_point), info.hook_point.endswith("post")))
    return Plan(
        model, model_hash, text.num_hidden_layers, infos, rows, special_ids(tokenizer), 0 if pad is None else int(pad)
    )


def packed(rows: Rows, n_rows: int, length: int) -> Rows:
    """All documents end to end, each with its BOS, cut into `n_rows` sequences of `length` tokens."""
    n = n_rows * length
    return rows._replace(
        ids=rows.ids[:n], roles=rows.roles[:n], scored=rows.scored[:n], offsets=np.arange(0, n + 1, length),
        groups=np.zeros(n_rows, dtype=np.int64), n_scored=int(rows.scored[:n].sum()),
    )  # fmt: skip


def load_dictionaries(plan: Plan, device: torch.device) -> list[FrozenDictionary]:
    """The dictionaries of a plan, from the lowest on."""
    return [read_dictionary(info).to(device) for info in plan.infos]


def load_model(plan: Plan, config: TextConfig, device: torch.device) -> nn.Module:
    """The whole model, frozen and in evaluation mode.

    Raises:
        InputError, CorruptData: weights that do not load.
    """
    import transformers
    from safetensors import SafetensorError

    dtype = model_dtype(config.model_dtype, device)
    try:
        with quiet_transformers():
            model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(plan.model, dtype=dtype)
    except SafetensorError as error:
        raise CorruptData(f"the weights of {plan.model!r} are damaged ({error}). Copy them again.") from None
    except (OSError, ValueError, RuntimeError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the weights of {plan.model!r} do not load: {line} Check the folder's files.") from error
    return model.eval().requires_grad_(False).to(device)
