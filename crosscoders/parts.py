"""Parts of a cache: which shards each one holds. Imports nothing heavy, since settings are checked with it."""

import re
from typing import NamedTuple

from crosscoders.errors import InputError


class Part(NamedTuple):
    """One of several disjoint pieces of a cache, each a range of whole shards."""

    number: int
    """Counted from 1."""
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def shards(self, n_shards: int) -> range:
        """The numbers of this part's shards.

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
    """`2/4` as a Part.

    Raises:
        InputError: not of that form, or out of range.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part = Part(int(found[1]), int(found[2])) if found else None
    if part is None or not 1 <= part.number <= part.of:
        raise InputError(f"part {text!r} is not i/n with i from 1 to n. Write 1/4 for the first of four parts.")
    return part
