"""What the training scripts share: errors for their user, text files, checkpoints to resume from.

A side wing, as those that build on it: nothing in the library imports it.
"""

from .checkpoints import (
    average_checkpoints_,
    check_same_model,
    complete_checkpoints,
    is_finished,
    last_complete_checkpoint,
)
from .errors import InputError, one_line, parse_head_rank
from .text import open_text, read_lines

__all__ = [
    "InputError",
    "average_checkpoints_",
    "check_same_model",
    "complete_checkpoints",
    "is_finished",
    "last_complete_checkpoint",
    "one_line",
    "open_text",
    "parse_head_rank",
    "read_lines",
]
