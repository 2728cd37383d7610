"""Blocks of full length, cut out of a token store when they are asked for, and the order in which a run sees them."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..running import InputError, TokenStore


class Blocks(Sequence):
    """The tokens of a store (or of its part `start` to `end`) as blocks `[CLS] … [SEP]` of `length` tokens.

    Blocks run on from one document into the next, with a separator between them, and what is left at the end is
    dropped. With `respect_documents` each document begins a block of its own, and its last block is shorter.

    Nothing but the documents' ends is in memory: a block is read from the store's memory map.

    Raises:
        InputError: there is not one block.
    """

    def __init__(
        self,
        store: TokenStore,
        length: int,
        tokenizer: PreTrainedTokenizerBase,
        respect_documents: bool = False,
        start: int = 0,
        end: int | None = None,
    ):
        end = len(store.tokens) if end is None else end
        self.store, self.length, self.start, self.end = store, length, start, end
        self.first, self.last = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.room = length - 2  # beside begin and end
        self.documents = None
        if respect_documents:
            ends = np.asarray(store.ends)
            starts = np.concatenate([[0], ends[:-1] + 1])
            starts, ends = np.clip(starts, start, end), np.clip(ends, start, end)
            kept = ends > starts
            self.documents = starts[kept], ends[kept]
            self.counts = np.cumsum(-(-(ends - starts)[kept] // self.room))  # blocks up to the end of each document
        if not len(self):
            raise InputError(
                f"{end - start} tokens of text are not one block of {length}. Give more text, or lower "
                "--max_seq_length and --phase2_seq_length."
            )

    def __len__(self) -> int:
        if self.documents is None:
            return (self.end - self.start) // self.room
        return int(self.counts[-1]) if len(self.counts) else 0

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(i)
        if self.documents is None:
            start, end = self.start + i * self.room, self.end
        else:
            document = np.searchsorted(self.counts, i, side="right")
            before = self.counts[document - 1] if document else 0
            start, end = self.documents[0][document] + (i - before) * self.room, self.documents[1][document]
        ids = self.store.tokens[start : min(start + self.room, end)]
        block = np.empty(len(ids) + 2, np.int64)
        block[0], block[1:-1], block[-1] = self.first, ids, self.last
        return block


def held_out(store: TokenStore, percentage: float) -> int:
    """Where the last `percentage` of a store's tokens begin."""
    return len(store.tokens) - int(len(store.tokens) * percentage / 100)


class Run(Dataset):
    """All sequences of a training run in their order: item p is the p-th that the model sees.

    The order is a fresh shuffle of the blocks in every pass over them. It is a function of `seed` and p alone, and so
    is the mask (see `Masking`): a run that is resumed at any step goes on with the very same batches. That holds for
    two lengths too: the first `sequences[0]` items are from `blocks[0]`, the next `sequences[1]` from `blocks[1]`.

    The trainer must take the items in sequence; a whole run is one epoch to it.
    """

    def __init__(self, blocks: Sequence[Blocks], sequences: Sequence[int], seed: int):
        self.blocks, self.seed = blocks, seed
        self.bounds = np.concatenate([[0], np.cumsum(sequences)])
        self._order = (None, None)  # of the pass that was asked for last

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, position: int) -> dict:
        phase = int(np.searchsorted(self.bounds, position, side="right")) - 1
        blocks = self.blocks[phase]
        epoch, i = divmod(position - int(self.bounds[phase]), len(blocks))
        if self._order[0] != (phase, epoch):
            rng = np.random.default_rng([self.seed, phase, epoch])
            self._order = (phase, epoch), rng.permutation(len(blocks))
        return {"position": position, "input_ids": blocks[int(self._order[1][i])]}

    @property
    def passes(self) -> float:
        """How often the run goes over its text."""
        return sum(
            (end - start) / len(blocks) for blocks, (start, end) in zip(self.blocks, pairwise(self.bounds), strict=True)
        )
