"""What the fine-tuning scripts do alike: train or resume."""

import json
import math
from pathlib import Path

from torch.utils.data import Sampler, SequentialSampler
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from ..factorization import factorizations
from ..running import InputError, load, one_line, report
from ..trainer import FNLTrainer
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


def check_decay(args: FineTuningArguments, model: PreTrainedModel) -> None:
    """Raises `InputError` if there is nothing for the Frobenius decay to decay."""
    if args.frobenius_decay and not args.factorize_at and not factorizations(model):
        raise InputError(
            f"--frobenius_decay {args.frobenius_decay:g} decays factorizations, and the checkpoint is dense. Add "
            "--factorize, or drop the decay."
        )


def load_finished(auto_class: type, checkpoint: Path, args: FineTuningArguments) -> PreTrainedModel:
    """The model that training ended with: that of the last `checkpoint`, or with `load_best_model_at_end` the best."""
    best = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")).get("best_model_checkpoint")
    return load(auto_class, best if args.load_best_model_at_end and best else checkpoint)


def train(trainer: FineTuner, checkpoint: Path | None, about: dict[str, float]) -> None:
    """Train from the start or from `checkpoint`, save the model, and report metrics with `about`, those of the data."""
    try:
        metrics = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
    except FloatingPointError as error:  # a decay too strong for the learning rate
        raise InputError(one_line(error)) from error
    report(trainer, "train", metrics | about)
