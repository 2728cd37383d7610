"""Token ids, and batches bounded by tokens instead of sentences, with sentences of similar length together."""

import math
import random
from collections.abc import Iterator, Sequence

from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback

from fnl_hf import FNLSeq2SeqTrainer

from ..running import InputError
from .arguments import DataArguments
from .corpus import Pair
from .languages import target_ids
from .validation import ScoredValidation

Length = tuple[int, int]  # tokens of source and of target


def encode(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, data_args: DataArguments) -> Dataset:
    """Token ids of both sides, in columns `input_ids` and `labels`."""
    limits = {"truncation": True, "max_length": data_args.max_length}
    sources = tokenizer([data_args.source_prefix + source for source, _ in pairs], **limits)
    labels = target_ids(tokenizer, [target for _, target in pairs], **limits)
    return Dataset.from_dict({"input_ids": sources["input_ids"], "labels": labels})


class TokenBatchSampler(BatchSampler):
    """Batches of dataset indices with at most `max_tokens` tokens a side, padding included.

    Examples are sorted by length and cut into batches, so that little is padding; examples of equal length and the
    order of the batches are shuffled anew in each epoch, from `seed` and the epoch alone. The sorted lengths, and with
    them the number of batches, are the same in every epoch.

    Several processes and resuming need no care here: accelerate gives process i every i-th of the batches (which are
    the same in each process) and skips those that were done.

    Args:
        lengths: `(source, target)` tokens of every example.
        max_tokens: bound of `len(batch) * longest source` and of `len(batch) * longest target`.
        seed: of the shuffling.

    Raises:
        InputError: an example is longer than `max_tokens`.
    """

    def __init__(self, lengths: Sequence[Length], max_tokens: int, seed: int):
        longest = max(map(max, lengths))
        if longest > max_tokens:
            raise InputError(
                f"a sentence has {longest} tokens and a batch at most {max_tokens}. "
                "Raise --max_tokens or lower --max_length."
            )
        self.lengths, self.max_tokens, self.seed, self.epoch = lengths, max_tokens, seed, 0
        # What accelerate asks a batch sampler: no fixed batch size, nothing dropped.
        self.batch_size, self.drop_last = None, False
        self.num_batches = len(self._cut(self._sorted(random.Random(seed))))

    def _sorted(self, rng: random.Random) -> list[int]:
        ties = [rng.random() for _ in self.lengths]
        return sorted(range(len(self.lengths)), key=lambda i: (self.lengths[i][1], self.lengths[i][0], ties[i]))

    def _cut(self, order: list[int]) -> list[list[int]]:
        batches, batch, longest = [], [], 0
        for i in order:
            longest = max(longest, *self.lengths[i])
            if batch and (len(batch) + 1) * longest > self.max_tokens:
                batches.append(batch)
                batch, longest = [], max(self.lengths[i])
            batch.append(i)
        return [*batches, batch]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        batches = self._cut(self._sorted(rng))
        rng.shuffle(batches)
        yield from batches

    def __len__(self) -> int:
        return self.num_batches


def token_batches(dataset, args) -> TokenBatchSampler:
    """The batches of a dataset with the columns `input_ids` and `labels`, by the sizes and seeds of `args`."""
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

    The training dataset has the columns `input_ids` and `labels`; `args.data_seed`, or else `args.seed`, shuffles it.
    """

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
