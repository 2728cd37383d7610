"""What the training scripts share: errors for their user, text files, checkpoints, results."""

from .checkpoints import (
    announce,
    average_checkpoints_,
    check_same_model,
    complete_checkpoints,
    is_finished,
    last_complete_checkpoint,
)
from .errors import InputError, one_line, parse_head_rank, run_main
from .messages import say
from .models import check_fit, load, longest_input, make_config
from .results import report, resources_used, write_json, write_text
from .text import open_text, read_lines
from .training import check_arguments, check_decay, load_finished, one_line_errors, train

__all__ = [
    "InputError",
    "announce",
    "average_checkpoints_",
    "check_arguments",
    "check_decay",
    "check_fit",
    "check_same_model",
    "complete_checkpoints",
    "is_finished",
    "last_complete_checkpoint",
    "load",
    "load_finished",
    "longest_input",
    "make_config",
    "one_line",
    "one_line_errors",
    "open_text",
    "parse_head_rank",
    "read_lines",
    "report",
    "resources_used",
    "run_main",
    "say",
    "train",
    "write_json",
    "write_text",
]
