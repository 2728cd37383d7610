"""What the library says to its user: the logger ``fnl_hf``.

It starts at INFO and writes to standard error, on the main process only. Silence it with
``logging.getLogger("fnl_hf").setLevel(logging.WARNING)``, or together with transformers: what
``transformers.logging.set_verbosity`` drops above its default is dropped here too.
"""

import logging
import os
import sys
from collections.abc import Iterable, Sequence

from transformers.utils import logging as transformers_logging

logger = logging.getLogger("fnl_hf")
PATIENCE = 1.0  # seconds without a bar


class _Handler(logging.StreamHandler):
    """Writes to standard error as it is when something is said: notebooks and tests replace it."""

    def __init__(self):
        logging.Handler.__init__(self)
        self.name = "fnl_hf"

    @property
    def stream(self):
        return sys.stderr

    def filter(self, record: logging.LogRecord) -> bool:
        """On the main process, and not below what the user has silenced transformers to."""
        silenced = transformers_logging.get_verbosity()
        if silenced > logging.WARNING and record.levelno < silenced:  # its default, WARNING, silences nothing here
            return False
        return os.environ.get("RANK", "0") == "0" and super().filter(record)


if not any(handler.name == "fnl_hf" for handler in logger.handlers):  # the module may be reloaded
    logger.addHandler(_Handler())
    logger.propagate = False
    if logger.level == logging.NOTSET:  # a level that the user has set before stays
        logger.setLevel(logging.INFO)


def say(message: str) -> None:
    """One line or table, at INFO: once per job and not once per process."""
    logger.info(message)


def progress(items: Iterable, what: str) -> Iterable:
    """The same, with a bar on a terminal once they take long; transformers' own switch turns it off."""
    if not isinstance(items, Sequence):
        return items
    return transformers_logging.tqdm(items, desc=f"fnl_hf: {what}", leave=False, disable=None, delay=PATIENCE)


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines whose columns stand below each other."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)
