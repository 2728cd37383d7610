"""Model inputs from a file of texts, to calibrate on or to learn from a teacher."""

import copy
import csv
import gzip
import json
import lzma
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

TABLES = {".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}, ".csv": {}}
OPENERS = {".gz": gzip.open, ".xz": lzma.open}
BATCH = 16
LINES = 1000  # that are tokenized together
# How GLUE's tables and others name the columns of their texts: one, or a pair
TEXT_COLUMNS = (
    ("sentence1", "sentence2"),  # RTE, WNLI, STS-B, MNLI
    ("question", "sentence"),  # QNLI
    ("question1", "question2"),  # QQP
    ("premise", "hypothesis"),
    ("#1 String", "#2 String"),  # MRPC
    ("sentence",),  # SST-2, CoLA
    ("text",),
)


def text_batches(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module,
    samples: int = 512,
    length: int = 128,
    fields: Sequence[str] = (),
    seed: int = 0,
) -> list[dict[str, torch.Tensor]]:
    """Batches of a random choice of the texts of a file, those of about one length together: see `encoded_texts`."""
    rows = encoded_texts(path, tokenizer, model, samples, length, fields, seed)
    rows.sort(key=lambda row: sum(map(len, row.values())))
    collate = TextCollator(tokenizer, model)
    return [collate(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]


def encoded_texts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module,
    samples: int | None = None,
    length: int = 128,
    fields: Sequence[str] = (),
    seed: int = 0,
) -> list[dict[str, list[int]]]:
    """The texts of a file as a tokenizer gives them to a model, unpadded, in random order.

    A line is a text, or (.json, .jsonl) an object such as {"text": …}, {"question": …, "context": …} or
    {"translation": {"de": …, "en": …}}, or a row of a table (.tsv, .csv); .gz and .xz are unpacked. A .json file in the
    layout of SQuAD gives its paragraphs, each with its first question before it. Of two texts an encoder-decoder takes
    the second as its target, another model as the second segment. An encoder-decoder that is given one text alone has
    it as its target too.

    Of a table whose first row has GLUE's names (`TEXT_COLUMNS`) those columns are the texts, of another one the first
    two that hold more than numbers: labels and scores are no texts.

    Args:
        samples: how many lines, at most; all if not given.
        length: tokens per text, at most.
        fields: of an object the texts to take, in this order, the first two if not given; of a table names in its first
            row.

    Raises:
        ValueError: There are no texts, or a line is not what its file should hold.
    """
    rows = [row for row in _readable(Path(path), fields) if any(text.strip() for text in row)]
    if not rows:
        raise ValueError(f"{path} holds no texts to calibrate on: give a file with a text in each line")
    rows = random.Random(seed).sample(rows, len(rows) if samples is None else min(samples, len(rows)))
    options = {"truncation": True, "max_length": min(length, _longest(tokenizer, model))}
    if not _translates(model):
        return [dict(tokenizer(*row, **options)) for row in rows]
    targets = (tokenizer(text_target=row[-1], **options)["input_ids"] for row in rows)
    return [dict(tokenizer(row[0], **options)) | {"labels": labels} for row, labels in zip(rows, targets, strict=True)]


def blocks(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, length: int = 128, limit: int | None = None
) -> torch.Tensor:
    """The lines of a text file as one stream of tokens, cut into blocks, (blocks, length), for a causal language model.

    The end of a line is the tokenizer's ``eos_token``, if it has one; what is left over at the end is dropped.

    Args:
        limit: the first blocks only.

    Raises:
        ValueError: The text is shorter than a block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    lines = [" ".join(row) for row in _rows(Path(path), ())]
    stream: list[int] = []
    for start in range(0, len(lines), LINES):
        for ids in tokenizer(lines[start : start + LINES], add_special_tokens=False)["input_ids"]:
            stream += ids + end
        if limit is not None and len(stream) >= limit * length:
            break
    count = min(len(stream) // length, limit or len(stream))
    if not count:
        raise ValueError(f"{path} has {len(stream)} tokens, not one block of {length}: give a longer text")
    return torch.tensor(stream[: count * length]).view(count, length)


class TextCollator:
    """Rows of `encoded_texts` as one batch; of an encoder-decoder its target as inputs of the decoder.

    A classifier whose config names no token for padding, without which it takes no batches, gets the tokenizer's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: nn.Module):
        if tokenizer.pad_token is None:  # masked out, whatever it is
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        self.tokenizer, self.model = tokenizer, model
        looks_for_padding = type(model).__name__ in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()
        if looks_for_padding and getattr(model.config, "pad_token_id", 0) is None:  # for the last token before it
            model.config.pad_token_id = tokenizer.pad_token_id

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        batch = dict(self.tokenizer.pad(inputs, return_tensors="pt"))
        if not _translates(self.model):
            return batch
        if not (_writes(self.model) or hasattr(self.model, "prepare_decoder_input_ids_from_labels")):
            return batch  # its decoder is given the source
        target = self.tokenizer.pad([{"input_ids": row["labels"]} for row in rows], return_tensors="pt")
        ids, mask = target["input_ids"], target["attention_mask"]
        if hasattr(self.model, "prepare_decoder_input_ids_from_labels"):
            batch["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=ids)
            batch["decoder_attention_mask"] = mask
        else:
            batch["labels"] = ids.masked_fill(mask.eq(0), -100)
        return batch


def _writes(model: nn.Module) -> bool:
    """Whether labels are what it should write."""
    return type(model).__name__ in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()


def _longest(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> int:
    """Tokens that both take; two positions of RoBERTa and its kin are not for tokens."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    known = isinstance(positions, int) and positions > 2
    return min(tokenizer.model_max_length, positions - 2) if known else tokenizer.model_max_length


def _translates(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _readable(path: Path, fields: Sequence[str]) -> list[list[str]]:
    """`_rows`, with one kind of error for all that a file may have."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file in it, with a text in each line")
    try:
        return list(_rows(path, fields))
    except (EOFError, lzma.LZMAError, zlib.error, UnicodeError, gzip.BadGzipFile, csv.Error) as error:
        raise ValueError(f"{path} is not a readable UTF-8 text file, or cut off or damaged: {error}") from error


def _rows(path: Path, fields: Sequence[str]) -> Iterator[list[str]]:
    suffixes = [suffix for suffix in path.suffixes if suffix not in OPENERS]
    kind = suffixes[-1] if suffixes else ""
    with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as file:
        if kind == ".json" and (paragraphs := _squad(file)) is not None:
            yield from paragraphs
            return
        if kind in TABLES:
            yield from _of_table(list(csv.reader(file, **TABLES[kind])), fields, path)
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if kind in (".json", ".jsonl"):
                yield _of_object(line, fields, f"{path}, line {number}")
            else:
                yield [line.rstrip("\n")]


def _of_table(rows: list[list[str]], fields: Sequence[str], path: Path) -> Iterator[list[str]]:
    """The texts of each row."""
    rows = [[cell.strip() for cell in row] for row in rows]
    rows = [row for row in rows if any(row)]
    header = rows[0] if rows else []
    if missing := [name for name in fields if name not in header]:
        raise ValueError(f"{path}: has no column {missing[0]!r}, only {', '.join(map(repr, header))}")
    names = fields or next((names for names in TEXT_COLUMNS if set(names) <= set(header)), ())
    if names:
        places, rows = [header.index(name) for name in names], rows[1:]
    else:
        filled = [place for place in range(len(header)) if any(row[place] for row in rows if place < len(row))]
        places = [i for i in filled if not all(_is_number(row[i]) for row in rows[1:] or rows if len(row) > i)][:2]
    for row in rows:
        if texts := [row[place] for place in places if place < len(row)]:
            yield texts


def _is_number(text: str) -> bool:
    try:
        float(text or "0")
    except ValueError:
        return False
    return True


def _squad(file: TextIO) -> list[list[str]] | None:
    """[question, paragraph] of each paragraph of a file in the layout of SQuAD; None of another one, rewound."""
    try:
        articles = json.load(file)["data"]
        return [
            [*(question["question"] for question in paragraph["qas"][:1]), paragraph["context"]]
            for article in articles
            for paragraph in article["paragraphs"]
        ]
    except (json.JSONDecodeError, KeyError, TypeError):
        file.seek(0)  # lines of objects
        return None


def _of_object(line: str, fields: Sequence[str], where: str) -> list[str]:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not an object in JSON ({error}); expected one in each line") from error
    data = data.get("translation", data) if isinstance(data, dict) else {}
    names = list(fields) or [name for name, value in data.items() if isinstance(value, str)][:2]
    texts = [data.get(name) for name in names]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{where}: has no text under {', '.join(names) or 'any name'}, only {', '.join(data) or 'none'}"
        )
    return texts
