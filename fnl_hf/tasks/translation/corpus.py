"""Parallel text: the corpus that ships with the package, JSON lines, pairs of text files; cleaning and splitting.

A corpus is a list of `(source, target)` strings. Every reader either returns at least one pair, none of them one-sided,
or raises an `InputError` that names the file, the line and the remedy.
"""

import itertools
import json
import lzma
import random
import re
import unicodedata
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from ..running import InputError, read_lines
from .arguments import DataArguments

Pair = tuple[str, str]

SHIPPED_LANGUAGES = ("de", "en")  # columns of the shipped files
SPLITS = ("train", "validation", "test")


def read_shipped(split: str, source_lang: str = "de", target_lang: str = "en") -> list[Pair]:
    """One split ("train", "validation" or "test") of the Tatoeba corpus in `data/`, in either direction."""
    if {source_lang, target_lang} != set(SHIPPED_LANGUAGES):
        raise InputError(
            f"the shipped corpus has the languages {' and '.join(SHIPPED_LANGUAGES)}, not {source_lang} and "
            f"{target_lang}. Give your own --train_file, or --train_source and --train_target."
        )
    packed = resources.files(__package__) / "data" / f"tatoeba-de-en.{split}.tsv.xz"
    rows = [line.split("\t") for line in lzma.decompress(packed.read_bytes()).decode("utf-8").splitlines()]
    source, target = SHIPPED_LANGUAGES.index(source_lang), SHIPPED_LANGUAGES.index(target_lang)
    return [(row[source], row[target]) for row in rows]


def read_json_lines(path: str | Path, source_lang: str, target_lang: str) -> list[Pair]:
    """Pairs of a file with one `{"translation": {"de": "…", "en": "…"}}` a line, as in transformers' examples."""
    pairs = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line:
            continue
        try:
            translation = json.loads(line)["translation"]
            languages = sorted(translation)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f'{path}, line {number}: expected {{"translation": {{"{source_lang}": "…", "{target_lang}": "…"}}}}, '
                f"got {line[:60]!r}. Write one such JSON object a line, or use --train_source and --train_target."
            ) from error
        missing = [lang for lang in (source_lang, target_lang) if lang not in languages]
        if missing:
            raise InputError(
                f"{path}, line {number}: no language {missing[0]!r}, only {', '.join(languages) or 'none'}. "
                "Set --source_lang and --target_lang to two of these."
            )
        pair = translation[source_lang], translation[target_lang]
        if not all(isinstance(text, str) for text in pair):
            raise InputError(f"{path}, line {number}: {pair} is not text on both sides. Give two strings.")
        pairs.append((pair[0].strip(), pair[1].strip()))
    return _checked(pairs, str(path))


def read_text_pair(source_path: str | Path, target_path: str | Path) -> list[Pair]:
    """Pairs of two line-aligned text files. Lines that are blank on both sides are left out."""
    sources, targets = read_lines(source_path), read_lines(target_path)
    if len(sources) != len(targets):
        raise InputError(
            f"{source_path} has {len(sources)} lines and {target_path} has {len(targets)}: line i of one must "
            "translate line i of the other. Give two files of equal length."
        )
    pairs = list(zip(sources, targets, strict=True))
    return _checked([pair for pair in pairs if pair != ("", "")], f"{source_path} and {target_path}")


def read_split(
    split: str,
    source_lang: str,
    target_lang: str,
    file: str | None = None,
    source: str | None = None,
    target: str | None = None,
) -> list[Pair]:
    """One split from a JSON-lines `file`, or from the text files `source` and `target`, or as shipped if none is given.

    Raises:
        InputError: what the readers raise, or a combination of files that has no meaning.
    """
    if bool(source) != bool(target) or (file and source):
        raise InputError(
            f"--{split}_source and --{split}_target go together, and without --{split}_file. Give the two, or the file."
        )
    if file:
        return read_json_lines(file, source_lang, target_lang)
    if source:
        return read_text_pair(source, target)
    return read_shipped(split, source_lang, target_lang)


def read_corpus(data_args: DataArguments) -> dict[str, list[Pair]]:
    """The pairs of every split: the user's files, or all of the shipped corpus where there are none."""
    files = {
        split: {kind: getattr(data_args, f"{split}_{kind}") for kind in ("file", "source", "target")}
        for split in SPLITS
    }
    own = any(any(paths.values()) for paths in files.values())
    if own and not any(files["train"].values()):
        raise InputError("a corpus without training pairs. Give --train_file, or --train_source and --train_target.")
    return {
        split: read_split(split, data_args.source_lang, data_args.target_lang, **paths)[
            : data_args.max_train_samples if split == "train" else data_args.max_eval_samples
        ]
        for split, paths in files.items()
        if not own or any(paths.values())
    }


def _checked(pairs: list[Pair], origin: str) -> list[Pair]:
    if not pairs:
        raise InputError(f"{origin}: no sentence pairs. Give a corpus with at least one pair.")
    one_sided = [pair for pair in pairs if not all(pair)]
    if one_sided:
        source, target = one_sided[0]
        side = "source" if target else "target"
        raise InputError(
            f"{origin}: {len(one_sided)} of {len(pairs)} pairs have an empty side; the first has no {side} for "
            f"{(source or target)[:60]!r}. Remove these pairs or translate them."
        )
    return pairs


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
