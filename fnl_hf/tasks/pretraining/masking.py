"""Masks for masked language modelling: dynamic in training, fixed in evaluation, a function of seed and place."""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from .packing import Blocks
from .tokenizer import word_beginnings


class Masking:
    """Collator: of 15 % of the tokens 80 % become the mask, 10 % a random token and 10 % stay; all are labels.

    `DataCollatorForLanguageModeling` draws the masks, but not from torch's generator, which dropout uses too and from
    which batches are drawn ahead of time: a run resumed from a checkpoint would mask otherwise. Here a batch draws
    from a generator of its own, seeded with `seed` and the position of its first example.

    Args:
        probability: of a token to be masked; with `whole_words`, of a word, all of whose tokens then are.
        pad: examples differ in length; pad to the longest and give an attention mask.

    Examples are dicts with `position` and `input_ids`, an array of whole numbers; those that have `labels` already keep
    them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        probability: float = 0.15,
        whole_words: bool = False,
        seed: int = 0,
        pad: bool = False,
    ):
        self.masker = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=probability, mask_replace_prob=1.0, random_replace_prob=0.0
        )
        # Set afterwards: the collator's own __post_init__ allows whole words only with all of them replaced by masks
        self.masker.whole_word_mask = whole_words
        self.masker.mask_replace_prob, self.masker.random_replace_prob = 0.8, 0.1
        self.seed, self.pad, self.pad_id = seed, pad, tokenizer.pad_token_id
        self.special = torch.zeros(len(tokenizer), dtype=torch.bool)
        self.special[tokenizer.all_special_ids] = True
        self.begins_word = torch.tensor(word_beginnings(tokenizer)) if whole_words else None

    def __call__(self, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        masked = "labels" in examples[0]
        batch = {"input_ids": self._stack([example["input_ids"] for example in examples], self.pad_id)}
        if self.pad:
            batch["attention_mask"] = batch["input_ids"].ne(self.pad_id).long()
        if masked:
            return batch | {"labels": self._stack([example["labels"] for example in examples], -100)}
        return batch | self.mask(batch["input_ids"], examples[0]["position"])

    def mask(self, ids: torch.Tensor, position: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels` of the sequences `ids` (batch, tokens); the same again for the same position."""
        state = np.random.SeedSequence([self.seed, position]).generate_state(1, np.uint64)
        self.masker.generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
        offsets = None if self.begins_word is None else self._offsets(ids)
        inputs, labels = self.masker.torch_mask_tokens(
            ids, special_tokens_mask=self.special[ids], offset_mapping=offsets
        )
        return {"input_ids": inputs, "labels": labels}

    def _stack(self, rows: list, filling: int) -> torch.Tensor:
        rows = [torch.as_tensor(row) for row in rows]
        return pad_sequence(rows, batch_first=True, padding_value=filling) if self.pad else torch.stack(rows)

    def _offsets(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, 2) offsets as of a text with gaps before words and nowhere else: what the collator asks."""
        starts = torch.arange(ids.shape[1]) + self.begins_word[ids].cumsum(1)
        return torch.stack([starts, starts + 1], dim=-1)


class FixedMasks(Dataset):
    """Blocks masked once and for all: the same tokens of each in every run, whatever its seed and batch size.

    Single tokens are masked, 15 % of them, also where training masks whole words: losses compare between variants.

    Args:
        limit: take only so many blocks, from the first on.
    """

    def __init__(self, blocks: Blocks, tokenizer: PreTrainedTokenizerBase, limit: int | None = None):
        self.blocks = blocks
        self.count = len(blocks) if limit is None else min(limit, len(blocks))
        self.length = self.count
        self.masking = Masking(tokenizer)

    def fill_up(self, multiple: int) -> None:
        """Lengthen to a multiple, by blocks without labels: batches for all processes without a block given twice."""
        self.length = math.ceil(self.count / multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if not 0 <= i < self.length:
            raise IndexError(i)
        if i >= self.count:
            return self[0] | {"labels": torch.full_like(self[0]["labels"], -100)}
        batch = self.masking([{"position": i, "input_ids": self.blocks[i]}])
        return {name: tensor[0] for name, tensor in batch.items()}

    @cached_property
    def labels(self) -> int:
        """How many tokens are masked in all."""
        return sum(int(self[i]["labels"].ne(-100).sum()) for i in range(self.count))
