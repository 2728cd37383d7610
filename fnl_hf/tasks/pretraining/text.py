"""The text of a corpus, read lazily: plain files, folders, JSON lines, and files of `datasets`.

A reader yields lines, stripped and never empty, and `END` where a document ends. It holds one line (of plain text or
JSON) at a time, and refuses one that is longer than it may be, before it has read it. Every error is an `InputError`
that names the file, the line where there is one, and the remedy.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from ..running import InputError, bounded_lines, one_line, parse_json

END = None  # a document ends here

_JSON = (".json", ".jsonl")
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # suffix -> builder of datasets
_SUFFIXES = (".txt", *_JSON, *_TABLES)


def corpus_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files of a corpus, in order; a folder stands for all files of a known kind below it, sorted by path.

    A folder that `Dataset.save_to_disk` wrote is one file of the corpus.

    Raises:
        InputError: a path does not exist, or a folder holds nothing that can be read.
    """
    files = []
    for path in map(Path, paths):
        if not path.is_dir():
            if not path.is_file():
                raise InputError(f"{path}: no such file. Check the path (it is relative to {Path.cwd()}).")
            files.append(path)
        elif inside := list(_inside(path)):
            files += inside
        else:
            raise InputError(
                f"{path}: no text in this folder. Give one with files in {', '.join(_SUFFIXES)} (.gz and .xz too)."
            )
    return files


def _inside(path: Path) -> Iterator[Path]:
    if path.is_file():
        if _kind(path) in _SUFFIXES:
            yield path
    elif (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        yield path
    elif path.is_dir():
        for entry in sorted(path.iterdir()):
            yield from _inside(entry)


def read_corpus(
    files: Iterable[Path], text_column: str = "text", documents: str = "file", max_line_length: int = 16_000_000
) -> Iterator[str | None]:
    """Lines of all `files`, with `END` behind every document.

    Args:
        text_column: key of the text in JSON lines and tables; each of their rows is a document.
        documents: what a document is in plain text: "file", or "blank_line" for what stands between blank lines.
        max_line_length: characters that a line of text or JSON may have.

    Raises:
        InputError: while it is read, where a file is not what it should be.
    """
    for path in files:
        suffix = _kind(path)
        if path.is_dir() or suffix in _TABLES:
            texts = _table_texts(path, text_column)
        elif suffix in _JSON:
            texts = _json_texts(path, text_column, max_line_length)
        else:
            for line in bounded_lines(path, max_line_length):
                if line:
                    yield line
                elif documents == "blank_line":
                    yield END
            yield END
            continue
        for text in texts:
            yield from filter(None, map(str.strip, text.split("\n")))
            yield END


def _kind(path: Path) -> str:
    """The suffix that says what a file holds, compressed or not."""
    return Path(path.stem).suffix if path.suffix in (".gz", ".xz") else path.suffix


def _json_texts(path: Path, column: str, max_length: int) -> Iterator[str]:
    for number, line in enumerate(bounded_lines(path, max_length), start=1):
        if not line:
            continue
        try:
            text = parse_json(line)[column]
        except (ValueError, KeyError, TypeError) as error:
            reason = f" ({one_line(error)})" if isinstance(error, ValueError) else ""
            raise InputError(
                f'{path}, line {number}: expected {{"{column}": "…"}}, got {line[:60]!r}{reason}. Write one such JSON '
                "object a line, or set --text_column."
            ) from error
        if not isinstance(text, str):
            raise InputError(f"{path}, line {number}: {column!r} is {text!r:.60}, not text. Give a string.")
        yield text


def _table_texts(path: Path, column: str) -> Iterator[str]:
    try:
        if path.is_dir():
            rows = load_from_disk(str(path))  # memory-mapped
        else:
            rows = load_dataset(_TABLES[_kind(path)], data_files=str(path), split="train", streaming=True)
        rows = iter(rows)
        first = next(rows, None)
    except (OSError, ValueError, DatasetsError) as error:  # pyarrow's errors are ValueErrors
        raise InputError(f"{path}: datasets cannot read it ({one_line(error)}). Give a file that it wrote.") from error
    for number, row in enumerate(itertools.chain([] if first is None else [first], rows), start=1):
        if column not in row:
            raise InputError(f"{path}: no column {column!r}, only {', '.join(row)}. Set --text_column to one of these.")
        if not isinstance(row[column], str):
            raise InputError(f"{path}, row {number}: {column!r} is {row[column]!r:.60}, not text. Give a string.")
        yield row[column]
