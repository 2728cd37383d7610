"""When an entry of a config means a module, by the module's dotted name: the rules are PEFT's."""

import re
from collections.abc import Iterable


def ends_with(name: str, end: str) -> bool:
    """PEFT's rule for lists of names: the whole name, or what follows one of its dots."""
    return name == end or name.endswith(f".{end}")


def matches_end(pattern: str, names: Iterable[str]) -> bool:
    """PEFT's rule for ``rank_pattern``: the pattern matches a whole name, or all that follows one of its dots.

    The expression is used as it was checked: composed into a larger one, ``(?i)`` and the like would be errors.
    """
    expression = re.compile(pattern)
    return any(
        expression.fullmatch(name, start)
        for name in names
        for start in (0, *(m.end() for m in re.finditer(r"\.", name)))
    )


def and_above(name: str) -> Iterable[str]:
    """A name, and those of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]
