"""What the training scripts share: arguments, errors for their user, text, stores, checkpoints, and the job itself."""

from .arguments import (
    AMOUNT,
    COUNT,
    Range,
    RunArguments,
    check_arguments,
    check_best_metric,
    check_steps,
    check_unused,
    parse,
)
from .checkpoints import (
    average_checkpoints_,
    check_same_model,
    complete_checkpoints,
    is_finished,
    last_complete_checkpoint,
)
from .errors import InputError, one_line, one_line_errors, run_main
from .factorization import FactorizationArguments, check_factorization, make_config, parse_rank
from .job import Job
from .learning import learn_tokens
from .messages import say
from .models import check_fit, load, load_trained, longest_input
from .record import arguments_of, check_used
from .results import resources_used, write_json, write_text
from .store import (
    TokenStore,
    TokenWriter,
    fingerprint,
    once,
    prepare_tokenizer,
    prepared_directory,
    tokenizer_digest,
)
from .text import bounded_lines, given_lines, open_text, parse_json, read_lines

__all__ = [
    "AMOUNT",
    "COUNT",
    "FactorizationArguments",
    "InputError",
    "Job",
    "Range",
    "RunArguments",
    "TokenStore",
    "TokenWriter",
    "arguments_of",
    "average_checkpoints_",
    "bounded_lines",
    "check_arguments",
    "check_best_metric",
    "check_factorization",
    "check_fit",
    "check_same_model",
    "check_steps",
    "check_unused",
    "check_used",
    "complete_checkpoints",
    "fingerprint",
    "given_lines",
    "is_finished",
    "last_complete_checkpoint",
    "learn_tokens",
    "load",
    "load_trained",
    "longest_input",
    "make_config",
    "once",
    "one_line",
    "one_line_errors",
    "open_text",
    "parse",
    "parse_rank",
    "parse_json",
    "prepare_tokenizer",
    "prepared_directory",
    "read_lines",
    "resources_used",
    "run_main",
    "say",
    "tokenizer_digest",
    "write_json",
    "write_text",
]
