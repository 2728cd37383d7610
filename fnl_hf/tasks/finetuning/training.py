"""The Trainer of the fine-tuning scripts, and what they set it up with."""

import math

from torch.utils.data import Sampler, SequentialSampler
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from fnl_hf import FNLTrainer

from ..running import InputError
from .arguments import FineTuningArguments


class FineTuner(FNLTrainer):
    """`FNLTrainer` that evaluates rows in their order, also where it trains them grouped by length."""

    def _get_eval_sampler(self, eval_dataset) -> Sampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


def padding(tokenizer: PreTrainedTokenizerBase, max_length: int, pad_to_max_length: bool) -> DataCollatorWithPadding:
    """Batches padded to their longest row, or all to `max_length` tokens."""
    if pad_to_max_length:
        return DataCollatorWithPadding(tokenizer, padding="max_length", max_length=max_length)
    return DataCollatorWithPadding(tokenizer)


def set_max_steps(args: FineTuningArguments, rows: int) -> None:
    """Set `args.max_steps` from `num_train_epochs`, as the Trainer counts them, for `rows` of training data.

    So a run that is started again knows whether it is finished.
    """
    if args.max_steps > 0:
        return
    whole = math.floor if args.dataloader_drop_last else math.ceil
    batches = whole(rows / (args.train_batch_size * args.world_size))
    if not batches:
        raise InputError(f"{rows} rows are less than a batch of {args.train_batch_size}. Drop --dataloader_drop_last.")
    args.max_steps = math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))
