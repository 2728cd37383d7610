"""The command-line arguments of `scripts/run_translation.py`; the defaults are those of its German-English run."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from fnl_hf import FNLSeq2SeqTrainingArguments

from ..running import (
    AMOUNT,
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
    say,
)

_RANGES = {
    **dict.fromkeys(("d_model", "layers", "heads", "ffn_dim", "average_checkpoints", "max_tokens"), COUNT),
    **dict.fromkeys(("num_beams", "eval_max_tokens", "early_stopping_patience"), COUNT),
    "min_length": AMOUNT,
    "length_penalty": Range(-math.inf),
    "vocab_size": Range(256 + 3, open_low=True),  # bytes and special tokens
}
_USELESS = {
    "per_device_train_batch_size": "a batch is bounded by its tokens. Give --max_tokens",
    "train_sampling_strategy": "batches are of similar lengths already. Leave it out",
    "dataloader_drop_last": "every sentence is trained on. Leave it out",
    "length_column_name": "lengths are counted. Leave it out",
    "sortish_sampler": "batches are of similar lengths already. Leave it out",
    "do_eval": "validation pairs are evaluated where there are any. Leave it, or them, out",
    "do_predict": "test pairs are translated where there are any. Leave it, or them, out",
}
SPECTRON_LR = 4e-3  # of AdamW's part, the embedding before all: without the layers it bears more
_FINE_TUNING = {"learning_rate": 5e-5, "warmup_steps": 0.05}  # unless they are given
# What does not decide what is learned. Files to train on go by what is in them
MAY_CHANGE = {
    "train_file", "train_source", "train_target", "validation_file", "validation_source", "validation_target",
    "test_file", "test_source", "test_target", "max_eval_samples", "metric", "translate", "average_checkpoints",
    "num_beams", "length_penalty", "min_length", "eval_max_tokens", "early_stopping_patience",
    "prepared_dir",
}  # fmt: skip


@dataclass
class ModelArguments(FactorizationArguments):
    """What is trained: a pretrained checkpoint or the sizes of a new model, and its factorization."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained sequence-to-sequence checkpoint to fine-tune, with its tokenizer."}
    )
    # From scratch: a Marian model and its joint BPE
    vocab_size: int = field(default=3000, metadata={"help": "Tokens of the joint BPE, 256 bytes included."})
    d_model: int = field(default=192, metadata={"help": "Width of the model."})
    layers: int = field(default=2, metadata={"help": "Encoder layers, and decoder layers."})
    heads: int = field(default=4, metadata={"help": "Heads of every attention."})
    ffn_dim: int = field(default=512, metadata={"help": "Width of the feed-forward layers."})
    # None by default: in the four passes of the default run the model does not overfit (0.1 costs 2 BLEU)
    dropout: float | None = field(
        default=None,
        metadata={
            "help": "Dropout after every sub-layer; if not given 0 (0.1 is for longer training), or the checkpoint's."
        },
    )


@dataclass
class DataArguments:
    """What it is trained and scored on, and how."""

    source_lang: str = field(default="de", metadata={"help": "Language to translate from; the key in JSON lines."})
    target_lang: str = field(default="en", metadata={"help": "Language to translate to; the key in JSON lines."})
    # A corpus is JSON lines or two line-aligned text files; without any of these, the one that ships is used
    train_file: str | None = field(default=None, metadata={"help": "Training pairs, JSON lines."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation pairs, JSON lines."})
    test_file: str | None = field(default=None, metadata={"help": "Test pairs, JSON lines."})
    train_source: str | None = field(default=None, metadata={"help": "Training sentences, one a line."})
    train_target: str | None = field(default=None, metadata={"help": "Their translations, one a line."})
    validation_source: str | None = field(default=None, metadata={"help": "Validation sentences, one a line."})
    validation_target: str | None = field(default=None, metadata={"help": "Their translations, one a line."})
    test_source: str | None = field(default=None, metadata={"help": "Test sentences, one a line."})
    test_target: list[str] | None = field(
        default=None, metadata={"help": "Their translations, one a line; further files are further references."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first of them only; those that are skipped do not count."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Validate and test on the first only."})
    max_length: int = field(
        default=128,
        metadata={"help": "Tokens of a sentence: training skips pairs with a longer one, evaluation cuts sentences."},
    )
    source_prefix: str = field(default="", metadata={"help": "Put before every source sentence, as T5 needs it."})
    prepared_dir: str | None = field(
        default=None,
        metadata={"help": "Where tokenized pairs are kept for the next run. Not given: `prepared` beside output_dir."},
    )
    # Scoring
    num_beams: int | None = field(
        default=None, metadata={"help": "Beams of the search. Not given: the checkpoint's; 5 of a new model."}
    )
    length_penalty: float | None = field(
        default=None,
        metadata={"help": "Exponent of the length that a beam's score is divided by. Not given: the checkpoint's."},
    )
    min_length: int | None = field(
        default=None, metadata={"help": "Tokens of a translation at least. Not given: the checkpoint's."}
    )
    eval_max_tokens: int = field(
        default=4000, metadata={"help": "Source tokens of a batch in translating, padding included, times beams."}
    )
    metric: str | None = field(
        default=None, metadata={"help": "Also score with this metric of evaluate: a name on the hub or a script."}
    )
    translate: list[str] | None = field(
        default=None, metadata={"help": "Do not train: translate these sentences (-: standard input) with output_dir."}
    )

    def __post_init__(self):
        # A corpus has one target for each source; only scoring reads the further ones
        given = [self.test_target] if isinstance(self.test_target, str) else self.test_target or [None]
        self.test_target, *self.test_references = given

    @property
    def search(self) -> dict[str, Any]:
        """How to translate: keywords of `translate`."""
        names = ("num_beams", "length_penalty", "min_length", "max_length")
        options = {name: getattr(self, name) for name in names}
        return options | {"max_tokens": self.eval_max_tokens, "prefix": self.source_prefix}


@dataclass
class TranslationArguments(RunArguments, FNLSeq2SeqTrainingArguments):
    """Training arguments with the defaults of the German-English run, and the size of a batch."""

    output_dir: str = field(default="runs/translation", metadata={"help": "Where checkpoints and results go."})
    do_train: bool = field(default=True, metadata={"help": "false: only score output_dir, on the test set given."})
    max_tokens: int = field(
        default=2000, metadata={"help": "Tokens of a batch, source and target together, padding included."}
    )
    max_steps: int = field(default=2000, metadata={"help": "Optimizer steps."})
    num_train_epochs: float = field(
        default=0.0, metadata={"help": "Passes over the corpus, in place of max_steps; 0: max_steps counts."}
    )
    learning_rate: float = field(
        default=2e-3,
        metadata={
            "help": "Learning rate at the end of the warmup; for a checkpoint 5e-5; with spectron 4e-3, of its AdamW."
        },
    )
    lr_scheduler_type: str = field(default="inverse_sqrt", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(
        default=250, metadata={"help": "Steps of linear warmup, or below 1 their share of all; for a checkpoint 0.05."}
    )
    adam_beta2: float = field(default=0.98, metadata={"help": "Second beta of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decay of weights, and of factorizations."})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Label smoothing."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Sentences of an evaluation batch."})
    save_steps: float = field(default=100, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int = field(default=5, metadata={"help": "Checkpoints to keep."})
    average_checkpoints: int = field(
        default=5, metadata={"help": "Evaluate the mean of the last ones; 1: the last, as with --rank_adaptation."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations in a row without a better metric_for_best_model."},
    )
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "Pin the memory of batches."}
    )
    logging_steps: float = field(default=100, metadata={"help": "Steps between two lines of the log."})

    def __post_init__(self):
        if self.num_train_epochs > 0:
            self.max_steps = -1
        super().__post_init__()


def training_files(data_args: DataArguments) -> list[str]:
    """The files that are trained on; none for the corpus that ships."""
    return [path for path in (data_args.train_file, data_args.train_source, data_args.train_target) if path]


def parse_arguments(description: str) -> tuple[ModelArguments, DataArguments, TranslationArguments]:
    """The command line's arguments. Raises `InputError` where they exclude each other, or name what does not exist."""
    model_args, data_args, args = parse(
        (ModelArguments, DataArguments, TranslationArguments), description, ranges=_RANGES, useless=_USELESS
    )
    check_arguments(args)
    check_factorization(model_args, args)
    check_steps(args)
    if model_args.model_name_or_path:
        for name in _FINE_TUNING.keys() - model_args.given:
            setattr(args, name, _FINE_TUNING[name])
        warmup = f"{args.warmup_steps:g} steps" if args.warmup_steps >= 1 else f"{args.warmup_steps:.0%} of the steps"
        dropout = "its own dropout" if model_args.dropout is None else f"dropout {model_args.dropout:g}"
        if args.do_train and not data_args.translate:
            say(f"Fine-tuning with learning rate {args.learning_rate:g}, warmup over {warmup}, {dropout}.")
        sizes = ("vocab_size", "d_model", "layers", "heads", "ffn_dim")
        check_unused(model_args.given, sizes, "the checkpoint has its own. Leave it out")
    elif args.fnl_optim == "spectron" and "learning_rate" not in model_args.given:
        args.learning_rate = SPECTRON_LR
    if args.rank_adaptation is not None:
        if args.average_checkpoints > 1 and "average_checkpoints" in model_args.given:
            raise InputError(
                f"--average_checkpoints {args.average_checkpoints} with --rank_adaptation: the bases of the factors "
                "change on the way, and so do their shapes. Leave it out, or give 1."
            )
        args.average_checkpoints = 1
    if args.save_total_limit and args.average_checkpoints > args.save_total_limit:
        raise InputError(
            f"--average_checkpoints {args.average_checkpoints} of the {args.save_total_limit} that are kept. Raise "
            "--save_total_limit, or average fewer."
        )
    if args.load_best_model_at_end and args.average_checkpoints > 1:
        raise InputError("--load_best_model_at_end is one checkpoint, not their mean. Add --average_checkpoints 1.")
    if data_args.source_lang == data_args.target_lang:
        raise InputError(f"--source_lang and --target_lang are both {data_args.source_lang!r}. Give two languages.")
    if args.average_checkpoints > 1 and args.save_strategy == "no":
        raise InputError("--save_strategy no leaves no checkpoints to average. Add --average_checkpoints 1.")
    check_search(data_args)
    check_validation(args)
    return model_args, data_args, args


def check_search(data_args: DataArguments) -> None:
    """Raises `InputError` for an option of the search that one of its others makes void."""
    penalty, shortest = data_args.length_penalty, data_args.min_length
    if penalty is not None and data_args.num_beams == 1:
        raise InputError("--length_penalty chooses among beams, and --num_beams is 1. Drop it, or raise the beams.")
    if shortest is not None and shortest > data_args.max_length:
        raise InputError(f"--min_length {shortest} is above --max_length {data_args.max_length}. Lower it.")


def check_validation(args: TranslationArguments) -> None:
    """Raises `InputError` where what validation is asked for cannot be had from it."""
    for name, ours in (("max_length", "max_length"), ("num_beams", "num_beams")):
        if getattr(args, f"generation_{name}") is not None:
            raise InputError(f"--generation_{name}: validation translates as the test does. Give --{ours}.")
    if args.generation_config is not None:
        raise InputError(
            "--generation_config: the checkpoint has its own. Give --num_beams, --length_penalty and --min_length."
        )
    check_best_metric(args, ("bleu", "chrf"))
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if best != "loss" and not args.predict_with_generate:
        raise InputError(
            f"--metric_for_best_model {best} needs translations in validation. Add --predict_with_generate."
        )
    patience = args.early_stopping_patience
    if patience is None:
        return
    if not args.load_best_model_at_end:
        raise InputError(
            "--early_stopping_patience waits for a better model, to end with the best. Add --load_best_model_at_end, "
            "--average_checkpoints 1, --eval_strategy steps and --eval_steps."
        )
    if args.eval_strategy == "no":
        raise InputError("--early_stopping_patience counts evaluations. Add --eval_strategy steps and --eval_steps.")
    if args.factorize_at is not None:
        raise InputError("--early_stopping_patience could end the run before --factorize_at. Drop one of the two.")
