"""Parallel text: the corpus that ships with the package, JSON lines, pairs of text files; cleaning and splitting.

A corpus is a stream of `(source, target)` strings, stripped; either may be empty. What cannot be read is an
`InputError` that names the file, the line and the remedy.
"""

import itertools
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..running import InputError, bounded_lines, one_line, open_text, parse_json
from .arguments import DataArguments

Pair = tuple[str, str]

SHIPPED_LANGUAGES = ("de", "en")  # columns of the shipped files
SPLITS = ("train", "validation", "test")
_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class ParallelText:
    """The pairs of one split. They are read anew each time that they are iterated over, one at a time.

    Attributes:
        files: one of JSON lines, or one that ships, or the two text files of source and target.
        languages: of source and target; the keys in JSON lines.
    """

    files: tuple[Path, ...]
    languages: tuple[str, str]

    def __iter__(self) -> Iterator[Pair]:
        if len(self.files) == 2:
            return _text_pairs(*self.files)
        if self.files[0].parent == _DATA:
            return _shipped_pairs(self.files[0], self.languages)
        return _json_pairs(self.files[0], *self.languages)

    def __str__(self) -> str:
        return " and ".join(map(str, self.files))


def read_pairs(text: ParallelText, limit: int | None = None) -> list[Pair]:
    """All pairs, or the first `limit` of them. Raises `InputError` if there is none."""
    pairs = list(itertools.islice(text, limit))
    if not pairs:
        raise InputError(f"{text}: no sentence pairs. Give a corpus with at least one pair.")
    return pairs


def shipped_text(split: str, source_lang: str = "de", target_lang: str = "en") -> ParallelText:
    """One split ("train", "validation" or "test") of the Tatoeba corpus in `data/`, in either direction."""
    if {source_lang, target_lang} != set(SHIPPED_LANGUAGES):
        raise InputError(
            f"the shipped corpus has the languages {' and '.join(SHIPPED_LANGUAGES)}, not {source_lang} and "
            f"{target_lang}. Give your own --train_file, or --train_source and --train_target."
        )
    return ParallelText((_DATA / f"tatoeba-de-en.{split}.tsv.xz",), (source_lang, target_lang))


def split_text(
    split: str,
    source_lang: str,
    target_lang: str,
    file: str | None = None,
    source: str | None = None,
    target: str | None = None,
) -> ParallelText:
    """One split from a JSON-lines `file`, or from the text files `source` and `target`, or as shipped if none is given.

    Raises:
        InputError: a combination of files that has no meaning, languages that do not ship, or no such file.
    """
    if bool(source) != bool(target) or (file and source):
        raise InputError(
            f"--{split}_source and --{split}_target go together, and without --{split}_file. Give the two, or the file."
        )
    if not file and not source:
        return shipped_text(split, source_lang, target_lang)
    paths = (Path(file),) if file else (Path(source), Path(target))
    for path in paths:
        open_text(path).close()
    return ParallelText(paths, (source_lang, target_lang))


def read_corpus(data_args: DataArguments) -> dict[str, ParallelText]:
    """The text of every split: the user's files, or all of the shipped corpus where there are none."""
    files = {
        split: {kind: getattr(data_args, f"{split}_{kind}") for kind in ("file", "source", "target")}
        for split in SPLITS
    }
    own = any(any(paths.values()) for paths in files.values())
    if own and not any(files["train"].values()):
        raise InputError("a corpus without training pairs. Give --train_file, or --train_source and --train_target.")
    return {
        split: split_text(split, data_args.source_lang, data_args.target_lang, **paths)
        for split, paths in files.items()
        if not own or any(paths.values())
    }


def _shipped_pairs(path: Path, languages: tuple[str, str]) -> Iterator[Pair]:
    source, target = map(SHIPPED_LANGUAGES.index, languages)
    for line in bounded_lines(path):
        row = line.split("\t")
        yield row[source], row[target]


def _json_pairs(path: Path, source_lang: str, target_lang: str) -> Iterator[Pair]:
    """Of a file with one `{"translation": {"de": "…", "en": "…"}}` a line, as in transformers' examples."""
    for number, line in enumerate(bounded_lines(path), start=1):
        if not line:
            continue
        try:
            translation = parse_json(line)["translation"]
            if not isinstance(translation, dict):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            reason = f" ({one_line(error)})" if isinstance(error, ValueError) else ""
            raise InputError(
                f'{path}, line {number}: expected {{"translation": {{"{source_lang}": "…", "{target_lang}": "…"}}}}, '
                f"got {line[:60]!r}{reason}. Write one such JSON object a line, or use --train_source and "
                "--train_target."
            ) from error
        missing = [lang for lang in (source_lang, target_lang) if lang not in translation]
        if missing:
            raise InputError(
                f"{path}, line {number}: no language {missing[0]!r}, only {', '.join(sorted(translation)) or 'none'}. "
                "Set --source_lang and --target_lang to two of these."
            )
        pair = translation[source_lang], translation[target_lang]
        if not all(isinstance(text, str) for text in pair):
            raise InputError(f"{path}, line {number}: {str(pair)[:60]} is not text on both sides. Give two strings.")
        yield pair[0].strip(), pair[1].strip()


def _text_pairs(source_path: Path, target_path: Path) -> Iterator[Pair]:
    """Of two line-aligned text files."""
    sources, targets = bounded_lines(source_path), bounded_lines(target_path)
    for number, pair in enumerate(itertools.zip_longest(sources, targets), start=1):
        if None in pair:
            rest = 1 + sum(1 for _ in itertools.chain(sources, targets))
            counts = (number - 1, number - 1 + rest) if pair[0] is None else (number - 1 + rest, number - 1)
            raise InputError(
                f"{source_path} has {counts[0]} lines and {target_path} has {counts[1]}: line i of one must translate "
                "line i of the other. Give two files of equal length."
            )
        yield pair


# Cleaning and splitting: how the shipped corpus was made (scripts/make_tatoeba_corpus.py) and may be made again.

_ALLOWED = re.compile(r"[A-Za-zÄÖÜäöüßé0-9 .,;:?!'’\"„“%$–-]+")
_OPENING = re.compile(r"[A-ZÄÖÜ0-9\"„]")
_ENDING = re.compile(r"([.?!])[\"“]?$")


def normalize(text: str) -> str:
    """Unicode NFC with single plain blanks: no no-break blanks, soft hyphens or zero-width characters."""
    text = "".join(char for char in unicodedata.normalize("NFC", text) if unicodedata.category(char) != "Cf")
    return " ".join(text.split())


def fingerprint(text: str) -> str:
    """What is left of a sentence when only its wording counts: lower case, letters and digits."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def is_clean(source: str, target: str, words: tuple[int, int] = (3, 20), max_ratio: float = 2.0) -> bool:
    """Whether a pair looks like one sentence and its translation.

    Both sides have `words[0]` to `words[1]` words of usual characters, start like a sentence and end with the same
    mark; the longer has at most `max_ratio` times the characters of the shorter.
    """
    if not all(_ALLOWED.fullmatch(text) and _OPENING.match(text) for text in (source, target)):
        return False
    endings = [_ENDING.search(text) for text in (source, target)]
    if not all(endings) or endings[0][1] != endings[1][1]:
        return False
    if not all(words[0] <= len(text.split()) <= words[1] for text in (source, target)):
        return False
    return max(len(source), len(target)) <= max_ratio * min(len(source), len(target))


def one_to_one(pairs: Iterable[Pair]) -> list[Pair]:
    """Keep a pair only if neither of its sides was kept before (by `fingerprint`).

    Each wording then occurs once a side, so any split of the result has no sentence, and no second translation of one,
    in two of its parts.
    """
    kept, sources, targets = [], set(), set()
    for source, target in pairs:
        marks = fingerprint(source), fingerprint(target)
        if marks[0] not in sources and marks[1] not in targets:
            sources.add(marks[0])
            targets.add(marks[1])
            kept.append((source, target))
    return kept


def sample_splits(pairs: list[Pair], sizes: dict[str, int], seed: int) -> dict[str, list[Pair]]:
    """Disjoint random samples of `pairs`, one per entry of `sizes`."""
    if sum(sizes.values()) > len(pairs):
        raise InputError(f"{sum(sizes.values())} pairs wanted, only {len(pairs)} are there. Ask for fewer.")
    drawn = iter(random.Random(seed).sample(pairs, sum(sizes.values())))
    return {split: list(itertools.islice(drawn, size)) for split, size in sizes.items()}
