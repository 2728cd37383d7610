"""Errors of a script's user: one line each, told without a traceback."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import distributed

from .locking import unlock


class InputError(ValueError):
    """The user's input cannot be used. One line: what was given, what was expected, what to do."""


def one_line(error: Exception) -> str:
    """The message of an error without its line breaks, or its name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds, which are about what the user gave, become an `InputError`."""
    try:
        yield
    except kinds as error:
        raise InputError(one_line(error)) from error


def run_main(main: Callable[[], None]) -> None:
    """Call the `main` of a script; an `InputError` in it is one line and exit status 2, Ctrl-C one line and 130.

    So are files that cannot be read or written: of a full disk, or without permission.
    """
    try:
        main()
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()  # nobody leaves while another one still listens
            distributed.destroy_process_group()  # its threads may otherwise abort a process that is done
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {one_line(error)}. Make room or give access, and repeat the command.", file=sys.stderr)
        sys.exit(2)
    finally:
        unlock()
