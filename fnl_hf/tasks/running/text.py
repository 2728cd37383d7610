"""Text files of a script's user, compressed or not, with a byte order mark or not, with LF or CRLF."""

import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO

from .errors import InputError, one_line

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # what may be half a character in JSON


def open_text(path: str | Path) -> TextIO:
    """Open a UTF-8 text file, decompressing `.gz` and `.xz`. Raises `InputError` if there is no such file."""
    return _open(Path(path), "rt", encoding="utf-8-sig", newline="\n")


def _open(path: Path, mode: str, **options) -> IO:
    if path.is_dir():
        raise InputError(f"{path}: a folder, where a file is expected. Give a file in it.")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a regular file, and it is read more than once. Save its content in a file.")
    if not path.is_file():
        raise InputError(f"{path}: no such file. Check the path (it is relative to {Path.cwd()}).")
    try:
        return {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, mode, **options)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}). Give a file that you may read.") from error


def bounded_lines(path: str | Path, max_length: int | None = None) -> Iterator[str]:
    """Lines of a text file without their line ends (LF or CRLF) and surrounding blanks, read one at a time.

    Args:
        max_length: characters that a line may have; more are never in memory. None: any number.

    Raises:
        InputError: there is no such file, it is not UTF-8 or damaged, or a line is too long.
    """
    number, limit = 0, -1 if max_length is None else max_length + 1
    try:
        with open_text(path) as file:
            while line := file.readline(limit):
                number += 1
                if max_length is not None and len(line) > max_length and not line.endswith("\n"):
                    raise InputError(
                        f"{path}, line {number}: longer than {max_length} characters. Break it into several lines, or "
                        "raise --max_line_length if memory allows."
                    )
                yield line.strip()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {_undecodable_line(Path(path))}: not a readable UTF-8 text file ({error.reason}). Convert "
            "it to UTF-8 first."
        ) from error
    except (OSError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise InputError(
            f"{path}, after line {number}: not a readable UTF-8 text file ({one_line(error)}). It is damaged: make or "
            "copy it anew."
        ) from error


def _undecodable_line(path: Path) -> int:
    """The number of the first line that is not UTF-8: text is decoded in chunks, whose errors do not tell."""
    with _open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def read_lines(path: str | Path) -> list[str]:
    """All of `bounded_lines`, of any length."""
    return list(bounded_lines(path))


def parse_json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or holds half a character (a lone surrogate), which neither
            files nor tokenizers take. Its message is the reason, without a place in the text.
    """
    try:
        content = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("a lone surrogate, half a character") from error
    return content


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
