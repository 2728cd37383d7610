"""The command-line arguments of `scripts/run_translation.py`; the defaults are those of its German-English run."""

from dataclasses import dataclass, field

import torch

from fnl_hf import FNLSeq2SeqTrainingArguments

from ..running import FactorizationArguments, InputError, check_arguments, check_factorization, check_steps, parse


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
    num_beams: int = field(default=5, metadata={"help": "Beams of the search."})
    metric: str | None = field(
        default=None, metadata={"help": "Also score with this metric of evaluate: a name on the hub or a script."}
    )
    translate: list[str] | None = field(
        default=None, metadata={"help": "Do not train: translate these sentences (-: standard input) with output_dir."}
    )


@dataclass
class TranslationArguments(FNLSeq2SeqTrainingArguments):
    """Training arguments with the defaults of the German-English run, and the size of a batch."""

    output_dir: str = field(default="runs/translation", metadata={"help": "Where checkpoints and results go."})
    max_tokens: int = field(
        default=2000, metadata={"help": "Tokens of a batch, source and target together, padding included."}
    )
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


def parse_arguments(description: str) -> tuple[ModelArguments, DataArguments, TranslationArguments]:
    """The command line's arguments. Raises `InputError` where they exclude each other, or name what does not exist."""
    model_args, data_args, args = parse((ModelArguments, DataArguments, TranslationArguments), description)
    check_arguments(args)
    check_factorization(model_args, args)
    check_steps(args)
    if args.load_best_model_at_end and args.average_checkpoints > 1:
        raise InputError("--load_best_model_at_end is one checkpoint, not their mean. Add --average_checkpoints 1.")
    if data_args.source_lang == data_args.target_lang:
        raise InputError(f"--source_lang and --target_lang are both {data_args.source_lang!r}. Give two languages.")
    if args.average_checkpoints > 1 and args.save_strategy == "no":
        raise InputError("--save_strategy no leaves no checkpoints to average. Add --average_checkpoints 1.")
    return model_args, data_args, args
