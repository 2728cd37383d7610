"""The command-line arguments of `scripts/run_qa.py` and `scripts/run_classification.py`."""

from dataclasses import dataclass, field

import torch

from fnl_hf import FNLTrainingArguments

from ..running import (
    COUNT,
    FactorizationArguments,
    InputError,
    Range,
    RunArguments,
    check_arguments,
    check_best_metric,
    check_factorization,
    check_unused,
    parse,
)
from .metrics import METRICS

_USAGE = "%(prog)s --model_name_or_path DIR --train_file FILE --validation_file FILE [--NAME VALUE ...]"
_RANGES = {**dict.fromkeys(("n_best_size", "max_answer_length", "max_question_length"), COUNT), "doc_stride": Range()}

_OF_TRAINING = {"max_train_samples", "factorize", "factorize_at", "dropout", "frobenius_decay", "overwrite_output_dir"}
_NO_TEST = {"do_predict": "answers are written for the --validation_file. Leave it out"}

# What does not decide what is learned. Files to train on go by what is in them
QA_MAY_CHANGE = {
    "train_file", "validation_file", "max_eval_samples", "n_best_size", "max_answer_length",
    "null_score_diff_threshold", "score",
}  # fmt: skip
TABLE_MAY_CHANGE = {"train_file", "validation_file", "test_file", "max_eval_samples"}


@dataclass
class ModelArguments(FactorizationArguments):
    """Which checkpoint is fine-tuned, and its factorization if it is a dense one."""

    factorize: bool = field(default=False, metadata={"help": "Make factorizations of a dense checkpoint's attention."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to fine-tune or evaluate; a factorized one stays so."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Its tokenizer, where it is somewhere else."})
    dropout: float | None = field(
        default=None,
        metadata={"help": "Dropout of all sub-layers and of attention; BERT: 0.1. Not given: the checkpoint's."},
    )


@dataclass
class QAArguments:
    """Questions to train and evaluate on, and how they are answered."""

    train_file: str | None = field(default=None, metadata={"help": "Training questions in the SQuAD layout."})
    validation_file: str | None = field(default=None, metadata={"help": "Questions to evaluate on."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first questions only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first questions only."})
    max_seq_length: int = field(default=384, metadata={"help": "Tokens of a question with a piece of its paragraph."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that two pieces of a paragraph share."})
    max_question_length: int = field(default=64, metadata={"help": "Tokens of a question; longer ones are cut."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad all to max_seq_length; not given: to the longest of their batch."}
    )
    n_best_size: int = field(default=20, metadata={"help": "Answers of a question to keep in nbest_predictions.json."})
    max_answer_length: int = field(default=30, metadata={"help": "Tokens of the longest answer."})
    version_2_with_negative: bool = field(
        default=False, metadata={"help": "Some questions have no answer, as in SQuAD v2; scored by its rule."}
    )
    null_score_diff_threshold: float = field(
        default=0.0,
        metadata={"help": "Give no answer if its score is higher than the best answer's by more than this (v2)."},
    )
    score: str | None = field(
        default=None,
        metadata={"help": "Do not train: score this file of predictions (id -> answer) on validation_file."},
    )


@dataclass
class TableArguments:
    """Tables to train and evaluate on."""

    train_file: str | None = field(default=None, metadata={"help": "Training table: tab-separated, with a header."})
    validation_file: str | None = field(default=None, metadata={"help": "Table to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "Table to predict; it needs no labels."})
    text_column: str | None = field(
        default=None, metadata={"help": "Name of the text's column. Not given: any that GLUE uses."}
    )
    text_pair_column: str | None = field(default=None, metadata={"help": "Name of the second text's, for pairs."})
    label_column: str | None = field(
        default=None, metadata={"help": "Name of the label's column. Not given: any that GLUE uses."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first rows only."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a text or pair; longer ones are cut."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad all to max_seq_length; not given: to the longest of their batch."}
    )


@dataclass
class FineTuningArguments(RunArguments, FNLTrainingArguments):
    """Training arguments with the defaults of BERT's fine-tuning (Devlin et al. 2019)."""

    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training data."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows of a batch."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Rows of an evaluation batch."})
    learning_rate: float = field(
        default=5e-5, metadata={"help": "Learning rate at the end of the warmup; 1e-4 to 3e-4 for small models."}
    )
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of linear warmup, or below 1 their share."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decay of weights, and of factors without their own."})
    # 0, not weight_decay's coefficient: then dense and factorized checkpoints are fine-tuned by one recipe, and what is
    # compared downstream is their pretraining. The decay of a product is meant for long training.
    frobenius_decay: float | None = field(
        default=0.0,
        metadata={"help": "Coefficient of the Frobenius decay of every factorization. 0: factors take weight_decay."},
    )
    save_steps: float = field(default=500, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=100, metadata={"help": "Steps between two lines of the log."})
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "Pin the memory of batches."}
    )


@dataclass
class QATrainingArguments(FineTuningArguments):
    """Those of question answering."""

    output_dir: str = field(default="runs/qa", metadata={"help": "Where checkpoints and results go."})


@dataclass
class TableTrainingArguments(FineTuningArguments):
    """Those of classification."""

    output_dir: str = field(default="runs/classification", metadata={"help": "Where checkpoints and results go."})


def parse_qa_arguments(description: str) -> tuple[ModelArguments, QAArguments, QATrainingArguments]:
    """The command line's arguments. Raises `InputError` where they exclude each other, or name what does not exist."""
    model_args, data_args, args = parse(
        (ModelArguments, QAArguments, QATrainingArguments), description, _USAGE, _RANGES, _NO_TEST
    )
    if data_args.score:
        if not data_args.validation_file:
            raise InputError(f"--score {data_args.score} without --validation_file. Give the questions too.")
        return model_args, data_args, args
    _check_model(model_args, args)
    _check_files(model_args, data_args, args, (data_args.train_file, data_args.validation_file))
    if not data_args.version_2_with_negative:
        check_unused(
            model_args.given,
            ("null_score_diff_threshold",),
            "of questions without answer. Add --version_2_with_negative",
        )
    best = {"exact_match", "f1"}
    if data_args.version_2_with_negative:
        best |= {f"{part}_{name}" for part in ("HasAns", "NoAns") for name in best}
    check_best_metric(args, best)
    return model_args, data_args, args


def parse_table_arguments(description: str) -> tuple[ModelArguments, TableArguments, TableTrainingArguments]:
    """The command line's arguments. Raises `InputError` where they exclude each other, or name what does not exist."""
    model_args, data_args, args = parse((ModelArguments, TableArguments, TableTrainingArguments), description, _USAGE)
    _check_model(model_args, args)
    _check_files(model_args, data_args, args, (data_args.train_file, data_args.validation_file, data_args.test_file))
    check_best_metric(args, METRICS)
    return model_args, data_args, args


def _check_files(
    model_args: ModelArguments, data_args: QAArguments | TableArguments, args: FineTuningArguments, files: tuple
) -> None:
    """What is done: what there are files for, less what `do_train`, `do_eval` and `do_predict` leave out."""
    check_arguments(args)
    if not any(files):
        raise InputError("nothing to do. Give --train_file, --validation_file, or both.")
    for action, name in (("do_train", "train_file"), ("do_eval", "validation_file"), ("do_predict", "test_file")):
        if getattr(args, action) and not getattr(data_args, name, None):
            raise InputError(f"--{action} without --{name}. Give the file.")
        if getattr(args, action) is False and name in model_args.given:
            setattr(data_args, name, None)
    if not any(getattr(data_args, f"{split}_file", None) for split in ("train", "validation", "test")):
        raise InputError("nothing to do. Drop --do_train false, or --do_eval false.")
    if not data_args.train_file:
        check_unused(model_args.given, _OF_TRAINING, "nothing is trained. Give --train_file")
    elif args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise InputError(f"--num_train_epochs {args.num_train_epochs:g}: nothing to train. Give a number above 0.")
    if args.prediction_loss_only or not args.eval_do_concat_batches:
        raise InputError("scores need all predictions. Drop --prediction_loss_only and --eval_do_concat_batches.")
    if args.eval_strategy != "no" and not data_args.validation_file:
        raise InputError(f"--eval_strategy {args.eval_strategy.value} without --validation_file. Give the file.")


def _check_model(model_args: ModelArguments, args: FineTuningArguments) -> None:
    if not model_args.model_name_or_path:
        raise InputError("no checkpoint. Give --model_name_or_path, a directory with a model and its tokenizer.")
    check_factorization(model_args, args)
    if model_args.dropout is not None and not 0 <= model_args.dropout < 1:
        raise InputError(f"--dropout {model_args.dropout}: expected at least 0 and below 1.")
