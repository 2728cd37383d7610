"""Batches bounded by tokens instead of sentences, with sentences of similar length together."""

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainerCallback

from fnl_hf import FNLSeq2SeqTrainer

from ..running import InputError
from .validation import ScoredValidation

Length = tuple[int, int]  # tokens of source and of target

_MULTIPLE = 8  # of sentences in a batch, where there is room for so many


class TokenBatchSampler(BatchSampler):
    """Batches of dataset indices with at most `max_tokens` tokens, source and target together, padding included.

    Examples are sorted by source length, and those of equal source length by target length, upwards and downwards in
    turn, so that neighbours differ little on both sides. Then they are cut into batches. Examples of equal lengths and
    the order of the batches are shuffled anew in each epoch, from `seed` and the epoch alone. The sorted lengths, and
    with them the number of batches, are the same in every epoch.

    Several processes and resuming need no care here: accelerate gives process i every i-th of the batches (which are
    the same in each process) and skips those that were done.

    Args:
        lengths: (examples, 2) tokens of source and of target of every example.
        max_tokens: bound of `len(batch) * (longest source + longest target)`.
        seed: of the shuffling.

    Attributes:
        bounds: (batches + 1,) where each batch begins among the sorted examples.

    Raises:
        InputError: an example is longer than `max_tokens`.
    """

    def __init__(self, lengths: np.ndarray | Sequence[Length], max_tokens: int, seed: int):
        lengths = np.asarray(lengths, np.int32)
        longest = int(lengths.sum(1).max())
        if longest > max_tokens:
            raise InputError(
                f"a sentence and its translation have {longest} tokens, and a batch at most {max_tokens}. "
                "Raise --max_tokens or lower --max_length."
            )
        self.max_tokens, self.seed, self.epoch = max_tokens, seed, 0
        # What accelerate asks a batch sampler: no fixed batch size, nothing dropped.
        self.batch_size, self.drop_last = None, False
        self._kind, in_order = _serpentine(lengths)
        self.bounds = _cut(in_order, max_tokens)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self._kind))
        order = order[np.argsort(self._kind[order], kind="stable")]
        for batch in rng.permutation(len(self)):
            yield order[self.bounds[batch] : self.bounds[batch + 1]].tolist()

    def __len__(self) -> int:
        return len(self.bounds) - 1


def _serpentine(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of every example's lengths, (examples,), and all (examples, 2) lengths in the order of these places."""
    source, target = lengths.T
    rank = np.cumsum(np.bincount(source) > 0)[source]  # of its source length among those that occur
    order = np.lexsort((np.where(rank % 2 == 0, target, -target), source))
    in_order = lengths[order]
    changes = np.any(in_order[1:] != in_order[:-1], axis=1)
    places = np.empty(len(lengths), np.int32)
    places[order] = np.concatenate([[0], np.cumsum(changes)])
    return places, in_order


def _cut(lengths: np.ndarray, max_tokens: int) -> np.ndarray:
    """Where batches begin, and the last ends: each as large as it may be, less what exceeds a multiple of sentences.

    Args:
        lengths: (examples, 2), ascending in the first column.
    """
    bounds = [0]
    while (start := bounds[-1]) < len(lengths):
        room = max_tokens // int(lengths[start, 0] + 1)  # sentences at most
        padded = np.maximum.accumulate(lengths[start : start + room]).sum(1)
        size = int(np.sum(padded * np.arange(1, len(padded) + 1) <= max_tokens))
        if size >= _MULTIPLE and start + size < len(lengths):
            size -= size % _MULTIPLE
        bounds.append(start + size)
    return np.array(bounds)


def token_batches(dataset, args) -> TokenBatchSampler:
    """The batches of a dataset, by the sizes and seeds of `args`.

    The dataset has an array `lengths`, (examples, 2), or else the columns `input_ids` and `labels`.
    """
    lengths = getattr(dataset, "lengths", None)
    if lengths is None:
        lengths = [(len(ids), len(labels)) for ids, labels in zip(dataset["input_ids"], dataset["labels"], strict=True)]
    return TokenBatchSampler(lengths, args.max_tokens, args.seed if args.data_seed is None else args.data_seed)


def steps_of_epochs(dataset, args) -> int:
    """Optimizer steps of `args.num_train_epochs`, as the Trainer counts them."""
    batches = math.ceil(len(token_batches(dataset, args)) / args.world_size)
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


class _Reshuffle(TrainerCallback):
    """Tells the sampler the epoch. The Trainer does so too, but cannot reach it through the two wrappers (shard and
    skip) of a run that is resumed on several processes."""

    def __init__(self, sampler: TokenBatchSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch))


class TranslationTrainer(ScoredValidation, FNLSeq2SeqTrainer):
    """`FNLSeq2SeqTrainer` in training batches of `args.max_tokens` tokens, with scores in validation.

    Its log has `tokens_per_second`.

    These are the tokens of targets, padding left out, since the last line of the log (evaluation at it not counted).
    The training dataset is as `token_batches` takes it; `args.data_seed`, or else `args.seed`, shuffles it.
    """

    _since: float | None = None  # when the first batch after the last logged loss was asked for
    _targets = 0  # target tokens of this process since then

    def get_train_dataloader(self) -> DataLoader:
        dataset, args = self.train_dataset, self.args
        sampler = token_batches(dataset, args)
        self.remove_callback(_Reshuffle)  # of a previous call to train
        self.add_callback(_Reshuffle(sampler))
        return self.accelerator.prepare(
            DataLoader(
                dataset,
                batch_sampler=sampler,
                collate_fn=self.data_collator,
                num_workers=args.dataloader_num_workers,
                pin_memory=args.dataloader_pin_memory,
            )
        )

    def get_batch_samples(self, *args, **kwargs):
        """As in `FNLSeq2SeqTrainer`; counts the target tokens of a step."""
        if self._since is None:
            self._since, self._targets = time.perf_counter(), 0
        batches, count = super().get_batch_samples(*args, **kwargs)
        self._targets = self._targets + sum(batch["labels"].ne(-100).sum() for batch in batches)
        return batches, count

    def log(self, logs, *args, **kwargs):
        """As in `FNLSeq2SeqTrainer`, with the rate of target tokens beside the loss."""
        if "loss" in logs and self._since is not None:
            tokens = self.accelerator.gather(torch.as_tensor(self._targets, device=self.args.device)).sum().item()
            logs = logs | {"tokens_per_second": round(tokens / (time.perf_counter() - self._since), 1)}
            self._since = None
        super().log(logs, *args, **kwargs)
