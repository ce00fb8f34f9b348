"""Two whole models with one tokenizer, checked before weights load, and that they are two."""

from pathlib import Path

import torch

from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.records import Record
from crosscoders.models.names import hash_model, load_auto, require_two_models
from crosscoders.models.pair import ModelPair, PairInfo, inspect_pair, load_pair

HOOK_POINT = "blocks.0.hook_resid_post"
"""Nothing is read there; a pair is loaded whole."""


def inspect_two(base: str, tuned: str, tokenizer: str | None) -> PairInfo:
    """Check a pair by its files.

    Raises:
        InputError: as `inspect_pair`; base and tuned are one model.
    """
    info = inspect_pair(base, tuned, [HOOK_POINT], tokenizer=tokenizer)
    require_two_models(base, tuned)
    return info


def inspect_null(info: PairInfo, null: str) -> PairInfo:
    """Check a null model by its files; it reads the ids of the pair's tokenizer.

    Raises:
        InputError: it is the base or the tuned model, or was made from another base.
    """
    inspected = inspect_pair(info.base, null, [HOOK_POINT], tokenizer=info.tokenizer.name_or_path)
    if Path(null).is_dir() and hash_model(null) in [hash_model(m) for m in (info.base, info.tuned) if Path(m).is_dir()]:
        raise InputError(f"null {null!r} is the base or the tuned model itself. Give a model without the behaviour.")
    made = Path(null) / "made.json"
    recorded = files.read_model(made, Record).get("base") if made.is_file() else None
    if recorded is not None and recorded != hash_model(info.base):
        raise InputError(f"null {null!r} was made from another base than {info.base!r}. Make one from this base.")
    if inspected.adapter is None:
        texts = [load_auto(name, "config").get_text_config() for name in (info.base, null)]
        for key in ("model_type", "num_hidden_layers", "vocab_size"):
            first, second = (getattr(text, key, None) for text in texts)
            if first != second:
                raise InputError(
                    f"null {null!r} has another base: its {key} is {second!r}, that of {info.base!r} {first!r}. "
                    "Give a model that was tuned from this base."
                )
    return inspected


def load_two(info: PairInfo, device: str, dtype: str) -> ModelPair:
    """Load both models whole."""
    return load_pair(info.base, info.tuned, HOOK_POINT, device=device, dtype=dtype, info=info, whole=True)


@torch.inference_mode()
def require_different(pair: ModelPair, prompt: list[int]) -> None:
    """Raise InputError where both models give exactly the same logits after a prompt."""
    ids = torch.tensor([prompt], device=pair.device)
    base, tuned = (model(input_ids=ids).logits[..., : pair.info.n_ids] for model in pair.models)
    if torch.equal(base, tuned):
        raise InputError(
            f"base {pair.info.base!r} and tuned {pair.info.tuned!r} predict exactly the same, so there is nothing to "
            "tell apart. Check the paths."
        )
