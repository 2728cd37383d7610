"""The command-line arguments that the training scripts share: reading them, and what may be wrong with them."""

import json
import math
import re
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from .errors import InputError, one_line, one_line_errors
from .factorization import low_rank_words

_UNKEPT = {
    "resume_from_checkpoint": "a run resumes from the last checkpoint in its --output_dir. Copy the one you mean there",
    "auto_find_batch_size": "the steps of a run are counted for one batch size. Give the one that fits",
    "ignore_data_skip": "a run that is resumed goes on where it stood. Leave it out",
    "save_only_model": "a run resumes from its checkpoints, which need the optimizer. Lower --save_total_limit instead",
}


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


class Range(NamedTuple):
    """What a number may be: `low` to `high`, without the ends that are said to be open."""

    low: float = 0
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def has(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high or self.high == math.inf else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {_plain(self.low)}"
        return (
            low
            if self.high == math.inf
            else f"{low} and {'below' if self.open_high else 'at most'} {_plain(self.high)}"
        )


COUNT, POSITIVE, AMOUNT = Range(1), Range(0, open_low=True), Range()
SHARE, SHARE_BELOW_1 = Range(0, 1), Range(0, 1, open_high=True)

RANGES: dict[str, Range] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "eval_accumulation_steps", "max_train_samples", "max_eval_samples", "max_length", "max_seq_length",
            "generation_max_length", "generation_num_beams",
        ),
        COUNT,
    ),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), POSITIVE),
    **dict.fromkeys(
        (
            "learning_rate", "weight_decay", "frobenius_decay", "adam_epsilon", "max_grad_norm", "warmup_steps",
            "num_train_epochs", "eval_delay", "dataloader_num_workers", "save_total_limit", "neftune_noise_alpha",
        ),
        AMOUNT,
    ),
    **dict.fromkeys(("seed", "data_seed"), Range(0, 2**32, open_high=True)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "dropout"), SHARE_BELOW_1),
    "label_smoothing_factor": SHARE,
    "low_rank": Range(0, 1, open_low=True),
    "max_steps": Range(-1),
}  # fmt: skip


def _yes_no(text: str):
    """An argument that is yes, no, or not given, which leaves it to the script."""
    return field(default=None, metadata={"help": text, "nargs": "?", "const": True})


@dataclass
class RunArguments:
    """What is done at all: a base of every script's training arguments, before that of the Trainer."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start over: remove the checkpoints and results of the run in output_dir."}
    )
    do_train: bool | None = _yes_no("Train; not given: if there is something to train on.")
    do_eval: bool | None = _yes_no("Evaluate; not given: if there is something to evaluate on.")
    do_predict: bool | None = _yes_no("Predict a test set; not given: if there is one.")


# -- reading ------------------------------------------------------------------------------------------------------


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults of the arguments, and the lines of the description as they are."""


class _Parser(HfArgumentParser):
    """Opens its help with the description, and tells errors in one line."""

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        raise InputError(re.sub(r"^argument (--\w+)\S*: ", r"\1: ", one_line(ValueError(message))) + ". See --help.")


def parse(
    types: tuple[type, ...],
    description: str,
    usage: str = "%(prog)s [--NAME VALUE ...]",
    ranges: Mapping[str, Range] | None = None,
    useless: Mapping[str, str] | None = None,
) -> tuple:
    """The command line's arguments, an object of each of the dataclasses `types`; the first one knows what was given.

    A file of arguments (.json, .yaml) may stand first; what follows it on the command line counts before it.

    Args:
        description: what --help begins with: the script's docstring.
        ranges: what the script's own numbers may be, beside those of `RANGES`.
        useless: arguments of the Trainer that would do nothing in this script, and what to do instead.

    Raises:
        InputError: an argument that there is not, or a value that none of the arguments takes, or that does nothing.
    """
    parser = _Parser(types, description=description, usage=usage, formatter_class=_Help)
    words = sys.argv[1:]
    if words and words[0].endswith((".json", ".yaml", ".yml")):
        words = [*_words_of_file(words[0], {each.name: each for kind in types for each in fields(kind)}), *words[1:]]
    given = _given(types, words)
    with one_line_errors(ValueError, TypeError, ImportError, NotImplementedError):
        *objects, unknown = parser.parse_args_into_dataclasses(
            [*low_rank_words(given), *words], return_remaining_strings=True
        )
    if unknown:
        raise InputError(f"{' '.join(unknown)}: no such argument. See --help.")
    given = objects[0].given = frozenset(given)
    for name, remedy in (useless or {}).items():
        if name in given:
            raise InputError(f"--{name}: {remedy}.")
    check_numbers(objects, RANGES | dict(ranges or {}))
    for group in objects:
        if isinstance(group, TrainingArguments):
            _check_reports(group)
            _check_optim_args(group)
    return tuple(objects)


def _given(types: tuple[type, ...], words: list[str]) -> dict[str, Any]:
    """The arguments that are given, without defaults of the others."""
    parser = _Parser(types, add_help=False)
    for action in parser._actions:
        action.default = SUPPRESS
    return vars(parser.parse_known_args(words)[0])


def _words_of_file(path: str, known: Mapping[str, Any]) -> list[str]:
    """A file of arguments as words of the command line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON or YAML file of arguments ({one_line(error)}).") from error
    if not isinstance(content, dict):
        raise InputError(f'{path}: expected names and values of arguments, such as {{"seed": 1}}.')
    words = []
    for name, value in content.items():
        if name not in known:
            raise InputError(f"{path}: no such argument {str(name)!r}. See --help.")
        if value is None and known[name].default is not None:
            raise InputError(f"{path}: {name} has no value. Give one, or leave it out.")
        if name == "report_to" and value == []:
            words.append("--report_to=none")  # as a list has it
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


# -- checking -----------------------------------------------------------------------------------------------------


def check_numbers(groups: Iterable[Any], ranges: Mapping[str, Range]) -> None:
    """Raises `InputError` for a number that is none (nan), is not finite, or is outside its range."""
    for group in groups:
        for each in fields(group):
            value = getattr(group, each.name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            if not math.isfinite(value):
                raise InputError(f"--{each.name} {value}: expected a finite number.")
            # a default need not be in the range: it may stand for "not given"
            if each.name in ranges and not ranges[each.name].has(value) and value != each.default:
                raise InputError(f"--{each.name} {_plain(value)}: expected {ranges[each.name]}.")


def _check_reports(args: TrainingArguments) -> None:
    installed = get_available_reporting_integrations()
    for name in args.report_to:
        if name not in (*installed, "flyte"):
            known = ", ".join([*installed, "none"])
            raise InputError(f"--report_to {name}: not known or not installed. Install it, or give one of {known}.")


def _check_optim_args(args: TrainingArguments) -> None:
    for pair in (args.optim_args or "").replace(" ", "").split(","):
        if pair and not re.fullmatch(r"\w+=[^=]+", pair):
            raise InputError(
                f"--optim_args {args.optim_args}: expected names and values such as momentum=0.9,eps=1e-6."
            )
    if args.optim_args and getattr(args, "fnl_optim", None) == "lamb":
        raise InputError("--optim_args: LAMB takes its betas and epsilon from --adam_beta1, _beta2 and --adam_epsilon.")


def check_best_metric(args: TrainingArguments, names: Iterable[str]) -> None:
    """Raises `InputError` if an evaluation does not give the metric that is to tell the best model."""
    asked = args.metric_for_best_model
    names = sorted({"loss", *names})
    if asked is not None and asked.removeprefix("eval_") not in names:
        raise InputError(f"--metric_for_best_model {asked}: an evaluation gives {', '.join(names)}. Give one of these.")


def check_arguments(args: TrainingArguments) -> None:
    """Raises `InputError` for arguments of the Trainer under which a run could not be repeated or resumed exactly."""
    for name, reason in _UNKEPT.items():
        if getattr(args, name, None):
            raise InputError(f"--{name}: {reason}.")


def check_unused(given: frozenset[str], names: Iterable[str], reason: str) -> None:
    """Raises `InputError` if one of the arguments was given that do nothing for this `reason`."""
    if unused := sorted(given.intersection(names)):
        raise InputError(f"--{unused[0]}: {reason}.")


def check_steps(args: TrainingArguments) -> None:
    """Raises `InputError` if neither steps nor epochs say how long to train."""
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise InputError(f"--max_steps {args.max_steps}: nothing to train. Give a number, or --num_train_epochs.")
