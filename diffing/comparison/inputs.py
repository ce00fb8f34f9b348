"""What a comparison has checked before weights load, and the pairs, rows and chats that its parts read."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from crosscoders.common import files
from crosscoders.common.checks import LEAST_CHATS, to_dict
from crosscoders.common.errors import InputError
from crosscoders.models.adapters import with_adapter
from crosscoders.models.limits import require_readable
from crosscoders.models.loading import load_model
from crosscoders.models.names import hash_model, identity, quiet_transformers
from crosscoders.models.pair import ModelPair, PairInfo, inspect_pair, load_pair
from crosscoders.text.chats import Chat
from crosscoders.text.settings import DataConfig, DataSource
from crosscoders.text.tokens import Rows, read_template, tokenize_documents
from diffing.causal.patching import read_enough_chats
from diffing.comparison.settings import DIRECTIONS, TRAINED, TRAINED_DIRECTIONS, CompareSettings
from diffing.comparison.truth import Behaviour, read_truth
from diffing.samples.pairs import inspect_null, inspect_two

SAME_RESULT = ("out", "methods", "n_seeds", "device", "seed")
"""Settings that do not change what one method gives for one model and seed."""
PLACES = ("base", "tuned", "null", "data", "train_data", "truth", "tokenizer", "chat_template")
"""Settings that say where something lies; what it holds decides."""
TRAINING = ("cached_tokens", "train_tokens", "distil_steps")
"""Settings that only trained methods read."""


class Documents(NamedTuple):
    """What one seed reads."""

    rows: Rows
    chats: list[Chat]
    """None where no method of directions is chosen."""
    train_hash: str | None
    """Of the tokens that trained methods are trained on, where such are chosen."""


@dataclass(frozen=True)
class Inputs:
    """A comparison whose files fit each other."""

    settings: CompareSettings
    hook_point: str
    infos: dict[str, PairInfo]
    """`tuned`, and `null` where there is one."""
    truth: list[Behaviour]
    template: str | None

    def data_config(self, seed: int, n_tokens: int) -> DataConfig:
        """Return which documents one seed reads."""
        settings = self.settings
        return DataConfig(
            data=settings.data, n_tokens=n_tokens, context_length=settings.context_length,
            chat_template=settings.chat_template, template_date=settings.template_date, seed=seed,
        )  # fmt: skip

    def train_data(self) -> str | list[str | DataSource]:
        """Return the documents that trained methods are trained on."""
        settings = self.settings
        return settings.data if settings.train_data is None else settings.train_data

    def documents(self, seed: int) -> Documents:
        """Return what one seed reads; the first seed's, which the check before weights load reads too, is read once.

        Raises:
            InputError: too few tokens or chats, or ids that a model does not have.
        """
        return self._first if seed == self.settings.seed else self._read(seed)

    @cached_property
    def _first(self) -> Documents:
        return self._read(self.settings.seed)

    def _read(self, seed: int) -> Documents:
        info = self.infos["tuned"]
        rows = tokenize_documents(self.data_config(seed, self.settings.n_tokens), info.tokenizer)
        require_readable(rows, info.models(), info.tokenizer)
        return Documents(rows, self._chats(seed), self._train_hash(seed))

    def _train_hash(self, seed: int) -> str | None:
        settings = self.settings
        if not settings.chosen(TRAINED):
            return None
        config = replace(self.data_config(seed, settings.cached_tokens), data=self.train_data())
        try:
            return tokenize_documents(config, self.infos["tuned"].tokenizer).token_hash()
        except InputError as error:
            told = str(error).replace("n_tokens is", "cached_tokens is").replace("--n-tokens", "--cached-tokens")
            raise InputError(f"to train on, {told}") from None

    def _chats(self, seed: int) -> list[Chat]:
        settings, info = self.settings, self.infos["tuned"]
        if not settings.chosen((*DIRECTIONS, *TRAINED_DIRECTIONS)):
            return []
        config = self.data_config(seed, settings.n_tokens)
        too_few = (
            f"shares of KL need at least {LEAST_CHATS}. Name more chats with --data, or methods without directions "
            "with --methods."
        )
        return read_enough_chats(config, info, settings.n_documents, too_few)

    def fingerprint(self, which: str, documents: Documents, unit: str, methods: list[str]) -> str:
        """Return what decides the result of one part, as a hash; it does not matter where models and documents lie."""
        is_trained = bool(set(methods) & set(TRAINED))
        ignored = (*SAME_RESULT, *PLACES, *(() if is_trained else TRAINING))
        settings = {name: value for name, value in to_dict(self.settings).items() if name not in ignored}
        read = ("null",) if which == "null" else tuple(self.infos)  # what the null gives depends on no tuned model
        models = [[identity(entry) for entry in self.infos[name].hashes().values()] for name in read]
        has_chats = bool(set(methods) & {*DIRECTIONS, *TRAINED_DIRECTIONS})
        chats = [[part.tolist() for part in chat] for chat in documents.chats] if has_chats else None
        tokens = [documents.rows.token_hash(), chats, documents.train_hash if is_trained else None, self.template]
        truth = [behaviour.model_dump() for behaviour in self.truth]
        return files.hash_json([settings, self.hook_point, models, tokens, truth, which, unit, methods])


def inspect(settings: CompareSettings) -> Inputs:
    """Check everything that can be wrong, before weights load.

    Raises:
        InputError: models, null, hook point, truth, template or data that do not fit each other.
    """
    template = read_template(settings.chat_template)
    truth = read_truth(settings.truth) if settings.truth is not None else []
    first = inspect_two(settings.base, settings.tuned, settings.tokenizer)
    hook_point = settings.hook_point or f"blocks.{first.n_layers // 2}.hook_resid_post"
    info = inspect_pair(settings.base, settings.tuned, [hook_point], tokenizer=settings.tokenizer)
    infos = {"tuned": info}
    if settings.null is not None:
        infos["null"] = inspect_null(info, settings.null)
    if max(settings.pieces) > info.d_model and not settings.chosen(TRAINED_DIRECTIONS):
        raise InputError(
            f"pieces has {max(settings.pieces)}, more than the width {info.d_model} of the models. Lower it."
        )
    inputs = Inputs(settings, hook_point, infos, truth, template)
    inputs.documents(settings.seed)
    return inputs


def load(inputs: Inputs, which: str) -> ModelPair:
    """Load the base and one of the other models whole; an adapter is merged into its base."""
    info, settings = inputs.infos[which], inputs.settings
    point, device, dtype = inputs.hook_point, settings.device, settings.model_dtype
    if info.adapter is None:
        return load_pair(info.base, info.tuned, point, device=device, dtype=dtype, info=info, whole=True)
    pair = load_pair(info.base, info.base, point, device=device, dtype=dtype, info=_without_adapter(info), whole=True)
    first: Any = pair.models[0]
    with quiet_transformers():
        merged = with_adapter(load_model(info.base, first.dtype), info.adapter).merge_and_unload()
    tuned = merged.eval().requires_grad_(False).to(pair.device)
    return ModelPair(info, (pair.models[0], tuned), pair.hook_points, pair.device)


def _without_adapter(info: PairInfo) -> PairInfo:
    return PairInfo(info.base, info.base, None, info.tokenizer, info.d_model, info.n_layers, info.n_ids)


def model_hashes(inputs: Inputs) -> dict[str, dict[str, str]]:
    """Return name and hash of every model, for the result."""
    names = {"base": inputs.settings.base} | {which: info.tuned for which, info in inputs.infos.items()}
    return {which: {"name": name, "hash": hash_model(name)} for which, name in names.items()}
