"""Notices that packages write when they are imported, and that say nothing to a user of this one."""

import contextlib
import logging
from collections.abc import Iterator

TALKATIVE = ("torchao", "torch.utils._pytree")
"""Loggers that warn when torchao is imported, as transformers and peft do wherever it is installed."""


@contextlib.contextmanager
def without_notices() -> Iterator[None]:
    """Keep their warnings back, and put their levels back at the end."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
