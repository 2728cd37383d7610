"""The command-line arguments that the training scripts share, and what may be wrong with them."""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field, fields

from transformers import HfArgumentParser, TrainingArguments

from fnl_hf import FNLConfig, FNLTrainingArguments

from .errors import InputError, one_line_errors

_UNKEPT = {
    "resume_from_checkpoint": "a run resumes from the last checkpoint in its --output_dir. Copy the one you mean there",
    "auto_find_batch_size": "the steps of a run are counted for one batch size. Give the one that fits",
    "save_only_model": "a run resumes from its checkpoints, which need the optimizer. Lower --save_total_limit instead",
}


@dataclass
class FactorizationArguments:
    """What of a model is factorized, and how: the base of every script's model arguments.

    Scripts that train new models factorize them unless told otherwise. Those that only start from checkpoints set
    `factorize` to False: what is factorized in a checkpoint stays so without being asked for.
    """

    factorize: bool = field(default=True, metadata={"help": "Make factorizations of the attention products."})
    attention: list[str] = field(default_factory=lambda: ["qk", "ov"], metadata={"help": "Which: qk, ov or both."})
    head_rank: str = field(
        default="1.0", metadata={"help": "Rank of every head: a fraction of its width (0.5), or a whole number (16)."}
    )
    init: str = field(default="spectral", metadata={"help": "Initialisation of the factors: spectral or default."})


def parse_head_rank(text: str) -> float | int:
    """ "0.5" is a fraction of the head's width, "16" the rank itself ("1" is rank one, "1.0" full rank)."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    raise InputError(f"--head_rank {text}: not a number. Give a fraction such as 0.5 or a whole rank such as 16.")


def make_config(arguments: FactorizationArguments) -> FNLConfig | None:
    """The factorization that the arguments ask for; None for none. Raises `InputError` if there is no such one."""
    if not arguments.factorize:
        return None
    rank = parse_head_rank(arguments.head_rank)
    with one_line_errors(ValueError):
        return FNLConfig(attention=tuple(arguments.attention), head_rank=rank, init=arguments.init)


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults of the arguments, and the lines of the description as they are."""


def parse(types: tuple[type, ...], description: str, usage: str = "%(prog)s [--NAME VALUE ...]") -> tuple:
    """The command line's arguments, an object of each of the dataclasses `types`.

    Args:
        description: what --help begins with: the script's docstring.

    Raises:
        InputError: a value is none that the arguments of training take.
    """
    parser = HfArgumentParser(types, description=description, usage=usage, formatter_class=_Help)
    with one_line_errors(ValueError):
        return parser.parse_args_into_dataclasses()


def check_arguments(args: TrainingArguments) -> None:
    """Raises `InputError` for arguments of the Trainer under which a run could not be repeated or resumed exactly."""
    for name, reason in _UNKEPT.items():
        if getattr(args, name, None):
            raise InputError(f"--{name}: {reason}.")


def check_steps(args: TrainingArguments) -> None:
    """Raises `InputError` if neither steps nor epochs say how long to train."""
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise InputError(f"--max_steps {args.max_steps}: nothing to train. Give a number, or --num_train_epochs.")


def check_factorization(model_args: FactorizationArguments, args: FNLTrainingArguments) -> None:
    """Raises `InputError` where an argument is of a factorization that is not asked for."""
    usual = type(model_args)()
    if not model_args.factorize and not usual.factorize:
        for name in (each.name for each in fields(FactorizationArguments)):
            if getattr(model_args, name) != getattr(usual, name):
                raise InputError(f"--{name} is of the factorization of a dense checkpoint. Add --factorize.")
    if args.factorize_at and not model_args.factorize:
        remedy = "Drop --no_factorize." if usual.factorize else "Add --factorize."
        raise InputError(f"--factorize_at {args.factorize_at} is when to factorize. {remedy}")
    if not model_args.factorize and not usual.factorize:
        return  # a factorized checkpoint has its own kinds
    if unknown := set(args.frobenius_decay_kinds or ()) - set(model_args.attention):
        raise InputError(
            f"--frobenius_decay_kinds {min(unknown)}: not a kind that is factorized. Give any of "
            f"{', '.join(model_args.attention)}, or change --attention."
        )
