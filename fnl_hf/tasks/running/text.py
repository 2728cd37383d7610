"""Text files of a script's user, compressed or not."""

import gzip
import io
import lzma
import sys
from pathlib import Path
from typing import TextIO

from .errors import InputError


def open_text(path: str | Path) -> TextIO:
    """Open a UTF-8 text file, decompressing `.gz` and `.xz`. Raises `InputError` if there is no such file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file. Check the path (it is relative to {Path.cwd()}).")
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8", newline="\n")


def read_lines(path: str | Path) -> list[str]:
    """All lines of a text file without their line ends (LF or CRLF) and surrounding blanks."""
    try:
        with open_text(path) as file:
            return [line.strip() for line in file]
    except (UnicodeDecodeError, gzip.BadGzipFile, lzma.LZMAError, EOFError) as error:
        raise InputError(f"{path}: not a readable UTF-8 text file ({error}). Convert it to UTF-8 first.") from error


def given_lines(values: list[str]) -> list[str]:
    """What was given on the command line; for `-`, the lines of standard input. Raises `InputError` if not UTF-8."""
    try:
        if values != ["-"]:
            "".join(values).encode("utf-8")  # what the shell gave as other bytes came as lone surrogates
            return values
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeError as error:
        source = "standard input" if values == ["-"] else "the command line"
        raise InputError(f"{source} is not UTF-8 text ({error}). Convert it to UTF-8 first.") from error
    return [line.rstrip("\r\n") for line in io.StringIO(text, newline="\n")]
