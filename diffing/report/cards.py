"""What a card shows beside examples: histogram of activations, tokens that both decoders write for, nearest decoders.

cards.json is of `diffing scale`, lens.json of `diffing lens`; what is absent is left out.
"""

from pathlib import Path
from typing import Any, NamedTuple

from crosscoders.common.files import read_model
from crosscoders.common.records import Record
from diffing.latents.cards import CardRecord
from diffing.report.text import counted, number

HEIGHT, BIN_WIDTH = 28, 8
"""Of the drawing, in pixels."""
SHOWN_TOKENS, SHOWN_NEIGHBOURS = 8, 3


class LensRecord(Record):
    """lens.json"""

    again = "run diffing lens again"
    latents: dict[str, dict[str, list[str]]]


class Details(NamedTuple):
    """One latent's."""

    path: str
    """Outline of the histogram, as an SVG path in a box of BIN_WIDTH times the bins by HEIGHT; empty without one."""
    spread: str
    """The histogram in words."""
    neighbours: list[tuple[int, str]]
    """Nearest latents with their cosine."""
    lens: list[tuple[str, list[str]]]
    """Model and the tokens that its decoder writes for."""


def read_details(run: Path) -> dict[str, Any]:
    """Return cards.json and lens.json of a run folder by name, those that are there.

    Raises:
        CorruptData: one of them is damaged.
    """
    records: dict[str, type[Record]] = {"cards": CardRecord, "lens": LensRecord}
    paths = {name: run / f"{name}.json" for name in records}
    return {name: read_model(path, records[name]) for name, path in paths.items() if path.is_file()}


def details_of(read: dict[str, Any], latent: int, largest: float | None) -> Details:
    """Return what is known of a latent; `largest`: its largest activation."""
    cards, key = read.get("cards", {}), str(latent)
    counts = cards.get("histograms", {}).get(key, [])
    nearest = [(int(j), f"{cosine:.2f}") for j, cosine in cards.get("neighbours", {}).get(key, [])[:SHOWN_NEIGHBOURS]]
    lens = read.get("lens", {}).get("latents", {}).get(key, {})
    fullest = f"at most {counted(max(counts), 'token')} a bin, heights are square roots" if counts else ""
    spread = f"activations from 0 to {number(largest or 0.0)}, {fullest}" if counts else ""
    return Details(
        outline(counts), spread, nearest,
        [(model, tokens[:SHOWN_TOKENS]) for model, tokens in lens.items()],
    )  # fmt: skip


def outline(counts: list[int]) -> str:
    """Return bars as one path: heights are square roots, so that a single token is seen beside thousands."""
    if not any(counts):
        return ""
    highest = max(counts) ** 0.5
    tops = [HEIGHT - (round(HEIGHT * count**0.5 / highest) or (1 if count else 0)) for count in counts]
    return f"M0 {HEIGHT}" + "".join(f"V{top}h{BIN_WIDTH}" for top in tops) + f"V{HEIGHT}z"
