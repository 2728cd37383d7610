"""The command-line arguments of `scripts/run_translation.py`; the defaults are those of its German-English run."""

from dataclasses import dataclass, field

import torch

from fnl_hf import FNLSeq2SeqTrainingArguments

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

_RANGES = {
    **dict.fromkeys(("num_beams", "d_model", "layers", "heads", "ffn_dim", "average_checkpoints"), COUNT),
    "max_tokens": COUNT,
    "vocab_size": Range(256 + 3, open_low=True),  # bytes and special tokens
}
_USELESS = {
    "per_device_train_batch_size": "a batch is bounded by its tokens. Give --max_tokens",
    "train_sampling_strategy": "batches are of similar lengths already. Leave it out",
    "dataloader_drop_last": "every sentence is trained on. Leave it out",
    "length_column_name": "lengths are counted. Leave it out",
    "sortish_sampler": "batches are of similar lengths already. Leave it out",
    "do_train": "this script trains. Give --translate to use a trained model",
    "do_eval": "validation pairs are evaluated where there are any. Leave it, or them, out",
    "do_predict": "test pairs are translated where there are any. Leave it, or them, out",
    "generation_num_beams": "one search for all. Give --num_beams",
    "generation_max_length": "one length for all. Give --max_length",
}
# What does not decide what is learned. Files to train on go by what is in them
MAY_CHANGE = {
    "train_file", "train_source", "train_target", "validation_file", "validation_source", "validation_target",
    "test_file", "test_source", "test_target", "max_eval_samples", "num_beams", "metric", "translate",
    "average_checkpoints",
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
    dropout: float = field(default=0.0, metadata={"help": "Dropout after every sub-layer; 0.1 for longer training."})


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
    test_target: str | None = field(default=None, metadata={"help": "Their translations, one a line."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first of them only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Validate and test on the first only."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a sentence; longer ones are cut."})
    source_prefix: str = field(default="", metadata={"help": "Put before every source sentence, as T5 needs it."})
    # Scoring
    num_beams: int = field(default=5, metadata={"help": "Beams of the search."})
    metric: str | None = field(
        default=None, metadata={"help": "Also score with this metric of evaluate: a name on the hub or a script."}
    )
    translate: list[str] | None = field(
        default=None, metadata={"help": "Do not train: translate these sentences (-: standard input) with output_dir."}
    )


@dataclass
class TranslationArguments(RunArguments, FNLSeq2SeqTrainingArguments):
    """Training arguments with the defaults of the German-English run, and the size of a batch."""

    output_dir: str = field(default="runs/translation", metadata={"help": "Where checkpoints and results go."})
    max_tokens: int = field(default=1000, metadata={"help": "Tokens of a batch, a side, padding included."})
    max_steps: int = field(default=2000, metadata={"help": "Optimizer steps."})
    num_train_epochs: float = field(
        default=0.0, metadata={"help": "Passes over the corpus, in place of max_steps; 0: max_steps counts."}
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "Learning rate at the end of the warmup."})
    lr_scheduler_type: str = field(default="inverse_sqrt", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=250, metadata={"help": "Steps of linear warmup."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Second beta of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decay of weights, and of factorizations."})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Label smoothing."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Sentences of an evaluation batch."})
    save_steps: float = field(default=100, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int = field(default=5, metadata={"help": "Checkpoints to keep."})
    average_checkpoints: int = field(default=5, metadata={"help": "Evaluate the mean of the last ones; 1: the last."})
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
    check_best_metric(args, ())
    if model_args.model_name_or_path:
        sizes = ("vocab_size", "d_model", "layers", "heads", "ffn_dim")
        check_unused(model_args.given, sizes, "the checkpoint has its own. Leave it out")
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
    return model_args, data_args, args
