"""One run of a training script, from the checkpoint that it resumes from to what it leaves behind."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from fnl_hf import FNLTrainingArguments, factorizations, factorize

from .arguments import FactorizationArguments, make_config
from .checkpoints import check_same_model, is_finished, last_complete_checkpoint
from .errors import InputError, one_line_errors
from .messages import say
from .models import check_fit, load
from .results import resources_used


class Job:
    """What a training script has to know beside its task.

    The steps are the same in every script, each a line or two of its `main`:

        job = Job(AutoModelForX, model_args, args)      # where it stands, and what is to be factorized
        ...                                             # the data, and with it `args.max_steps`
        job.announce()
        model = job.finished_model() or job.pretrained_or_new(...)
        job.check(model)
        trainer = job.make_trainer(FNLTrainer, model=model, ...)
        if metrics := job.train():
            job.report("train", metrics)
        job.save()
        job.report("eval", trainer.evaluate())
        job.report_resources()

    Attributes:
        output_dir: where checkpoints and results go.
        checkpoint: the one to resume from, or None.
        factorization: what a dense model becomes before training; None where it stays dense, or `factorize_at` says
            when it is factorized.
        finished: whether training ended with `checkpoint`; known after `announce`.
        trainer: known after `make_trainer`.

    Args:
        auto_class: of the model.
        trains: whether there is anything to train on. If not, the job only evaluates: it resumes and saves nothing.

    Raises:
        InputError: --output_dir holds other files than a run's, or there is no such factorization.
    """

    def __init__(
        self, auto_class: type, model_args: FactorizationArguments, args: FNLTrainingArguments, trains: bool = True
    ):
        self.auto_class, self.model_args, self.args, self.trains = auto_class, model_args, args, trains
        self.started = time.monotonic()
        self.output_dir = Path(args.output_dir)
        self.checkpoint = last_complete_checkpoint(self.output_dir) if trains else None
        config = make_config(model_args)
        self.factorization, self._later = (None, config) if args.factorize_at else (config, None)
        self.finished = False
        self.trainer: Trainer | None = None

    def announce(self) -> None:
        """Say where the run stands. Call it when `args.max_steps` is known."""
        if self.checkpoint is not None:
            patience = getattr(self.args, "early_stopping_patience", None)
            self.finished = is_finished(self.checkpoint, self.args.max_steps, patience)
            stands = "training is finished." if self.finished else "training resumes there."
            say(f"Found {self.checkpoint}: {stands}")

    def finished_model(self) -> PreTrainedModel | None:
        """The model that training ended with, if it did: the last, or with `load_best_model_at_end` the best."""
        if not self.finished:
            return None
        state = json.loads((self.checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        best = self.args.load_best_model_at_end and state.get("best_model_checkpoint")
        return load(self.auto_class, best or self.checkpoint)

    def pretrained_or_new(
        self, new: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, length: int, flags: str, **options
    ) -> PreTrainedModel:
        """The model to start from, factorized if that is asked for and the checkpoint is not so already.

        Args:
            new: makes a model where no --model_name_or_path is given.
            length: tokens that a pretrained model must take.
            flags: the arguments that lower the length.
            options: of the pretrained model's config, where they are to be other ones.

        Raises:
            InputError: the checkpoint cannot be loaded or does not fit, or the model cannot be made or factorized.
        """
        path = self.model_args.model_name_or_path
        with one_line_errors(ValueError):
            if path:
                model = load(self.auto_class, path, dtype=torch.float32, **options)
                check_fit(model, tokenizer, length, flags)
            else:
                model = new()
            if self.factorization is not None and factorizations(model):
                say(f"{path} is factorized already, and stays so: --head_rank and --init are unused.")
            elif self.factorization is not None:
                factorize(model, self.factorization)
        return model

    def check(self, model: PreTrainedModel) -> None:
        """Raises `InputError` if there is nothing to decay, or if `checkpoint` is of another model than `model`."""
        args = self.args
        if args.frobenius_decay and not args.factorize_at and not factorizations(model):
            raise InputError(
                f"--frobenius_decay {args.frobenius_decay:g} decays factorizations, and the model is dense. Add "
                "--factorize, or drop the decay."
            )
        if self.checkpoint is not None:
            check_same_model(model.config, self.checkpoint, switches=bool(args.factorize_at))

    def make_trainer(self, trainer_class: type[Trainer], **options) -> Trainer:
        """The trainer, with what `factorize_at` makes of a dense model. Raises `InputError` for what it refuses."""
        with one_line_errors(ValueError):
            self.trainer = trainer_class(args=self.args, fnl_config=self._later, **options)
        return self.trainer

    def train(self) -> dict[str, float]:
        """Train from the start or from `checkpoint`; returns the metrics, none where there is nothing left to train.

        Raises:
            InputError: the decay is too strong for the learning rate.
        """
        metrics = {}
        if self.trains and not self.finished:
            with one_line_errors(FloatingPointError):
                metrics = self.trainer.train(resume_from_checkpoint=self.checkpoint and str(self.checkpoint)).metrics
        self.trainer.accelerator.wait_for_everyone()  # until the last checkpoint is written
        return metrics

    def save(self) -> None:
        """Save the trained model, and its tokenizer with it, in `output_dir`."""
        if self.trains:
            self.trainer.save_model()

    def report(self, split: str, metrics: dict[str, Any]) -> None:
        """Print metrics and write them to `<split>_results.json` and `all_results.json`."""
        self.trainer.log_metrics(split, metrics)
        self.trainer.save_metrics(split, metrics)

    def report_resources(self) -> None:
        """Report the seconds since the job was made, and the most memory that its process held."""
        self.report("run", resources_used(self.started))
