"""Tab-separated tables of labelled texts, as GLUE has them."""

import lzma
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fnl_hf.texts import TEXT_COLUMNS

from ..running import InputError, one_line, open_text
from .arguments import TableArguments

# How GLUE's files name the column of the label
LABEL_COLUMNS = ("label", "gold_label", "is_duplicate", "Quality")


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are used."""

    text: str
    pair: str | None
    label: str


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        texts: one text, or a pair, of every row.
        labels: as in the file; None for a table without them.
        lines: where the rows stand in the file.
    """

    path: str
    texts: list[tuple[str, ...]]
    labels: list[str] | None
    lines: list[int]

    def first(self, count: int | None) -> "Table":
        """The first rows; all of them for None."""
        return Table(self.path, self.texts[:count], self.labels and self.labels[:count], self.lines[:count])


def read_table(
    path: str | Path,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = True,
) -> Table:
    """Read a table whose first line names its columns (.gz and .xz too). A quotation mark is an ordinary character.

    Args:
        text_column, text_pair_column, label_column: not given, GLUE's names are looked for; a text column that is given
            stands alone if no pair is.
        labelled: False reads no labels.

    Raises:
        InputError: no such file, not UTF-8, a column that is not there, a row of another length than the header, a row
            without text or label, no rows.
    """
    rows = _rows(path)
    if not rows:
        raise InputError(f"{path}: empty. Give a table whose first line names its columns.")
    (_, header), *rows = rows
    columns = find_columns(header, str(path), text_column, text_pair_column, label_column, labelled)
    if not rows:
        raise InputError(f"{path}: no rows after the header. Give at least one.")
    texts, labels, lines = [], [], []
    names = [columns.text, *([columns.pair] if columns.pair else []), *([columns.label] if labelled else [])]
    places = [header.index(name) for name in names]
    for line, cells in rows:
        if len(cells) != len(header):
            raise InputError(
                f"{path}, line {line}: {len(cells)} columns, and the header has {len(header)}. Columns are separated "
                "by single tabs, and no text may hold one."
            )
        values = [cells[place].strip() for place in places]
        if not all(values):
            raise InputError(f"{path}, line {line}: nothing in column {names[values.index('')]!r}. Fill or remove it.")
        if labelled:
            labels.append(values.pop())
        texts.append(tuple(values))
        lines.append(line)
    return Table(str(path), texts, labels if labelled else None, lines)


def find_columns(
    header: Sequence[str],
    path: str,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = True,
) -> Columns:
    """Which columns are text and label. Raises `InputError` if one that is given is not there, or none is found."""
    listed = ", ".join(map(repr, header))
    for option, name in (
        ("text_column", text_column),
        ("text_pair_column", text_pair_column),
        ("label_column", label_column if labelled else None),
    ):
        if name is not None and name not in header:
            raise InputError(f"{path}: no column {name!r} for --{option}, only {listed}.")
    if text_column is None:
        if text_pair_column is not None:
            raise InputError(f"--text_pair_column {text_pair_column} without --text_column. Give both.")
        found = next((names for names in TEXT_COLUMNS if set(names) <= set(header)), None)
        if found is None:
            raise InputError(f"{path}: no text column is known among {listed}. Name it with --text_column.")
        text_column, text_pair_column = (*found, None)[:2]
    if label_column is None and labelled:
        label_column = next((name for name in LABEL_COLUMNS if name in header), None)
        if label_column is None:
            raise InputError(f"{path}: no label column is known among {listed}. Name it with --label_column.")
    return Columns(text_column, text_pair_column, label_column or "")


def label_names(labels: Sequence[str], path: str) -> list[str]:
    """The distinct labels: numbers by value, others by alphabet. The index of a label is its id.

    Raises:
        InputError: fewer than two of them, or real numbers, which are no classes.
    """
    names = set(labels)
    if len(names) < 2:
        raise InputError(f"{path}: all labels are {min(names)!r}. Give a table with at least two classes.")
    if all(map(_is_integer, names)):
        return sorted(names, key=int)
    if all(map(_is_number, names)):
        raise InputError(
            f"{path}: labels such as {min(names)!r} are real numbers. Classes are words or whole numbers; check "
            "--label_column."
        )
    return sorted(names)


def label_ids(table: Table, names: Sequence[str]) -> list[int]:
    """The id of every row's label. Raises `InputError` for one that is not among `names`."""
    ids = {name: i for i, name in enumerate(names)}
    for line, label in zip(table.lines, table.labels, strict=True):
        if label not in ids:
            known = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
            raise InputError(f"{table.path}, line {line}: label {label!r} is not one of those trained on ({known}).")
    return [ids[label] for label in table.labels]


def _rows(path: str | Path) -> list[tuple[int, list[str]]]:
    """Number and cells of every line that is not blank."""
    try:
        with open_text(path) as file:
            lines = file.read().removeprefix("\ufeff").split("\n")
    except (UnicodeDecodeError, OSError, lzma.LZMAError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a readable UTF-8 text file ({one_line(error)}). Convert it first.") from error
    stripped = ((number, line.rstrip("\r")) for number, line in enumerate(lines, start=1))
    return [(number, [cell.strip() for cell in line.split("\t")]) for number, line in stripped if line.strip()]


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_tables(data_args: TableArguments) -> dict[str, Table]:
    """The tables that were given, by split."""
    columns = (data_args.text_column, data_args.text_pair_column, data_args.label_column)
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples, "test": None}
    tables = {
        split: read_table(path, *columns, labelled=split != "test").first(limit)
        for split, limit in limits.items()
        if (path := getattr(data_args, f"{split}_file"))
    }
    widths = {len(table.texts[0]): table.path for table in tables.values()}
    if len(widths) > 1:
        raise InputError(f"{widths[1]} has single texts, and {widths[2]} has pairs. Name the columns that are meant.")
    return tables


def class_names(tables: dict[str, Table], config: PreTrainedConfig) -> list[str]:
    """The classes in the order of their ids: those of a checkpoint that knows the same ones, else the table's."""
    known = [config.id2label[i] for i in range(config.num_labels)]
    if "train" in tables:
        names = label_names(tables["train"].labels, tables["train"].path)
        return known if sorted(known) == sorted(names) else names
    if known == [f"LABEL_{i}" for i in range(len(known))]:  # nobody has named them: the table has numbers
        return [str(i) for i in range(len(known))]
    return known


def encode_table(
    table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int, names: list[str] | None = None
) -> Dataset:
    """Token ids in the columns `input_ids` and, if the tokenizer makes them, `token_type_ids`.

    Args:
        names: classes; with them there is a column `labels`.
    """
    encoded = tokenizer(*map(list, zip(*table.texts, strict=True)), truncation=True, max_length=max_length)
    columns = {name: ids for name, ids in encoded.items() if name != "attention_mask"}  # the collator makes it
    return Dataset.from_dict(columns if names is None else columns | {"labels": label_ids(table, names)})
