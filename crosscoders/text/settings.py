"""Which documents are read, as frozen dataclasses. Imports nothing heavy."""

from dataclasses import dataclass

from crosscoders.common.checks import require_positive, require_range
from crosscoders.common.errors import InputError


@dataclass(frozen=True)
class DataSource:
    """One source of documents: plain text, or chats as lists of {"role", "content"}."""

    path: str
    """Local file or folder (.txt, .jsonl, .jsonl.gz, .parquet), or a `datasets` id."""
    name: str | None = None
    """Configuration name of a `datasets` id."""
    split: str = "train"
    """Split of a `datasets` id."""
    text_column: str = "text"
    """Column with plain text."""
    messages_column: str = "messages"
    """Column with chat messages; used where a row has it."""
    group: str | None = None
    """Name under which the report counts these documents; default: the `group` column, else the file's name."""
    weight: float = 1.0
    """Share of the scored tokens relative to the other sources."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise InputError(f"weight of data source {self.path!r} is {self.weight}; give a finite number above 0.")


@dataclass(frozen=True)
class DataConfig:
    """Say which documents are read, and how they become rows of tokens."""

    data: str | list[str | DataSource]
    """Documents: a path or `datasets` id, or a list of them, or of {path, text_column, weight, ...}."""
    n_tokens: int
    """Scored tokens to read, from all sources together."""
    context_length: int = 1024
    """Tokens of a document that are read; the rest is cut off and counted."""
    drop_bos: bool = True
    """Leave the beginning-of-sequence token out of the scored tokens."""
    chat_template: str | None = None
    """File with a chat template, for tokenizers without one."""
    shuffle_documents: int = 100_000
    """Documents are shuffled within windows of this many; 0 keeps their order."""
    seed: int = 0
    """Seed of the order of documents."""

    def __post_init__(self) -> None:
        require_positive(self, "n_tokens", "context_length")
        require_range(self, 0, None, "shuffle_documents")
        if isinstance(self.data, str) and self.data.lstrip().startswith(("[", "{")):
            raise InputError(
                f"data {self.data!r} is not a list of paths or of {{path, name, split, text_column, messages_column, "
                "group, weight}. Check its keys and quotes."
            )

    def sources(self) -> list[DataSource]:
        """Return `data` as a list of sources.

        Raises:
            InputError: the list is empty.
        """
        listed = self.data if isinstance(self.data, list) else [self.data]
        if not listed:
            raise InputError("data is an empty list; name at least one file, folder or dataset id.")
        return [DataSource(path=item) if isinstance(item, str) else item for item in listed]

    def paths(self) -> str:
        """Return the names of all sources in words, for messages."""
        return ", ".join(source.path for source in self.sources())
