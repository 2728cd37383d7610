"""Errors of a script's user: one line each, told without a traceback."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """The user's input cannot be used. One line: what was given, what was expected, what to do."""


def one_line(error: Exception) -> str:
    """The message of an error without its line breaks, or its name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def parse_head_rank(text: str) -> float | int:
    """ "0.5" is a fraction of the head's width, "16" the rank itself ("1" is rank one, "1.0" full rank)."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    raise InputError(f"--head_rank {text}: not a number. Give a fraction such as 0.5 or a whole rank such as 16.")


def run_main(main: Callable[[], None]) -> None:
    """Call the `main` of a script; an `InputError` in it is one line and exit status 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
