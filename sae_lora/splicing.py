r"""Put frozen dictionaries into a running model, at one or many hook points, and prove that they ran.

    replace   x -> x_hat                          at every position that is not kept
    error     x -> x_hat + (x - x_hat).detach()   the numbers of x, the gradients of x_hat
    off       x -> x                              counts only

Kept positions (padding, token ids such as BOS and EOS, the first position where there is no BOS) have their own
activation in every mode.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from crosscoders.common.errors import InputError
from crosscoders.models import hooks
from crosscoders.models.hooks import core_model
from sae_lora.dictionaries.frozen import FrozenDictionary, require_spliceable

Mode = Literal["replace", "error", "off"]
Observe = Callable[[FrozenDictionary, Tensor, Tensor, Tensor], None]
"""Gets the dictionary, and x, latents and x_hat of the positions that are not kept."""


FIRST_POSITION = -1
"""Stands among kept ids for the first position of each sequence, whatever its id."""


def kept_positions(
    ids: Int[Tensor, "rows seq"], attention_mask: Tensor, keep_ids: Sequence[int]
) -> Bool[Tensor, "rows seq"]:
    """Return which positions keep their activation: padding, and those of `keep_ids`.

    With a key-value cache the mask is longer than the ids, which are then its last.
    """
    is_kept = torch.isin(ids, torch.tensor(sorted(keep_ids), dtype=torch.int64, device=ids.device))
    is_padding = attention_mask == 0
    if FIRST_POSITION in keep_ids:
        is_padding |= attention_mask.cumsum(dim=1) == 1  # the first token, and what padding follows it
    return is_kept | is_padding[:, -ids.shape[1] :]


class Spliced:
    """State of one `splice`: counts of what ran, and which positions of the running pass are kept."""

    def __init__(self, hook_points: Sequence[str], keep_ids: Sequence[int]) -> None:
        self.fired = dict.fromkeys(hook_points, 0)
        """Forward passes in which each hook point was reached."""
        self.keep_ids = list(keep_ids)
        self.is_kept: Bool[Tensor, "rows seq"] | None = None

    def start(self, ids: Int[Tensor, "rows seq"] | None, attention_mask: Tensor | None, n_past: int) -> None:
        """Find the kept positions of a pass after `n_past` tokens of a key-value cache."""
        if not isinstance(ids, Tensor):
            raise InputError("splice needs the token ids to know BOS, EOS and padding. Call the model with input_ids.")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise InputError(
                f"splice reads padding from an attention mask of shape (rows, seq), not "
                f"{tuple(attention_mask.shape)}. Pass the padding mask."
            )
        if attention_mask is None:
            attention_mask = ids.new_ones(len(ids), n_past + ids.shape[1])
        self.is_kept = kept_positions(ids, attention_mask, self.keep_ids)

    def kept_at(self, hook_point: str, x: Tensor) -> Bool[Tensor, "rows seq"]:
        if self.is_kept is None or self.is_kept.shape != x.shape[:2]:
            raise InputError(
                f"hook_point {hook_point!r} ran outside a forward pass of the whole model (or is recomputed by "
                "gradient checkpointing), so kept positions are unknown. Call the language model itself, without "
                "checkpointing."
            )
        return self.is_kept


@contextlib.contextmanager
def splice(
    model: nn.Module,
    dictionaries: FrozenDictionary | Sequence[FrozenDictionary],
    *,
    mode: Mode = "replace",
    keep_ids: Sequence[int] = (),
    observe: Observe | None = None,
) -> Iterator[Spliced]:
    """Run `model` with the dictionaries at their hook points; hooks are removed at the end, on errors too.

    keep_ids: token ids whose positions keep their activation, normally BOS and EOS (`special_ids`); `FIRST_POSITION`
    among them keeps the first position of each sequence. Padding, as the attention mask says, is always kept.
    Activations are cast to the dictionary's type and back. `model` may be a Hugging Face decoder, the same under PEFT,
    or a TransformerBridge. Splices nest.

    Raises:
        InputError: no such hook point; two dictionaries at one; a transcoder; a model called without ids; a hook point
            that was never reached until the end of the block.
    """
    if mode not in ("replace", "error", "off"):
        raise InputError(f"mode {mode!r} is unknown. Use replace, error or off.")
    chosen = [dictionaries] if isinstance(dictionaries, FrozenDictionary) else list(dictionaries)
    for dictionary in chosen:
        require_spliceable(dictionary.info)
    names = [dictionary.hook_point for dictionary in chosen]
    if not names or len(set(names)) < len(names):
        raise InputError(f"splice needs one dictionary for each hook point; it got {', '.join(names) or 'none'}.")
    state = Spliced(names, keep_ids)

    def begin(_module: nn.Module, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        ids: Any = settings.get("input_ids", args[0] if args else None)
        attention_mask = settings.get("attention_mask")
        past = settings.get("past_key_values") or settings.get("cache")  # by the version of transformers
        state.start(ids, attention_mask, past.get_seq_length() if past else 0)
        for dictionary in chosen:
            dictionary.begin(ids, attention_mask)

    def end(*_: Any) -> None:
        state.is_kept = None

    with contextlib.ExitStack() as stack:
        core = core_model(model)
        stack.callback(core.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(core.register_forward_hook(end, always_call=True).remove)
        for dictionary in chosen:
            edit = _edit(dictionary, mode, state, observe)
            stack.enter_context(hooks.replace(model, dictionary.hook_point, edit))
        yield state
    missing = [name for name, count in state.fired.items() if not count]
    if missing:
        raise InputError(
            f"the splice at {missing[0]!r} never fired: {type(model).__name__} was not run, or not through that point."
        )


def _edit(
    dictionary: FrozenDictionary, mode: Mode, state: Spliced, observe: Observe | None
) -> Callable[[Tensor], Tensor]:
    def edit(x: Float[Tensor, "rows seq d_model"]) -> Float[Tensor, "rows seq d_model"]:
        is_kept = state.kept_at(dictionary.hook_point, x)
        state.fired[dictionary.hook_point] += 1
        if x.shape[-1] != dictionary.info.d_model:
            raise InputError(
                f"dictionary {dictionary.info.path!r} has d_model {dictionary.info.d_model} but the activation at "
                f"{dictionary.hook_point!r} has {x.shape[-1]}. Choose a dictionary of this model."
            )
        if mode == "off" and observe is None:
            return x
        flat = x.flatten(0, 1).to(dictionary.dtype)
        latents, x_hat = dictionary.reconstruct(flat)
        if observe is not None:
            used = ~is_kept.flatten()
            observe(dictionary, flat[used], latents[used], x_hat[used])
        if mode == "off":
            return x
        new = x_hat.to(x.dtype).view_as(x)
        if mode == "error":
            new = new + (x - new).detach()
        return torch.where(is_kept[..., None], x, new)

    return edit


def special_ids(tokenizer: Any) -> list[int]:
    """Return the ids of BOS, EOS and padding, as far as the tokenizer has them: what `keep_ids` normally is.

    Where there is no BOS, `FIRST_POSITION` is among them: the first position is then what BOS is elsewhere.
    """
    bos = FIRST_POSITION if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = (bos, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return sorted({int(i) for i in ids if i is not None})
