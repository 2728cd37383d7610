"""From text to token ids on disk: once per corpus and tokenizer, in bounded memory, all or nothing."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..running import (
    InputError,
    TokenStore,
    TokenWriter,
    fingerprint,
    load,
    once,
    prepare_tokenizer,
    prepared_directory,
    tokenizer_digest,
)
from .arguments import DataArguments, MLMArguments, ModelArguments, sequence_lengths
from .demonstration import shipped_file
from .text import END, corpus_files, read_corpus
from .tokenizer import check_tokenizer, train_tokenizer

_PIECE = 100_000  # characters that are tokenized at once: a tokenizer needs some 100 bytes a token
_BATCH = 1_000_000  # characters of a batch of lines


def prepared_text(
    checkpoint: Path | None, model_args: ModelArguments, data_args: DataArguments, args: MLMArguments
) -> tuple[PreTrainedTokenizerBase, dict[str, TokenStore]]:
    """The tokenizer, and the tokens of the user's files or of the shipped novels, made now or by an earlier run.

    Args:
        checkpoint: the one to resume from, whose tokenizer is taken.
    """
    if data_args.train_file is None:
        files = {split: [shipped_file(split)] for split in ("train", "validation")}
    else:
        given = {"train": data_args.train_file, "validation": data_args.validation_file}
        files = {split: corpus_files(paths) for split, paths in given.items() if paths}
    reading = {
        "text_column": data_args.text_column,
        "documents": data_args.documents if data_args.train_file else "blank_line",
    }

    def read(split: str):
        progress = tqdm(desc=f"Reading {split}", unit=" lines", disable=args.disable_tqdm)
        for line in read_corpus(files[split], **reading, max_line_length=data_args.max_line_length):
            progress.update()
            yield line
        progress.close()

    directory = prepared_directory(data_args.prepared_dir, args.output_dir)
    name = checkpoint or model_args.tokenizer_name or model_args.model_name_or_path
    if name is not None:
        tokenizer = load(AutoTokenizer, name)
        check_tokenizer(tokenizer, name)
    else:
        options = {
            "kind": model_args.tokenizer_type,
            "vocab_size": model_args.vocab_size,
            "lowercase": model_args.lowercase,
            "token_types": model_args.model_type in ("bert", "electra"),
            "max_length": max(512, *sequence_lengths(data_args)),
        }
        tokenizer = prepare_tokenizer(
            directory / f"tokenizer-{fingerprint(files['train'], **reading, **options)}",
            lambda: train_tokenizer(lambda: filter(None, read("train")), **options),
        )
    digest = tokenizer_digest(tokenizer)
    return tokenizer, {
        split: prepare_store(
            directory / f"{split}-{fingerprint(paths, **reading, tokenizer=digest)}",
            partial(read, split),
            tokenizer,
            split,
        )
        for split, paths in files.items()
    }


def prepare_store(
    directory: Path, read: Callable[[], Iterable[str | None]], tokenizer: PreTrainedTokenizerBase, name: str = "text"
) -> TokenStore:
    """The token store in `directory`, made there if there is none.

    Args:
        read: gives the lines, with `END` behind every document.
        name: of the text in messages.

    Raises:
        InputError: what `read` raises, or there is no text.
    """

    def write(partial: Path) -> None:
        if not write_store(partial, read(), tokenizer):
            raise InputError(f"the {name} files hold no text. Give a corpus with at least one line.")

    once(directory, write)
    return TokenStore(directory)


def write_store(directory: Path, lines: Iterable[str | None], tokenizer: PreTrainedTokenizerBase) -> int:
    """Write a `TokenStore` of `lines` with `END` behind every document; returns its number of tokens.

    The documents are each followed by a separator token, behind their end, and none begins with a begin token: a block
    of any length is a slice of them.
    """
    blank = " " if _needs_blank(tokenizer) else ""
    start = 0
    with TokenWriter(directory, tokenizer) as writer:
        for batch in _batches(lines):
            texts = [line if line.startswith(" ") else blank + line for line in batch if line is not END]
            encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
            for line in batch:
                if line is not END:
                    writer.write(next(encoded))
                elif writer.total > start:  # not a document without tokens
                    writer.end()
                    writer.write([tokenizer.sep_token_id])
                    start = writer.total
    return writer.total


def _needs_blank(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a line's first word would be taken for the rest of the last word of the line before.

    So it is with RoBERTa's tokenizer, in which the blank before a word is part of it, and a line begins with none.
    """
    alone, after_blank = (tokenizer.tokenize(text)[:1] for text in ("a", " a"))
    return alone == ["a"] and after_blank == ["Ġa"]


def _batches(lines: Iterable[str | None]) -> Iterator[list[str | None]]:
    """Lists of lines (long ones in pieces, cut before a blank) and `END`s, of about a million characters each."""
    batch, size = [], 0
    for line in lines:
        pieces = [END] if line is END else _pieces(line)
        for piece in pieces:
            batch.append(piece)
            size += 0 if piece is END else len(piece)
            if size >= _BATCH or len(batch) >= _BATCH // 100:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _pieces(line: str) -> Iterator[str]:
    start = 0
    while len(line) - start > _PIECE:
        cut = line.rfind(" ", start + 1, start + _PIECE)
        cut = cut if cut > start else start + _PIECE
        yield line[start:cut]
        start = cut
    yield line[start:]
