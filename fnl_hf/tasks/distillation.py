"""What `scripts/run_distillation.py` is made of: its arguments, the two models, and the texts."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from fnl_hf import FNLTrainingArguments, factorizations
from fnl_hf.texts import encoded_texts

from .finetuning import ModelArguments, load_model
from .running import (
    InputError,
    Job,
    RunArguments,
    check_arguments,
    check_factorization,
    check_fit,
    check_steps,
    load,
    one_line_errors,
    parse,
)

_USAGE = "%(prog)s --model_name_or_path DIR --teacher DIR --train_file FILE [--NAME VALUE ...]"
MAY_CHANGE = {"train_file", "validation_file", "max_eval_samples"}


@dataclass
class DistillationData:
    """Who is learned from, and on what."""

    teacher: str | None = field(default=None, metadata={"help": "Directory of the dense model that is learned from."})
    train_file: str | None = field(default=None, metadata={"help": "Texts, one in each line; JSON lines, TSV, SQuAD."})
    validation_file: str | None = field(default=None, metadata={"help": "Texts to measure the distance on."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Learn on so many texts, drawn at random."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many texts."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a text; longer ones are cut."})


@dataclass
class DistillationArguments(RunArguments, FNLTrainingArguments):
    """Training arguments with defaults for minutes of repair."""

    output_dir: str = field(default="runs/distillation", metadata={"help": "Where checkpoints and results go."})
    max_steps: int = field(default=500, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts of a batch."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Texts of an evaluation batch."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate at the end of the warmup."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of linear warmup, or below 1 their share."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length: texts of about one length share a batch."}
    )
    save_steps: float = field(default=250, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int = field(default=1, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two lines of the log."})
    label_names: list[str] | None = field(default_factory=list, metadata={"help": "None: texts have no labels."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Keep no outputs of the evaluation."})
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "Pin the memory of batches."}
    )


def parse_distillation_arguments(
    description: str,
) -> tuple[ModelArguments, DistillationData, DistillationArguments]:
    """The command line's arguments. Raises `InputError` where one is missing or they exclude each other."""
    model_args, data_args, args = parse((ModelArguments, DistillationData, DistillationArguments), description, _USAGE)
    for name, given, what in (
        ("model_name_or_path", model_args.model_name_or_path, "directory of the model that learns"),
        ("teacher", data_args.teacher, "directory of the dense model"),
        ("train_file", data_args.train_file, "file of texts"),
    ):
        if not given:
            raise InputError(f"--{name} is missing. Give the {what}.")
    for name, path in (("model_name_or_path", model_args.model_name_or_path), ("teacher", data_args.teacher)):
        if not Path(path, "config.json").is_file():
            raise InputError(f"--{name} {path}: holds no config.json. Give the directory of a saved model.")
    if args.max_steps < 1:
        raise InputError(f"--max_steps {args.max_steps}: expected at least 1.")
    if args.distillation_weight != 1:
        raise InputError(
            f"--distillation_weight {args.distillation_weight:g}: texts have no labels for the rest of the loss. "
            "Leave it out, or use FNLTrainer(teacher=...) on labelled data."
        )
    check_arguments(args)
    check_factorization(model_args, args)
    check_steps(args)
    args.remove_unused_columns = False  # the collator takes them all
    return model_args, data_args, args


def model_class(path: str) -> type[PreTrainedModel]:
    """The class that a checkpoint was saved from.

    Raises:
        InputError: its config names none of transformers.
    """
    names = getattr(load(AutoConfig, path), "architectures", None) or [None]
    found = getattr(transformers, names[0] or "", None)
    if found is None:
        raise InputError(f"{path}: its config.json has the architectures {names}. Expected a class of transformers.")
    return found


def load_teacher(path: str) -> PreTrainedModel:
    """The model that is learned from."""
    return load(model_class(path), path, dtype="auto").eval()


def load_student(job: Job, tokenizer: PreTrainedTokenizerBase, length: int) -> PreTrainedModel:
    """The model that learns, factorized if it is not and that is asked for."""
    model = load_model(job, tokenizer)
    check_fit(model, tokenizer, length, "--max_seq_length")
    if not factorizations(model):
        raise InputError(
            f"{job.model_args.model_name_or_path} is dense. Give what `fnl-hf compress` makes of it, or add "
            "--factorize and what it is to become (--target_ratio 0.5)."
        )
    return model


def read_texts(
    data_args: DistillationData, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> dict[str, list[dict[str, list[int]]]]:
    """split -> its texts as the tokenizer gives them.

    Raises:
        InputError: there is no such file, or it is not of the kind that its name says.
    """
    files = {
        "train": (data_args.train_file, data_args.max_train_samples),
        "validation": (data_args.validation_file, data_args.max_eval_samples),
    }
    texts = {}
    for split, (file, samples) in files.items():
        if file is None:
            continue
        if not Path(file).is_file():
            raise InputError(f"--{split}_file {file}: no such file.")
        with one_line_errors(ValueError, OSError):
            texts[split] = encoded_texts(file, tokenizer, model, samples, data_args.max_seq_length)
    return texts
