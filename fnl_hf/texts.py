"""Batches of model inputs from a file of texts, for calibration from the command line."""

import gzip
import json
import lzma
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

OPENERS = {".gz": gzip.open, ".xz": lzma.open}
BATCH = 16


def text_batches(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module,
    samples: int = 512,
    length: int = 128,
    fields: Sequence[str] = (),
    seed: int = 0,
) -> list[dict[str, torch.Tensor]]:
    """Batches of a random choice of the lines of a file, those of about one length together.

    A line is a text, or (.json, .jsonl) an object such as {"text": …}, {"question": …, "context": …} or
    {"translation": {"de": …, "en": …}}, or (.tsv) texts between tabs; .gz and .xz are unpacked. Of two texts an
    encoder-decoder takes the second as its target, another model as the second segment. An encoder-decoder that is
    given one text alone has it as its target too.

    Args:
        samples: how many lines, at most.
        length: tokens per text, at most.
        fields: of an object the texts to take, in this order; the first two if not given.

    Raises:
        ValueError: There are no texts, or a line is not what its file should hold.
    """
    rows = [row for row in _rows(Path(path), fields) if any(text.strip() for text in row)]
    if not rows:
        raise ValueError(f"{path} holds no texts to calibrate on: give a file with a text in each line")
    rows = random.Random(seed).sample(rows, min(samples, len(rows)))
    rows.sort(key=lambda row: sum(map(len, row)))
    translates = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if tokenizer.pad_token is None:  # masked out, whatever it is
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    chunks = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    return [_batch(chunk, tokenizer, model, translates, length) for chunk in chunks]


def _rows(path: Path, fields: Sequence[str]) -> Iterator[list[str]]:
    suffixes = [suffix for suffix in path.suffixes if suffix not in OPENERS]
    kind = suffixes[-1] if suffixes else ""
    with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if kind in (".json", ".jsonl"):
                yield _of_object(line, fields, f"{path}, line {number}")
            else:
                yield line.rstrip("\n").split("\t")[:2] if kind == ".tsv" else [line.rstrip("\n")]


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


def _batch(rows: list[list[str]], tokenizer, model: nn.Module, translates: bool, length: int) -> dict:
    options = {"truncation": True, "max_length": length, "padding": True, "return_tensors": "pt"}
    first, second = [row[0] for row in rows], [row[1] if len(row) > 1 else None for row in rows]
    if not translates:
        return dict(tokenizer(first, None if None in second else second, **options))
    targets = [a if b is None else b for a, b in zip(first, second, strict=True)]
    batch = dict(tokenizer(first, **options))
    labels = tokenizer(text_target=targets, **options)
    batch["labels"] = labels["input_ids"].masked_fill(labels["attention_mask"].eq(0), -100)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels["input_ids"])
        batch["decoder_attention_mask"] = labels["attention_mask"]
        del batch["labels"]
    return batch
