"""Which documents are read, as frozen dataclasses. Imports nothing heavy."""

from dataclasses import dataclass

from crosscoders.common.errors import InputError

# ---------------------------------------------------------------------------------------------------------- caching


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
