"""How the scripts train alike: start or resume, load what a finished run ended with, refuse what they cannot keep."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, Trainer, TrainingArguments

from fnl_hf import FNLTrainingArguments, factorizations

from .errors import InputError, one_line
from .models import load

_UNKEPT = {
    "resume_from_checkpoint": "a run resumes from the last checkpoint in its --output_dir. Copy the one you mean there",
    "auto_find_batch_size": "the steps of a run are counted for one batch size. Give the one that fits",
    "save_only_model": "a run resumes from its checkpoints, which need the optimizer. Lower --save_total_limit instead",
}


def check_arguments(args: TrainingArguments) -> None:
    """Raises `InputError` for arguments of the Trainer under which a run could not be repeated or resumed exactly."""
    for name, reason in _UNKEPT.items():
        if getattr(args, name, None):
            raise InputError(f"--{name}: {reason}.")


def check_decay(args: FNLTrainingArguments, model: PreTrainedModel) -> None:
    """Raises `InputError` if there is nothing for the Frobenius decay to decay."""
    if args.frobenius_decay and not args.factorize_at and not factorizations(model):
        raise InputError(
            f"--frobenius_decay {args.frobenius_decay:g} decays factorizations, and the model is dense. Add "
            "--factorize, or drop the decay."
        )


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds, which are about what the user gave, become an `InputError`."""
    try:
        yield
    except kinds as error:
        raise InputError(one_line(error)) from error


def load_finished(auto_class: type, checkpoint: Path, args: TrainingArguments) -> PreTrainedModel:
    """The model that training ended with: that of the last `checkpoint`, or with `load_best_model_at_end` the best."""
    best = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")).get("best_model_checkpoint")
    return load(auto_class, best if args.load_best_model_at_end and best else checkpoint)


def train(trainer: Trainer, checkpoint: Path | None) -> dict[str, float]:
    """Train from the start or from `checkpoint`; returns the metrics."""
    with one_line_errors(FloatingPointError):  # a decay too strong for the learning rate
        return trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
