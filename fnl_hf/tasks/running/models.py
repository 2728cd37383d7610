"""The checkpoint that a script starts from or has trained: loading it, and whether its tokenizer fits."""

import copy
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SchedulerType,
    Trainer,
    get_scheduler,
)

from .errors import InputError, one_line

_POSITIONS_AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


def load(auto_class: type, path: str | Path, **options):
    """A config, tokenizer or model from its directory. Raises `InputError` if there is none that fits the class."""
    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{path}: {auto_class.__name__} cannot load it ({one_line(error)}). Give a checkpoint's directory."
        ) from error


def load_trained(auto_class: type, output_dir: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer that a finished run left. Raises `InputError` if there is none."""
    if not (Path(output_dir) / "config.json").is_file():
        raise InputError(f"--output_dir {output_dir}: no finished run. Train first, or give the directory of one.")
    return load(auto_class, output_dir), load(AutoTokenizer, output_dir)


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, flags: str) -> None:
    """Raises `InputError` where a checkpoint does not take the tokens of `tokenizer`, or `length` of them.

    Args:
        flags: the arguments that lower the length.
    """
    path, rows = model.config.name_or_path or "the checkpoint", model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise InputError(
            f"{path} has embeddings of {rows} tokens, and the tokenizer has {len(tokenizer)}. Give the tokenizer that "
            "it was trained with."
        )
    if model.config.pad_token_id not in (None, tokenizer.pad_token_id):
        raise InputError(
            f"{path} pads with token {model.config.pad_token_id}, and the tokenizer with {tokenizer.pad_token_id}. "
            "Give the tokenizer that it was trained with."
        )
    longest = longest_input(model.config)
    if longest is not None and length > longest:
        raise InputError(f"{path} takes at most {longest} tokens, and {length} are asked for. Lower {flags}.")


def longest_input(config: PreTrainedConfig) -> int | None:
    """How many tokens the positions of a model allow; None where its config does not say."""
    if config.model_type == "encoder-decoder":
        both = [longest_input(part) for part in (config.encoder, config.decoder)]
        return min(filter(None, both), default=None)
    # RoBERTa and its kin count positions from the padding token's id on
    offset = config.pad_token_id + 1 if config.model_type in _POSITIONS_AFTER_PADDING else 0
    longest = getattr(config, "max_position_embeddings", None)
    return longest - offset if longest is not None and longest > 0 else None  # XLNet's is -1


def check_optimizer(trainer: Trainer) -> None:
    """Make the optimizer and the schedule that training will make, for nothing, so that it fails before and not then.

    Raises:
        InputError: the schedule ends before it has begun, or the optimizer does not look at its arguments.
        ValueError, TypeError, ImportError: what torch and transformers raise.
    """
    args, steps = trainer.args, trainer.args.max_steps
    kind, options = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    without = copy.copy(args)
    without.optim_args = None
    if args.optim_args and options == trainer.get_optimizer_cls_and_kwargs(without, trainer.model)[1]:
        raise InputError(f"--optim_args {args.optim_args}: nothing that {args.fnl_optim or args.optim.value} takes.")
    if options.keys() & {"params", "model", "optimizer_dict"}:  # of an optimizer that is made layer by layer
        return
    optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options)
    warmup = args.get_warmup_steps(steps)
    if args.lr_scheduler_type == SchedulerType.POLYNOMIAL and warmup == steps:
        raise InputError(
            f"--warmup_steps {args.warmup_steps:g} are all of the {steps} steps, and nothing is left for the decay of "
            "the learning rate. Lower them, or raise --max_steps."
        )
    if args.lr_scheduler_type not in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, args.lr_scheduler_kwargs)
