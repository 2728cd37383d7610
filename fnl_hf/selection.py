"""Which of the candidates a config asks for by name: ``attention``, ``exclude_modules``, ``rank_pattern``."""

from collections.abc import Sequence

from .config import ATTENTION_KINDS, FNLConfig
from .names import ends_with, matches_end
from .plan import Candidate, Skip

EXCLUDED = "excluded by exclude_modules"
NOT_NAMED = "not among the names in attention"
SHOWN = 4  # names in an error


def selected(candidates: Sequence[Candidate], config: FNLConfig) -> tuple[list[Candidate], list[Skip]]:
    """The candidates that a config asks for, and the others with the reason.

    Raises:
        ValueError: A name or pattern of the config matches none of them: a slip of the pen would change nothing, and
            nobody would know. The message shows a few of the names there are.
    """
    kept, skipped = [], []
    for candidate in candidates:
        names = names_of(candidate)
        if any(config.excludes(entry, names) for entry in config.exclusions()):
            skipped.append(Skip(candidate.name, candidate.kind, EXCLUDED))
        elif candidate.kind in config.attention_kinds() and not _named(candidate, config):
            skipped.append(Skip(candidate.name, candidate.kind, NOT_NAMED))
        else:
            kept.append(candidate)
    there = [names_of(candidate) for candidate in candidates]
    for entry in config.exclusions():
        _expect("exclude_modules", entry, any(config.excludes(entry, names) for names in there), there)
    for entry in config.attention_names():
        _expect("attention", entry, any(ends_with(name, entry) for names in there for name in names), there)
    left = [names_of(candidate) for candidate in kept]
    for pattern in config.rank_pattern:
        _expect("rank_pattern", pattern, any(matches_end(pattern, names) for names in left), left)
    return kept, skipped


def names_of(candidate: Candidate) -> list[str]:
    """The names that a candidate goes by: what it would be called, and its module's."""
    own = [option.name for option in candidate.options]
    if not own and candidate.kind in ATTENTION_KINDS:
        own = [f"{candidate.name}.{candidate.kind}".removeprefix(".")]
    return list(dict.fromkeys([*own, candidate.name]))


def _named(candidate: Candidate, config: FNLConfig) -> bool:
    entries = [entry for entry in config.attention if entry.rpartition(".")[2] == candidate.kind]
    return any(ends_with(name, entry) for name in names_of(candidate) for entry in entries)


def _expect(field: str, entry: str, matched: bool, there: Sequence[Sequence[str]]) -> None:
    if matched or not there:  # where there is nothing at all, that is what to say
        return
    shown = list(dict.fromkeys(names[0] for names in there))
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    raise ValueError(f"{field} has '{entry}', which matches nothing: there are {', '.join(shown[:SHOWN])}{more}")
