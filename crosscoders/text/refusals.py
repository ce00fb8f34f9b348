"""Rows of data that cannot be read: left out and counted by reason, until they are too many."""

from crosscoders.common.errors import InputError
from crosscoders.common.progress import say

ENOUGH_ROWS = 100
"""Rows from which on a share of refused ones decides before the end of the data."""
REASONS = {
    "broken_json": "a line that is no JSON object in UTF-8",
    "no_column": "neither the text nor the messages column",
    "no_text": "something else than text in the text column",
    "no_messages": "no list of messages with role and content",
    "no_unicode": "half a character",
    "reserved_group": "the group `template`",
    "template_error": "a dialogue that the chat template refuses",
    "content_changed": "a message that the chat template drops or changes",
}


class Refused(InputError):
    """One row cannot be read as it should be; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, message: str) -> None:
        assert reason in REASONS
        super().__init__(message)
        self.reason = reason


class Refusals:
    """Count rows and the refused ones among them; `limit` is the largest share of refused ones."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.n_rows = 0
        self.counts: dict[str, int] = {}
        self._first = ""

    def add(self, refused: Refused) -> None:
        """Count a refused row, and show the first one of its reason.

        Raises:
            InputError: more than the limit of the rows so far, or of `ENOUGH_ROWS` if there were fewer.
        """
        self._first = self._first or str(refused)
        if refused.reason not in self.counts:
            say(f"left out ({refused.reason}): {' '.join(str(refused).split())}")
        self.counts[refused.reason] = self.counts.get(refused.reason, 0) + 1
        self._require_few(max(self.n_rows, ENOUGH_ROWS))

    def finish(self) -> dict[str, int]:
        """Say how many rows were left out, and return their number by reason, the most frequent first.

        Raises:
            InputError: more than the limit.
        """
        self._require_few(self.n_rows)
        counts = dict(sorted(self.counts.items(), key=lambda item: (-item[1], item[0])))
        if counts:
            listed = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
            say(f"left out {sum(counts.values()):,} of {self.n_rows:,} rows: {listed}")
        return counts

    def _require_few(self, n_rows: int) -> None:
        n_refused = sum(self.counts.values())
        if n_refused > self.limit * n_rows:
            raise InputError(
                f"{self._first} {n_refused:,} of {self.n_rows:,} rows cannot be read, more than "
                f"max_refused = {self.limit:g} admits. Mend the data, or raise max_refused to leave them out."
            )
