"""Settings of `crosscoders cache | merge`, and which shards each part of a cache holds. Imports nothing heavy."""

import re
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from crosscoders.common.checks import config_of, require_positive, require_range
from crosscoders.common.command_line import Command
from crosscoders.common.errors import InputError
from crosscoders.text.settings import TEMPLATE_DATE, DataConfig, DataSource


class Part(NamedTuple):
    """One of several disjoint pieces of a cache, each a range of whole shards."""

    number: int
    """Counted from 1."""
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def shards(self, n_shards: int) -> range:
        """Return the numbers of this part's shards.

        Raises:
            InputError: there are more parts than shards.
        """
        if self.of > n_shards:
            raise InputError(
                f"part {self} asks for {self.of} parts of a cache of {n_shards} shards. Use at most {n_shards} parts, "
                "or a smaller --shard-tokens."
            )
        return range(n_shards * (self.number - 1) // self.of, n_shards * self.number // self.of)


def parse_part(text: str) -> Part:
    """Return `2/4` as a Part.

    Raises:
        InputError: not of that form, or out of range.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part = Part(int(match[1]), int(match[2])) if match else None
    if part is None or not 1 <= part.number <= part.of:
        raise InputError(f"part {text!r} is not i/n with i from 1 to n. Write 1/4 for the first of four parts.")
    return part


@dataclass(frozen=True)
class CacheConfig:
    """Store paired activations of a base and a tuned model on disk."""

    base: str
    """Base model: local folder or hub id."""
    tuned: str
    """Tuned model: local folder, hub id, or a PEFT adapter of the base model."""
    hook_point: str | list[str]
    """Where activations are read, a TransformerLens name such as blocks.13.hook_resid_post. A list of them is read in
    one pass, and each makes a cache of its own in OUT/<hook_point>."""
    data: str | list[str | DataSource]
    """Documents: a path or `datasets` id, or a list of them, or of {path, text_column, weight, ...}."""
    out: str
    """Folder of the cache."""
    n_tokens: int = 1_000_000
    """Scored tokens to store, from all sources together."""
    context_length: int = 1024
    """Tokens of a document that are read; the rest is cut off and counted."""
    drop_bos: bool = True
    """Leave the beginning-of-sequence token out of the cache (its norm is an outlier in most models)."""
    skip_first: int | None = None
    """Leave the first positions of each row out of the cache, so many; default: 1 where a row does not begin with the
    beginning-of-sequence token (its norm is then the outlier), 0 where it does."""
    max_norm_multiple: float | None = None
    """Leave out tokens whose norm in either model is more than so many times the median norm of their shard; default:
    none. They count in n_tokens, so the cache has fewer, and the manifest says how many."""
    tokenizer: str | None = None
    """Tokenizer folder or id; default: the tuned model's, which must equal the base model's."""
    chat_template: str | None = None
    """File with a chat template, for pairs without one."""
    template_date: str = TEMPLATE_DATE
    """YYYY-MM-DD, which a chat template that writes today's date gets instead, so that the day does not matter."""
    max_refused: float = 0.1
    """Largest share of rows that cannot be read; they are left out and counted. 0: the first one ends the run."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the stored activations."""
    model_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which the models run; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    batch_rows: int = 16
    """Documents in one forward pass."""
    shard_tokens: int = 65_536
    """Tokens in one shard; an interrupted run goes on at the last whole shard."""
    shuffle_documents: int = 100_000
    """Documents are shuffled within windows of this many; 0 keeps their order."""
    seed: int = 0
    """Seed of the order of documents."""

    def __post_init__(self) -> None:
        self.data_config()
        require_positive(self, "batch_rows", "shard_tokens")
        require_range(self, 1, None, "max_norm_multiple")
        if not self.hook_point:
            raise InputError("hook_point is empty. Give a name such as blocks.13.hook_resid_post, or a list of them.")
        for number, name in enumerate(self.hook_point if isinstance(self.hook_point, list) else []):
            if name in self.hook_point[:number]:
                raise InputError(f"hook_point names {name!r} twice. Name each hook point once.")

    def points(self) -> list["CacheConfig"]:
        """Return the config of each hook point alone; of a list, each has a folder of its own in `out`."""
        if isinstance(self.hook_point, str):
            return [self]
        return [replace(self, hook_point=name, out=f"{self.out.rstrip('/')}/{name}") for name in self.hook_point]

    def data_config(self) -> DataConfig:
        """Return the settings that say which documents are read, and how."""
        return config_of(DataConfig, self)


@dataclass(frozen=True)
class CacheSettings(CacheConfig):
    """Store paired activations of a base and a tuned model on disk."""

    part: str | None = None
    """i/n: make only the i-th of n parts, for job arrays; `crosscoders merge` puts them together."""
    devices: str | None = None
    """Several devices that work at once, each on a part that is merged at the end: cuda:0,cuda:1."""
    force: bool = False
    """Go on where the estimate of memory is above what the machine has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chosen_part()
        if self.devices is not None:
            if self.part is not None:
                raise InputError("part has no effect with devices, which make all parts. Give one of the two.")
            if self.device != "auto":
                raise InputError(f"device {self.device!r} has no effect with devices. Give one of the two.")

    def chosen_devices(self) -> list[str] | None:
        """Return the setting `devices` as a list."""
        return self.devices.replace(" ", "").split(",") if self.devices is not None else None

    def chosen_part(self) -> Part | None:
        """Return the setting `part`, read."""
        return parse_part(self.part) if self.part is not None else None


CACHE = Command(
    "cache",
    "Store paired activations of a base and a tuned model on disk.",
    CacheSettings,
    "crosscoders.activations.command:cache",
    takes_url=True,
)


@dataclass(frozen=True)
class MergeSettings:
    """Put the parts of a cache together."""

    parts: list[str]
    """Folders of `crosscoders cache --part`, all of one run."""
    out: str
    """Folder of the cache; shard files are linked, not copied, where it lies on the same disk."""
