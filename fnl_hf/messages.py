"""What the library says once to its user: on the main process only."""

import os
from collections.abc import Sequence


def say(message: str) -> None:
    """Print a line, once per job and not once per process."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, in columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)
