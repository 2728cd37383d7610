"""One run of a training script, from the checkpoint that it resumes from to what it leaves behind."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from fnl_hf import FNLTrainingArguments, factorizations, factorize, fix_ranks

from . import record
from .checkpoints import (
    check_same_model,
    complete_checkpoints,
    is_finished,
    last_complete_checkpoint,
    steps_done,
)
from .errors import InputError, one_line_errors
from .factorization import FactorizationArguments, make_config
from .locking import is_locked_by_runs, lock
from .messages import say
from .models import check_fit, check_optimizer, load
from .results import check_writable, disk_errors, resources_used


class _AtBegin(TrainerCallback):
    """Does something when the first step is about to be taken, once."""

    def __init__(self, act: Callable[[], Any]):
        self.act = act

    def on_train_begin(self, args, state, control, **kwargs):
        act, self.act = self.act, lambda: None
        act()


class Job:
    """What a training script has to know beside its task.

    The steps are the same in every script, each a line or two of its `main`:

        job = Job(AutoModelForX, model_args, data_args, args)  # where it stands, and what is to be factorized
        ...                                                    # the data, and with it `args.max_steps`
        job.announce(corpus)
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
        may_change: names of arguments, beside those of the Trainer, that do not decide what is learned: a later call
            in `output_dir` may give others.
        trains: whether there is anything to train on. If not, the job only evaluates: it resumes and saves nothing.

    Raises:
        InputError: --output_dir cannot be written to, holds other files than a run's, or a run of other arguments, or
            one that is going on; or there is no such factorization.
    """

    def __init__(
        self,
        auto_class: type,
        model_args: FactorizationArguments,
        data_args: Any,
        args: FNLTrainingArguments,
        may_change: Iterable[str] = (),
        trains: bool = True,
    ):
        self.auto_class, self.model_args, self.args, self.trains = auto_class, model_args, args, trains
        self.started = time.monotonic()
        self.output_dir = Path(args.output_dir)
        config = make_config(model_args)
        self.factorization, self._later = (None, config) if args.factorize_at else (config, None)
        self._arguments = record.arguments_of(model_args, data_args, args)
        self._may_change = record.MAY_CHANGE.union(may_change)
        self.checkpoint, self._record = self._agreed(self._found)
        self._inputs: dict[str, str] = dict(self._record["inputs"]) if self._record else {}  # fingerprints
        self.finished = False
        self.trainer: Trainer | None = None

    def _agreed(self, decide: Callable[[], Any]) -> Any:
        """What the main process decides, on all processes; an `InputError` is raised on all of them."""
        answer = [None]
        if self.args.process_index == 0:
            try:
                answer = [(decide(), None)]
            except InputError as error:
                answer = [(None, str(error))]
        [(value, problem)] = broadcast_object_list(answer)
        if problem is not None:
            raise InputError(problem)
        return value

    def _found(self) -> tuple[Path | None, dict | None]:
        """The checkpoint that the output directory holds, and the record of its run."""
        folder = self.output_dir
        check_writable(folder)
        if is_locked_by_runs(folder):
            self._lock()
        if not self.trains:
            path = self.model_args.model_name_or_path
            if complete_checkpoints(folder) and (path is None or folder.resolve() != Path(path).resolve()):
                raise InputError(
                    f"--output_dir {folder} holds a run, and its results would be replaced by those of {path}. Give "
                    "another --output_dir."
                )
            return None, None
        if self.args.overwrite_output_dir:
            return None, None
        checkpoint = last_complete_checkpoint(folder)
        if checkpoint is None:
            return None, None
        self._lock()
        known = record.read_record(folder)
        if known is None:
            say(f"warning: {folder} was made before runs were recorded. Whether this is its command is not known.")
        else:
            record.check_arguments_recorded(folder, known, self._arguments, self._may_change)
            if changes := record.version_changes(known, record.versions(self.args.world_size)):
                say(f"warning: {folder} was started with {'; '.join(changes)}. Its end may differ a little.")
        return checkpoint, known

    def _lock(self) -> None:
        if not lock(self.output_dir):
            raise InputError(
                f"--output_dir {self.output_dir}: another run is going on there. Wait for its end, or give another "
                "directory."
            )

    def announce(self, corpus: Iterable[str | Path] = ()) -> None:
        """Say where the run stands. Call it when `args.max_steps` is known.

        Args:
            corpus: files and folders that the job trains on; none for what ships with the package.

        Raises:
            InputError: the run in `output_dir` was trained on another corpus or from another checkpoint, or for more
                steps.
        """
        if not self.trains:
            return
        self._inputs |= self._agreed(lambda: self._checked_inputs(corpus))
        if self.checkpoint is not None:
            done = steps_done(self.checkpoint)
            if 0 < self.args.max_steps < done:
                raise InputError(
                    f"{self.checkpoint} has {done} steps, and this run would have {self.args.max_steps}. Give at least "
                    "as many, or another --output_dir."
                )
            patience = getattr(self.args, "early_stopping_patience", None)
            self.finished = is_finished(self.checkpoint, self.args.max_steps, patience)
            if self._record is not None and not self.finished:
                record.check_processes_recorded(self.output_dir, self._record, self.args.world_size)
            stands = "training is finished." if self.finished else "training resumes there."
            say(f"Found {self.checkpoint}: {stands}")

    def _checked_inputs(self, corpus: Iterable[str | Path]) -> dict[str, str]:
        given = {"training corpus": record.fingerprint_of_files(corpus)}
        for name, what in (
            ("model_name_or_path", "checkpoint to start from"),
            ("tokenizer_name", "--tokenizer_name"),
        ):
            path = getattr(self.model_args, name, None)
            known = self._record["arguments"].get(name) if self._record else None
            if path and path == known and (what not in self._inputs or not Path(path).exists()):
                continue  # it is gone since, or an earlier version kept no fingerprint of it
            given[what] = record.fingerprint_of_checkpoint(path) if path else record.NONE
        if self._record is not None:
            record.check_inputs_recorded(self.output_dir, self._record, given)
        return given

    def finished_model(self) -> PreTrainedModel | None:
        """The model that training ended with, if it did: the last, or with `load_best_model_at_end` the best."""
        if not self.finished:
            return None
        state = json.loads((self.checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        path = self.checkpoint
        if self.args.load_best_model_at_end and (best := state.get("best_model_checkpoint")):
            path = self.output_dir / Path(best).name  # it is stored with the place that the directory once had
        return load(self.auto_class, path)

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
                say(f"{path} is factorized already, and stays so: the arguments of a factorization are unused.")
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
        kinds = {product.family for product in factorizations(model)}
        if not args.factorize_at and (unknown := sorted(set(args.frobenius_decay_kinds or ()) - kinds)):
            has = f"has {', '.join(sorted(kinds))}" if kinds else "is dense"
            raise InputError(f"--frobenius_decay_kinds {unknown[0]}: the model {has}. Give kinds that it has, or none.")
        if self.checkpoint is not None:
            adapts = args.rank_adaptation is not None
            check_same_model(model.config, self.checkpoint, switches=bool(args.factorize_at), adapts=adapts)

    def make_trainer(self, trainer_class: type[Trainer], **options) -> Trainer:
        """The trainer, with what `factorize_at` makes of a dense model.

        Raises:
            InputError: what the trainer refuses; another tokenizer than that of the run in `output_dir`; an optimizer
                or a schedule that cannot be made.
        """
        if self.trains:
            given = {"tokenizer": record.fingerprint_of_tokenizer(options["processing_class"])}
            if self._record is not None:
                record.check_inputs_recorded(self.output_dir, self._record, given)
            self._inputs |= given
        if self.args.eval_on_start and self.trains and options.get("eval_dataset") is None:
            raise InputError("--eval_on_start: there is nothing to evaluate on. Give validation data, or leave it out.")
        with one_line_errors(ValueError, ImportError):
            self.trainer = trainer_class(args=self.args, fnl_config=self._later, **options)
        if self.trains and not self.finished:
            with one_line_errors(ValueError, TypeError, ImportError, ZeroDivisionError):
                check_optimizer(self.trainer)
        return self.trainer

    def train(self) -> dict[str, float]:
        """Train from the start or from `checkpoint`; returns the metrics, none where there is nothing left to train.

        Raises:
            InputError: another run has begun in `output_dir`; the training diverges, the decay is too strong for the
                learning rate, or a checkpoint cannot be written.
        """
        metrics = {}
        if self.trains and not self.finished:
            self.trainer.add_callback(_AtBegin(lambda: self._agreed(self._begin)))
            with one_line_errors(FloatingPointError), disk_errors():
                metrics = self.trainer.train(resume_from_checkpoint=self.checkpoint and str(self.checkpoint)).metrics
        else:
            self._agreed(self._lock)  # results are written
        self.trainer.accelerator.wait_for_everyone()  # until the last checkpoint is written
        return metrics

    def _begin(self) -> None:
        """From here on the output directory is this run's: all that may be wrong with the input was found before."""
        self._lock()
        if self.args.overwrite_output_dir:
            record.remove_run(self.output_dir)
        elif last_complete_checkpoint(self.output_dir) != self.checkpoint:
            raise InputError(
                f"--output_dir {self.output_dir}: another run has begun there meanwhile. Repeat the command to go on "
                "from it, or give another directory."
            )
        record.write_record(self.output_dir, self._arguments, self._inputs, record.versions(self.args.world_size))

    def save(self) -> None:
        """Save the trained model, and its tokenizer with it, in `output_dir`; ranks that adapted are fixed."""
        if self.trains:
            if self.args.rank_adaptation is not None:
                fix_ranks(self.trainer.model)
            with disk_errors():
                self.trainer.save_model()

    def report(self, split: str, metrics: dict[str, Any]) -> None:
        """Print metrics and write them to `<split>_results.json` and `all_results.json`."""
        self.trainer.log_metrics(split, metrics)
        self.trainer.save_metrics(split, metrics)

    def report_resources(self) -> None:
        """Report the seconds since the job was made, and the most memory that its process held."""
        self.report("run", resources_used(self.started))
