"""What the training scripts share: errors for their user, text files, checkpoints, results.

A side wing, as those that build on it: nothing in the library imports it.
"""

from .checkpoints import (
    announce,
    average_checkpoints_,
    check_same_model,
    complete_checkpoints,
    is_finished,
    last_complete_checkpoint,
)
from .errors import InputError, one_line, parse_head_rank
from .models import check_fit, load, longest_input, make_config
from .results import report, resources_used, say, write_json, write_text
from .text import open_text, read_lines

__all__ = [
    "InputError",
    "announce",
    "average_checkpoints_",
    "check_fit",
    "check_same_model",
    "complete_checkpoints",
    "is_finished",
    "last_complete_checkpoint",
    "load",
    "longest_input",
    "make_config",
    "one_line",
    "open_text",
    "parse_head_rank",
    "read_lines",
    "report",
    "resources_used",
    "say",
    "write_json",
    "write_text",
]
