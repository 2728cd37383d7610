"""How well a sentence encoder's similarities follow those that people give: pairs of sentences with scores."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .running import InputError, open_text

BATCH = 64  # sentences


def read_scored_pairs(path: Path) -> tuple[list[tuple[str, str]], list[float]]:
    """Pairs of sentences and their scores, from rows of (sentence, sentence, score) without a header."""
    with open_text(path) as file:
        rows = list(csv.reader(file))
    try:
        return [(first, second) for first, second, _ in rows], [float(score) for *_, score in rows]
    except ValueError as error:
        raise InputError(f"{path}: expected rows of sentence, sentence, score, without a header ({error}).") from error


@torch.no_grad()
def embedded(model: nn.Module, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> dict[str, Tensor]:
    """sentence -> the mean of its last hidden states, of length 1; sentences of about one length share a batch."""
    model.eval()
    sentences = sorted(set(sentences))
    encoded = tokenizer(sentences, truncation=True, max_length=256)["input_ids"]
    ordered, vectors = sorted(range(len(sentences)), key=lambda i: len(encoded[i])), {}
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start : start + BATCH]
        inputs = tokenizer.pad({"input_ids": [encoded[i] for i in batch]}, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        means = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        vectors |= zip((sentences[i] for i in batch), nn.functional.normalize(means, dim=-1), strict=True)
    return vectors


def similarity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    scores: Sequence[float],
) -> float:
    """100 times the correlation, by ranks, of cosines and scores."""
    vectors = embedded(model, tokenizer, [sentence for pair in pairs for sentence in pair])
    cosines = [float(vectors[first] @ vectors[second]) for first, second in pairs]
    ranks = torch.stack([_ranks(torch.tensor(values, dtype=torch.float64)) for values in (cosines, scores)])
    return round(100 * float(ranks.corrcoef()[0, 1]), 2)


def _ranks(values: Tensor) -> Tensor:
    """The place of each value in ascending order, equal ones at the mean of theirs."""
    _, which, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[which].double()
