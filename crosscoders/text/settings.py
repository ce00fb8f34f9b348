"""Which documents are read, as frozen dataclasses. Imports nothing heavy."""

from dataclasses import dataclass
from datetime import date

from crosscoders.common.checks import require_positive, require_range
from crosscoders.common.errors import InputError

TEMPLATE_DATE = "2024-07-26"
"""What Llama-3's own templates write where there is no clock."""


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
    skip_first: int | None = None
    """Leave the first positions of each row out of the scored tokens, so many; default: 1 where a row does not begin
    with the beginning-of-sequence token (its norm is then the outlier), 0 where it does."""
    chat_template: str | None = None
    """File with a chat template, for tokenizers without one."""
    template_date: str = TEMPLATE_DATE
    """YYYY-MM-DD, which a chat template that writes today's date gets instead, so that the day does not matter."""
    max_refused: float = 0.1
    """Largest share of rows that cannot be read; they are left out and counted. 0: the first one ends the run."""
    shuffle_documents: int = 100_000
    """Documents are shuffled within windows of this many; 0 keeps their order."""
    seed: int = 0
    """Seed of the order of documents."""

    def __post_init__(self) -> None:
        require_positive(self, "n_tokens", "context_length")
        require_range(self, 0, None, "shuffle_documents")
        require_range(self, 0, 1, "max_refused")
        require_range(self, 0, self.context_length - 1, "skip_first")
        try:
            date.fromisoformat(self.template_date)
        except ValueError:
            raise InputError(f"template_date is {self.template_date!r}; give a date such as 2024-07-26.") from None
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
