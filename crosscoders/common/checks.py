"""Checks of settings, which are frozen dataclasses, and conversions of them. Imports nothing heavy.

A contradiction raises InputError when the dataclass is made, so it is found before a model loads.
"""

import math
import sys
from dataclasses import asdict, fields
from typing import Any, TypeVar

from crosscoders.common.errors import InputError

LEAST_CHATS, ENOUGH_CHATS = 20, 60
"""Chats below which a measurement is refused, and below which its intervals are said to be too narrow: 95% ones covered
.43 to .53 at 2 chats and .79 to .86 at 5."""
FEW_CHATS = f"Fewer than {ENOUGH_CHATS} chats: the intervals are too narrow."


def require_positive(config: object, *names: str) -> None:
    """Raise InputError for settings that are not above 0, or infinite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"{name} is {getattr(config, name)}; give a number above 0.")


def require_range(config: object, low: float, high: float | None, *names: str) -> None:
    """Raise InputError for values below `low` or above `high`; None is no value."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value <= (sys.float_info.max if high is None else high):
            raise InputError(f"{name} is {value}; give a number from {low}{'' if high is None else f' to {high}'}.")


def to_dict(config: Any) -> dict[str, Any]:
    """Return the resolved settings as plain data, in the order of their fields."""
    return asdict(config)


T = TypeVar("T")


def config_of(kind: type[T], settings: Any) -> T:
    """Return the part of a command's settings that is a config of the library."""
    return kind(**{field.name: getattr(settings, field.name) for field in fields(kind)})  # type: ignore[arg-type]
