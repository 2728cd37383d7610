"""Batches of source and target ids as any sequence-to-sequence class takes them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import BatchEncoding, DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class TranslationCollator(DataCollatorForSeq2Seq):
    """Pads both sides, the labels with -100, and makes the decoder's inputs from them.

    Classes differ in whether they can make those themselves: M2M100 has no method for it, which label smoothing needs,
    and FSMT's writes padding into the labels, which then count.
    """

    decoder_start_token_id: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "TranslationCollator":
        """For a model whose first decoder token is known, as `set_first_token` leaves it."""
        return cls(tokenizer, decoder_start_token_id=model.generation_config.decoder_start_token_id)

    def __call__(self, features: list[dict], return_tensors: str | None = None) -> BatchEncoding:
        """Of features with `input_ids` and `labels`: these, a mask and `decoder_input_ids`, all (batch, tokens)."""
        batch = super().__call__(features, return_tensors)
        batch["decoder_input_ids"] = shifted_right(
            batch["labels"], self.decoder_start_token_id, self.tokenizer.pad_token_id
        )
        return batch


def shifted_right(labels: Tensor, start: int, pad: int) -> Tensor:
    """Labels one place later, (batch, tokens), after a first token; what is padding (-100) there is `pad`."""
    first = torch.full_like(labels[:, :1], start)
    shifted = torch.cat([first, labels[:, :-1]], 1)
    return shifted.masked_fill(shifted == -100, pad)
