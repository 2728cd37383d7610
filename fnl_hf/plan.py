"""What ``factorize`` does to a model, as data: targets with their ranks, and what is skipped and why.

A `Target` is one factorization to be: how to find its factors in the dense model, and how to put its layers in place.
Each kind of thing that can be factorized (the heads of attention, say) is a *family*: one subclass of `Target`, and a
*finder* that offers such targets for a model. Everything else, from planning to loading, handles targets only.

    fnl_hf.register_family(finder, MyTarget)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor, nn

from .config import LOOK_AHEAD, FNLConfig
from .factorization import Factorization
from .proof import Evidence
from .trial import Trial

RESTORE = "restore the config.json that was saved with these weights"

# A name of a parameter -> its name in the model, or None where that is put together from several
Renaming = Callable[[str], str | None]


class Activation(NamedTuple):
    """Where in a model to read the features that a factor carries, for initialisations that look at data.

    Attributes:
        module: dotted name.
        end: "input", the first argument of its forward, or "output", the first that it returns.
        read: (positions, features) as (*batch, positions, width), the batch that of the factor. None where the module
            looks up rows: then they are counted.
        spread: (the module, what it takes) as (…, features), where the features are not what lies last there.
    """

    module: str
    end: str
    read: Callable[[Tensor], Tensor] | None
    spread: Callable[[nn.Module, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Target(ABC):
    """One factorization to be, by the names of a dense model: an entry of the stored plan. JSON-ready but for tuples.

    Attributes:
        name: what the factorization will be called.
        kind: "qk", "ov", "linear", …
        rank: what it gets.
    """

    family: ClassVar[str] = ""  # its tag in a stored plan; the name of the class if not given
    followed_by = None  # the activation that takes its output, by name; a field of a family that can tell

    name: str
    kind: str
    rank: int

    @abstractmethod
    def found(self, model: nn.Module) -> Factorization:
        """The factorization as it lies in the dense model, at full rank: a chain of one factor for a lone weight."""

    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """Names in the dense model of the parameters that it replaces or reads, a weight first."""

    @classmethod
    @abstractmethod
    def install(cls, model: nn.Module, targets: Sequence[Self]) -> None:
        """Put the layers and declarations of targets in place, with values still to be written.

        All of a family together, since targets may share a layer. A failure leaves the model as it was.
        """

    @classmethod
    def settle(cls, model: nn.Module, config: FNLConfig, targets: Sequence[Self], evidence: Evidence) -> Sequence[Self]:
        """The targets with their final ranks and layouts, once it is known which of what was found are exact.

        Raises:
            ValueError: The config's ranks do not fit them.
        """
        return targets

    @classmethod
    def quicken(cls, model: nn.Module, targets: Sequence[Self], trial: Trial) -> list["Skip"]:
        """Give the layers of targets, in place in a factorized model, the equal form in which they are fastest.

        Declarations that stay are told of it (``planned``); a layer that becomes an ordinary one is left out of the
        plan from then on.

        Returns:
            What became ordinary, and why.
        """
        return []

    @classmethod
    def told(cls, config: FNLConfig, targets: Sequence[Self]) -> list[str]:
        """Lines for the log and the summary, where an initialisation does not take all of this family alike."""
        return []

    @classmethod
    def notes(cls, config: FNLConfig, products: Sequence[Factorization]) -> list[str]:
        """Lines for the summary of a model, about the factorizations that belong to this family."""
        return []

    def cost(self, model: nn.Module, rank: int) -> int:
        """How many parameters its factors have at a rank, biases that get narrower among them."""
        product = self.found(model)
        if product.lone:
            *batch, rows, columns = product.tensors()[0].shape
            return math.prod(batch) * rank * (rows + columns)
        return sum(factor.numel() for factor in product.augmented()) * rank // product.size()[1]

    def is_reducible(self, model: nn.Module, evidence: Evidence) -> bool:
        """Whether a budget may lower its rank."""
        return True

    def shaped(self, factors: Sequence[Tensor]) -> Sequence[Tensor]:
        """What an initialisation gave, as its layer holds it."""
        return factors

    def inputs(self) -> tuple[Activation | None, ...]:
        """The features that each of its projections carries; () or None where that is not known.

        Of a weight by itself what it multiplies. Of two factors those of the left one and of the right one, which
        then both count; or, with None in the second place, those between them as the left one takes them.
        """
        return ()

    def output(self) -> Activation | None:
        """Where its product, or of queries and keys its left side, is put out; None where that is not known.

        Without ``read`` its features count each for itself.
        """
        return None

    @classmethod
    def with_tied(cls, model: nn.Module, targets: Sequence[Self]) -> Sequence[Self]:
        """The targets of a stored plan, and those of further layers that this class of model ties to theirs."""
        return targets

    def is_tied(self) -> bool:
        """Whether a checkpoint may hold its weights under other names only."""
        return False

    def renamed(self, rename: Renaming) -> Self | None:
        """The target under the names that its weights have in a model; None where they have none."""
        path = self.parameters()[0]
        if not (name := rename(path)) or not path.startswith(self.name):
            return None
        below = path.removeprefix(self.name)
        return replace(self, name=name.removesuffix(below)) if name.endswith(below) else None

    def flaw(self, model: nn.Module | None = None) -> str | None:
        """What is wrong with a target as read from config.json; given a model, what that lacks: "has no …"."""
        if not isinstance(self.name, str) or not isinstance(self.kind, str):
            return f"name is {self.name!r} and kind is {self.kind!r}, expected strings"
        if type(self.rank) is not int or self.rank < 1:
            return f"rank is {self.rank!r}, expected an int of at least 1"
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)} if model is not None else None
        missing = [path for path in self.parameters() if names is not None and path not in names]
        return f"has no {missing[0]}" if missing else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, which ``from_dict`` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of ``to_dict``, after JSON. Raises a TypeError or KeyError where fields are missing or unknown."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


@dataclass(frozen=True)
class Candidate:
    """What a finder offers: a place in the model, and what it may be.

    Attributes:
        name: of the module, for the user.
        kind: what is looked for there.
        options: the targets that it may be, the most general first; the first one that is proven exact is taken.
        certain: there is nothing to prove: a layer that is replaced as a whole.
        doubt: what stands in between, or why there is no option, in words for the user.
        optional: it stands there only if the module is called with it: a call that the model makes must decide.
        yields: it gives way where another family wants the same weights.

    Raises:
        ValueError: It is certain to be nothing.
    """

    name: str
    kind: str
    options: tuple[Target, ...]
    certain: bool = False
    doubt: str = ""
    optional: bool = False
    yields: bool = False

    def __post_init__(self):
        if self.certain and not self.options:
            raise ValueError(f"the candidate {self.name} is certain, but has no option")

    @classmethod
    def of(cls, offered: "Candidate | Target", family: "Family") -> "Candidate":
        """What a finder offered, checked; a target stands for the candidate that is certain to be it.

        Raises:
            TypeError: It is neither, or of another class than the one that was registered with the finder.
        """
        candidate = offered
        if isinstance(offered, Target):
            candidate = cls(offered.name, offered.kind, (offered,), certain=True)
        options = candidate.options if isinstance(candidate, Candidate) else (candidate,)
        for option in options:
            if type(option) is not family.target:
                raise TypeError(
                    f"a finder of {family.target.__name__} offers a {type(option).__name__}: it may offer targets of "
                    "that class, and Candidates of such"
                )
        return candidate


Finder = Callable[[nn.Module, FNLConfig], Iterable[Candidate | Target]]


@dataclass(frozen=True)
class Skip:
    """What looks as if it could be factorized, and is not."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The targets of a model with their ranks, and what is skipped: what config.json stores, so that loading never
    searches."""

    targets: tuple[Target, ...]
    skipped: tuple[Skip, ...] = ()

    def install(self, model: nn.Module) -> None:
        """Put all targets in place, family by family."""
        for family, targets in self.by_family():
            family.install(model, targets)

    def told(self, config: FNLConfig) -> list[str]:
        """Which targets the initialisation took how, in lines for the user; none where it took all alike."""
        lines = [line for family, targets in self.by_family() for line in family.told(config, targets)]
        if lines:
            return [*lines, "spectral for all others"]
        none = f"{config.init}: spectral everywhere, since no layer of reduced rank has a known activation behind it"
        return [none] if config.init in LOOK_AHEAD else []

    def by_family(self) -> Iterator[tuple[type[Target], list[Target]]]:
        """The families that have targets here, with those."""
        for family in FAMILIES.values():
            if targets := [target for target in self.targets if type(target) is family.target]:
                yield family.target, targets

    def to_dict(self) -> dict[str, list[dict]]:
        """JSON-ready data, which ``Plan.of`` a stored config reads back."""
        return {
            "targets": [{"family": _tag(type(target)), **target.to_dict()} for target in self.targets],
            "skipped": [asdict(skip) for skip in self.skipped],
        }

    @classmethod
    def of(cls, config: FNLConfig) -> "Plan":
        """The plan that a stored config holds, of this format version or an earlier one.

        Raises:
            ValueError: It is damaged, or its family is not registered: the message names the entry.
        """
        data = config.plan if isinstance(config.plan, dict) else {}
        # Format 1 knew heads only, and called the targets products.
        key, family = ("products", "heads") if "products" in data else ("targets", None)
        where = f"quantization_config.plan.{key}"
        if not isinstance(data.get(key), list):
            raise ValueError(f"quantization_config.plan in config.json holds no list of targets: {RESTORE}")
        targets = tuple(_read(f"{where}[{i}]", entry, family) for i, entry in enumerate(data[key]))
        names = [target.name for target in targets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{where} holds {_line(twice[0])} twice: {RESTORE}")
        skipped = data.get("skipped", [])
        whole = isinstance(skipped, list) and all(
            isinstance(skip, dict) and skip.keys() == {"name", "kind", "reason"} and all(map(_is_text, skip.values()))
            for skip in skipped
        )
        if not whole:
            raise ValueError(f"quantization_config.plan.skipped cannot be read ({_line(skipped)}): {RESTORE}")
        return cls(targets, tuple(Skip(**skip) for skip in skipped))


def _read(where: str, entry: Any, family: str | None) -> Target:
    """One entry of a stored plan, checked by itself; ``where`` it is, in words for the user."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} cannot be read ({_line(entry)} is no target): {RESTORE}")
    tag = family or entry.get("family")
    name = f"{_line(entry['name'])}: " if _is_text(entry.get("name")) else ""
    if isinstance(tag, str) and tag not in FAMILIES:
        raise ValueError(
            f"{where} is of the family {_line(repr(tag))}, and registered are {', '.join(FAMILIES)}: import the "
            "package that registers it (fnl_hf.register_family) before loading"
        )
    try:
        target = FAMILIES[tag].target.from_dict({key: entry[key] for key in entry if family or key != "family"})
        flaw = target.flaw()
    except Exception as error:  # whatever a family of any package raises at data of any shape
        raise ValueError(f"{where} cannot be read ({name}{_line(error)}): {RESTORE}") from None
    if flaw:
        raise ValueError(f"{where} ({_line(target.name)}): {_line(flaw)}; {RESTORE}")
    return target


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _line(value: Any) -> str:
    """What a file holds, as a short part of one line."""
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    return text if len(text) <= 300 else f"{text[:300]}…"


def headline(sizes: Iterable[tuple[str, int, int]], covered: int, parameters: int, skipped: int) -> str:
    """What became of a plan, in one line.

    Args:
        sizes: (kind, how many matrices or heads, their rank) of every factorization.
        covered, parameters: how many parameters belong to a factorization, and how many there are.
        skipped: how much was not factorized.
    """
    kinds: dict[str, list[tuple[int, int]]] = {}
    for kind, count, rank in sizes:
        kinds.setdefault(kind, []).append((count, rank))
    parts = []
    for kind, rows in kinds.items():
        ranks = sorted({rank for _, rank in rows})
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
        parts.append(f"{sum(count for count, _ in rows)} {kind} in {len(rows)} modules ({span})")
    line = f"fnl_hf: factorized {', '.join(parts)}; {covered:,} of {parameters:,} parameters"
    return line + (f"; {skipped} skipped, see fnl_hf.summary(model)" if skipped else "")


# -- families ----------------------------------------------------------------------------------------


class Family(NamedTuple):
    """A finder and the class of the targets that it offers."""

    finder: Finder
    target: type[Target]


FAMILIES: dict[str, Family] = {}  # by the tag of their targets, in the order of registration


def register_family(finder: Finder, target_class: type[Target]) -> None:
    """Let ``factorize`` look for a further kind of targets, and loading know them.

    Args:
        finder: (model, config) -> the targets, or `Candidate`s, that the config asks for in this dense model.
        target_class: the class of its targets, of which all are; registered again, it is replaced.

    Raises:
        TypeError: ``finder`` cannot be called, or ``target_class`` is no concrete subclass of `Target`.
        ValueError: Another class has its tag.
    """
    if not callable(finder):
        raise TypeError(f"register_family got {finder!r} as finder, expected a function of model and config")
    if not (isinstance(target_class, type) and issubclass(target_class, Target)):
        raise TypeError(f"register_family got {target_class!r}, expected a subclass of fnl_hf.Target")
    if missing := sorted(target_class.__abstractmethods__):
        raise TypeError(f"{target_class.__name__} lacks {', '.join(missing)}, which a Target needs")
    tag = _tag(target_class)
    known = FAMILIES.get(tag)
    if known and (known.target.__module__, known.target.__qualname__) != (
        target_class.__module__,
        target_class.__qualname__,
    ):
        raise ValueError(
            f"the tag {tag!r} is that of {known.target.__name__}: give {target_class.__name__} a family of its own"
        )
    FAMILIES[tag] = Family(finder, target_class)


def _tag(target_class: type[Target]) -> str:
    return target_class.family or target_class.__name__
