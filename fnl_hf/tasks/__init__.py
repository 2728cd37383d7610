"""What `scripts/` are made of, a package a task; `running` is what the tasks share.

A side wing: it uses the library's public names, and nothing in the library imports it.
"""

import sys
from importlib.util import find_spec


class MissingExtra(ImportError):
    """The wing needs packages that the library itself does not."""


def _in_one_line(kind, error, traceback, otherwise=sys.excepthook):
    """A script that ends with `MissingExtra` ends as with any other error of its user: one line, exit status 2."""
    if kind is not MissingExtra:
        return otherwise(kind, error, traceback)
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if _missing := [name for name in ("datasets", "evaluate", "sacrebleu") if find_spec(name) is None]:
    sys.excepthook = _in_one_line
    raise MissingExtra(f"{', '.join(_missing)}: not installed. Scripts need more: pip install 'fnl-hf[tasks]'.")
