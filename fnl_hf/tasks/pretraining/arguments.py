"""The command-line arguments of `scripts/run_mlm.py`; the defaults are those of its demonstration."""

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
    check_steps,
    check_unused,
    parse,
)
from .model import MODEL_TYPES, SIZES
from .tokenizer import TOKENIZER_TYPES

_RANGES = {
    **dict.fromkeys(("max_line_length", "top"), COUNT),
    "vocab_size": COUNT,  # the tokenizer itself knows its alphabet
    "phase2_steps": Range(),
}
_USELESS = {
    "train_sampling_strategy": "blocks come in the shuffled order of a run. Leave it out",
    "remove_unused_columns": "examples say where they stand. Leave it out",
    "dataloader_drop_last": "a run is made of whole batches. Leave it out",
    "do_train": "this script trains. Give --predict to use a trained model",
    "do_predict": "the masked sentences of --predict are what is predicted. Leave it out",
}
# What does not decide what is learned. Files to train on go by what is in them
MAY_CHANGE = {"train_file", "validation_file", "max_eval_samples", "prepared_dir", "predict", "top", "head_at_masks"}


@dataclass
class ModelArguments(FactorizationArguments):
    """What is trained: a pretrained checkpoint or a new model of a published size, and its factorization."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Masked language model to continue with, and its tokenizer."}
    )
    # From scratch. ModernBERT by default: in so short a run BERT, with absolute positions, learns few things but word
    # frequencies
    model_type: str = field(default="modernbert", metadata={"help": "Architecture.", "choices": MODEL_TYPES})
    size: str = field(default="tiny", metadata={"help": "Layers and width.", "choices": tuple(SIZES)})
    # None by default, for short runs; BERT, RoBERTa and ELECTRA were published with 0.1, ModernBERT with none
    dropout: float = field(default=0.0, metadata={"help": "Dropout of sub-layers and attention; 0.1 for long runs."})
    activation: str | None = field(
        default=None,
        metadata={"help": "Activation of feed-forward layers in place of GELU.", "choices": ("relu", "gelu", "silu")},
    )
    # Its tokenizer
    tokenizer_name: str | None = field(default=None, metadata={"help": "Take this tokenizer instead of training one."})
    tokenizer_type: str = field(
        default="wordpiece",
        metadata={"help": "What is trained on the text: wordpiece, or bpe on bytes.", "choices": TOKENIZER_TYPES},
    )
    vocab_size: int = field(default=4000, metadata={"help": "Tokens of a trained tokenizer."})
    lowercase: bool = field(default=True, metadata={"help": "Fold case and accents; in wordpiece only."})


@dataclass
class DataArguments:
    """What it is trained and evaluated on, and how."""

    # Text files, JSON lines, parquet, arrow (text and JSON may be .gz or .xz), or folders of them; without any of
    # these, the novels that ship are used
    train_file: list[str] | None = field(default=None, metadata={"help": "Training text: files and folders."})
    validation_file: list[str] | None = field(default=None, metadata={"help": "Validation text: files and folders."})
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "Without validation files: hold out this much at the end of the training text."}
    )
    text_column: str = field(default="text", metadata={"help": "Key of the text in JSON lines and tables."})
    documents: str = field(
        default="file",
        metadata={
            "help": "A document of a text file: the whole file, or what stands between blank lines. Rows of JSON lines "
            "and tables are documents.",
            "choices": ("file", "blank_line"),
        },
    )
    respect_documents: bool = field(default=False, metadata={"help": "Let no block reach over a document's end."})
    max_line_length: int = field(default=16_000_000, metadata={"help": "Refuse longer lines, in characters."})
    prepared_dir: str | None = field(
        default=None,
        metadata={"help": "Where tokenized text is kept for the next run. Not given: `prepared` beside output_dir."},
    )
    # Blocks and masks
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a block, its two ends included."})
    phase2_steps: int = field(
        default=0, metadata={"help": "Train the last of max_steps on blocks of phase2_seq_length; BERT: a tenth."}
    )
    phase2_seq_length: int = field(default=512, metadata={"help": "Tokens of a block in these steps."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens (or words) to predict."})
    whole_word_mask: bool = field(default=False, metadata={"help": "Mask all tokens of a word together."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first blocks only."})
    # Use
    predict: list[str] | None = field(
        default=None,
        metadata={"help": "Do not train: predict the [MASK]s of these sentences (-: standard input) with output_dir."},
    )
    top: int = field(default=5, metadata={"help": "Predictions to print for every mask."})


@dataclass
class MLMArguments(RunArguments, FNLTrainingArguments):
    """Training arguments with the defaults of the demonstration."""

    output_dir: str = field(default="runs/mlm", metadata={"help": "Where checkpoints and results go."})
    max_steps: int = field(default=1500, metadata={"help": "Optimizer steps."})
    num_train_epochs: float = field(
        default=0.0, metadata={"help": "Passes over the text, in place of max_steps; 0: max_steps counts."}
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Blocks of a batch."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Blocks of an evaluation batch."})
    fnl_optim: str | None = field(
        default="lamb",
        metadata={"help": "lamb (with decoupled decay FLAMBé), nag, spectron, or none for that of --optim."},
    )
    learning_rate: float = field(
        default=2e-2, metadata={"help": "Learning rate at the end of the warmup; with spectron 1e-3, of AdamW's part."}
    )
    lr_scheduler_type: str = field(default="polynomial", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of linear warmup, or below 1 their share."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decay of weights, and of factorizations."})
    head_at_masks: bool = field(
        default=True, metadata={"help": "Compute logits of masked tokens only: the same loss in less time and memory."}
    )
    save_steps: float = field(default=200, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two lines of the log."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Keep no logits of the evaluation."})
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "Pin the memory of batches."}
    )

    def __post_init__(self):
        if self.num_train_epochs > 0:
            self.max_steps = -1
        super().__post_init__()


def parse_arguments(description: str) -> tuple[ModelArguments, DataArguments, MLMArguments]:
    """The command line's arguments. Raises `InputError` where they exclude each other, or name what does not exist."""
    model_args, data_args, args = parse(
        (ModelArguments, DataArguments, MLMArguments), description, ranges=_RANGES, useless=_USELESS
    )
    check_arguments(args)
    check_factorization(model_args, args)
    if args.fnl_optim == "spectron" and "learning_rate" not in model_args.given:
        args.learning_rate = 1e-3
    if args.fnl_optim and args.optim != MLMArguments.optim:
        raise InputError(f"--optim {args.optim.value} and --fnl_optim {args.fnl_optim}. Add --fnl_optim none.")
    for name in ("eval_strategy", "save_strategy"):
        if getattr(args, name) == "epoch":
            raise InputError(f"--{name} epoch: a run is one epoch to the Trainer. Give steps, or below 1 their share.")
    if data_args.validation_file and not data_args.train_file:
        raise InputError("--validation_file without --train_file. Give the text to train on.")
    if not 0 <= data_args.validation_split_percentage < 100:
        raise InputError(
            f"--validation_split_percentage {data_args.validation_split_percentage}: expected 0 (hold out nothing) up "
            "to below 100."
        )
    if not 0 < data_args.mlm_probability < 1:
        raise InputError(f"--mlm_probability {data_args.mlm_probability}: expected a share between 0 and 1.")
    if min(data_args.max_seq_length, data_args.phase2_seq_length) < 3:
        raise InputError("a block has a begin and an end. Give a --max_seq_length and --phase2_seq_length above 2.")
    check_phases(data_args, args)
    check_steps(args)
    check_best_metric(args, ())
    _check_unused(model_args, data_args, args)
    # a Run is in its order already, in whole batches, and its examples say where they stand; evaluation is of all
    args.train_sampling_strategy, args.remove_unused_columns = "sequential", False
    args.dataloader_drop_last = False
    return model_args, data_args, args


def _check_unused(model_args: ModelArguments, data_args: DataArguments, args: MLMArguments) -> None:
    given = model_args.given
    if model_args.model_name_or_path:
        sizes = ("model_type", "size", "dropout", "activation", "tokenizer_type", "vocab_size", "lowercase")
        check_unused(given, sizes, "the checkpoint has its own. Leave it out")
    elif model_args.tokenizer_name:
        check_unused(given, ("tokenizer_type", "vocab_size", "lowercase"), "the tokenizer is given. Leave it out")
    elif model_args.tokenizer_type != "wordpiece":
        check_unused(given, ("lowercase",), "of wordpiece only. Leave it out")
    if not data_args.phase2_steps:
        check_unused(given, ("phase2_seq_length",), "of the second phase. Give --phase2_steps")
    if not data_args.train_file:
        check_unused(given, ("text_column", "documents"), "of your own text. Give --train_file")
    if data_args.validation_file:
        check_unused(given, ("validation_split_percentage",), "the validation text is given. Leave it out")
        data_args.validation_split_percentage = 0.0
    if args.do_eval and not data_args.validation_file and not data_args.validation_split_percentage:
        raise InputError("--do_eval without validation text. Give --validation_file.")


def check_phases(data_args: DataArguments, args: MLMArguments) -> None:
    """Raises `InputError` if the second phase is longer than the run, as far as its steps are known."""
    if data_args.phase2_steps < 0 or 0 < args.max_steps < data_args.phase2_steps:
        raise InputError(
            f"--phase2_steps {data_args.phase2_steps} are some of the {args.max_steps} steps. Give fewer than those."
        )


def sequence_lengths(data_args: DataArguments) -> list[int]:
    """Tokens of a block in the phases of training."""
    return [data_args.max_seq_length, *[data_args.phase2_seq_length] * (data_args.phase2_steps > 0)]


def data_seed(args: MLMArguments) -> int:
    """Of the order of blocks and of the masks."""
    return args.seed if args.data_seed is None else args.data_seed
