"""From sentence pairs to token ids: of training pairs on disk, once per corpus and tokenizer, in bounded memory."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import datasets
import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..running import (
    InputError,
    TokenStore,
    TokenWriter,
    fingerprint,
    once,
    prepare_tokenizer,
    say,
    tokenizer_digest,
)
from .arguments import DataArguments
from .corpus import Pair, ParallelText
from .languages import target_ids
from .tokenizer import train_tokenizer

Ids = list[list[int]]

_BATCH = 1000  # pairs that are tokenized at once
CHARACTERS = 32  # of a token, at most, in a sentence: what is longer is too long without being tokenized
_WORKERS = 8  # processes at most, for tokenizers that are not parallel themselves
_EMPTY, _LONG = "empty", "long"  # why a training pair is skipped


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    targets: Sequence[str],
    prefix: str = "",
    max_length: int | None = None,
) -> tuple[Ids, Ids]:
    """Token ids of sources, with `prefix` before each, and of targets, as the tokenizer's languages have them.

    Args:
        max_length: tokens to cut both sides to. None: nothing is cut.
    """
    options = {"return_attention_mask": False, "verbose": False}
    if max_length is not None:
        options |= {"truncation": True, "max_length": max_length}
    ids = tokenizer([prefix + source for source in sources], **options)["input_ids"]
    return ids, target_ids(tokenizer, list(targets), **options)


def encode(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, data_args: DataArguments) -> datasets.Dataset:
    """All of the pairs, to evaluate on, in columns `input_ids` and `labels`; both are cut to `max_length` tokens.

    How many targets are cut is said: the loss is then of their beginnings.
    """
    most, prefix = data_args.max_length, data_args.source_prefix
    sides = list(zip(*([text[: CHARACTERS * most] for text in pair] for pair in pairs), strict=True))
    sources, targets = tokenize_pairs(tokenizer, *sides, prefix)
    if cut := sum(len(ids) > most for ids in targets):
        say(f"{cut:,} of {len(pairs):,} validation targets are cut to {most} tokens: the loss is that of what is left.")
    if any(len(ids) > most for ids in chain(sources, targets)):
        sources, targets = tokenize_pairs(tokenizer, *sides, prefix, most)
    return datasets.Dataset.from_dict({"input_ids": sources, "labels": targets})


class PairStore(Dataset):
    """The token ids of training pairs, memory-mapped: items `{"input_ids": [...], "labels": [...]}`.

    Attributes:
        lengths: (pairs, 2) tokens of source and of target.
        counts: pairs that were "read", and of these the "kept" ones, and the "empty" and "long" ones that were skipped.
    """

    def __init__(self, directory: Path):
        self.sides = {name: TokenStore(directory / name) for name in ("input_ids", "labels")}
        self.counts = json.loads((directory / "counts.json").read_text())

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.stack([np.diff(side.ends, prepend=0).astype(np.int32) for side in self.sides.values()], axis=1)

    def __len__(self) -> int:
        return len(self.sides["labels"].ends)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        item = {}
        for name, side in self.sides.items():
            start = side.ends[i - 1] if i else 0
            item[name] = side.tokens[start : side.ends[i]].tolist()
        return item


def prepare_vocabulary(
    text: ParallelText, vocab_size: int, data_args: DataArguments, directory: Path
) -> PreTrainedTokenizerBase:
    """The joint BPE of the training pairs, learned now or by an earlier run with the same `directory`."""
    most = data_args.max_train_samples

    def make() -> PreTrainedTokenizerBase:
        two_sided = filter(all, text)
        if (first := next(two_sided, None)) is None:
            raise InputError(f"{text}: no pair has text on both sides. Give a corpus with at least one pair.")
        sentences = chain.from_iterable(islice(chain([first], two_sided), most))
        return train_tokenizer(sentences, vocab_size, data_args.max_length)

    options = {"vocab_size": vocab_size, "max_length": data_args.max_length, "pairs": most}
    name = fingerprint(text.files, languages=text.languages, **options)
    return prepare_tokenizer(directory / f"vocabulary-{name}", make)


def prepare_pairs(
    text: ParallelText,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    directory: Path,
    progress: bool = False,
) -> PairStore:
    """The training pairs as token ids, made now or by an earlier run with the same `directory`.

    Pairs with an empty side, and those with more than `max_length` tokens on one (prefix and special tokens included),
    are skipped, which is said; no target is ever cut. `max_train_samples` is the number of pairs that are kept.

    Raises:
        InputError: what reading raises, or there are no pairs, or all are skipped.
    """
    most, prefix, limit = data_args.max_length, data_args.source_prefix, data_args.max_train_samples

    def write(partial: Path) -> None:
        read = tqdm(text, desc="Tokenizing training pairs", unit=" pairs", disable=not progress)
        counts = write_pairs(partial, read, tokenizer, prefix, most, limit)
        if not counts["read"]:
            raise InputError(f"{text}: no sentence pairs. Give a corpus with at least one pair.")
        if not counts["kept"]:
            raise InputError(
                f"{text}: no pair is left ({_skipped(counts, most)}). Give text on both sides, or raise --max_length."
            )

    name = fingerprint(
        text.files,
        languages=text.languages,
        tokenizer=tokenizer_digest(tokenizer),
        kind=type(tokenizer).__name__,
        tags=[getattr(tokenizer, name, None) for name in ("src_lang", "tgt_lang")],
        prefix=prefix,
        max_length=most,
        pairs=limit,
    )
    once(directory / f"pairs-{name}", write)
    store = PairStore(directory / f"pairs-{name}")
    if store.counts["kept"] < store.counts["read"]:
        say(_skipped(store.counts, most))
    return store


def _skipped(counts: dict[str, int], max_length: int) -> str:
    reasons = {_EMPTY: "empty", _LONG: f"longer than {max_length} tokens"}
    parts = [f"{counts[key]:,} {reason}" for key, reason in reasons.items() if counts[key]]
    skipped = counts["read"] - counts["kept"]
    return f"{skipped:,} of {counts['read']:,} training pairs skipped: {', '.join(parts)}"


def write_pairs(
    directory: Path,
    pairs: Iterable[Pair],
    tokenizer: PreTrainedTokenizerBase,
    prefix: str,
    max_length: int,
    limit: int | None = None,
) -> dict[str, int]:
    """Write a `PairStore` of the pairs (of the first `limit` pairs) that are neither empty nor too long.

    Returns:
        its counts.
    """
    counts = Counter({"read": 0, "kept": 0, _EMPTY: 0, _LONG: 0})
    tokenized = DataLoader(  # a batch of text is the index that a worker is given
        _Tokenizing(tokenizer, prefix, max_length),
        sampler=_batches(pairs, CHARACTERS * max_length),
        batch_size=None,
        num_workers=0 if tokenizer.is_fast else min(_WORKERS, os.cpu_count() or 1),
        collate_fn=list,
    )
    writers = [TokenWriter(directory / name, tokenizer) for name in ("input_ids", "labels")]
    with writers[0], writers[1]:
        for batch in tokenized:
            kept = []
            for outcome in batch:
                if limit is not None and counts["kept"] == limit:
                    break
                counts["read"] += 1
                if isinstance(outcome, str):
                    counts[outcome] += 1
                else:
                    counts["kept"] += 1
                    kept.append(outcome)
            for writer, texts in zip(writers, zip(*kept, strict=True), strict=bool(kept)):
                writer.write_texts(texts)
            if limit is not None and counts["kept"] == limit:
                break
    (directory / "counts.json").write_text(json.dumps(counts))
    return counts


def _batches(pairs: Iterable[Pair], longest: int) -> Iterator[list[Pair | str]]:
    """Lists of `_BATCH` pairs, or in place of a pair why it is skipped."""
    outcomes = (
        _EMPTY if not all(pair) else _LONG if max(map(len, pair)) > longest else pair  # (not kept: it may be huge)
        for pair in pairs
    )
    while batch := list(islice(outcomes, _BATCH)):
        yield batch


class _Tokenizing(Dataset):
    """From a batch of `_batches` to the token ids of its pairs, or in place of a pair why it is skipped."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prefix: str, max_length: int):
        self.tokenizer, self.prefix, self.max_length = tokenizer, prefix, max_length

    def __getitem__(self, batch: list[Pair | str]) -> list[tuple[list[int], list[int]] | str]:
        pairs = [outcome for outcome in batch if not isinstance(outcome, str)]
        if not pairs:
            return batch
        ids = zip(*tokenize_pairs(self.tokenizer, *zip(*pairs, strict=True), self.prefix), strict=True)
        tokenized = (
            _EMPTY if not all(sides) else _LONG if max(map(len, sides)) > self.max_length else sides for sides in ids
        )
        return [outcome if isinstance(outcome, str) else next(tokenized) for outcome in batch]
