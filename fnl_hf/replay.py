"""A module by itself: a float64 copy with random weights, on a call, in which products are proven."""

import copy
import dataclasses
import enum
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .algebra.tensors import SIDES
from .calls import Call, ProbeError
from .factorization import Factorization
from .outputs import same_draws, tensors_in

TOLERANCE = 5e-5  # of the change that the one-sided controls make; wrong layouts have shown 1.4e-4 and more
MOVED = 1e-6  # relative change of the output from which on a control has moved it
REFUTED = 1e-2  # relative change under which a two-sided change may still be exact
LARGE = 100.0  # times the features of variance one that random weights give, of one side at a time
UNREACHED = "these inputs do not reach it: pass verify=example inputs that do"

Found = Callable[[nn.Module], Factorization]  # a product in a model that has the names of the one at hand


@dataclass(frozen=True)
class Verdict:
    """What a proof found: relative changes of the output under the two-sided and the one-sided change of basis."""

    name: str
    kind: str
    change: float | None
    control: float | None
    reason: str | None = None
    tolerance: float = TOLERANCE

    @property
    def exact(self) -> bool:
        """True if the output stays and the control moves it."""
        return self.reason is None and self.change < self.tolerance * self.control

    def __str__(self) -> str:
        if self.reason:
            return f"{self.name} {self.kind}: not probed, {self.reason}"
        word = "exact" if self.exact else "NOT EXACT"
        return f"{self.name} {self.kind}: {word} (changes by {self.change:.1e}, one-sided by {self.control:.1e})"


class Stage:
    """A float64 copy of one module, alone, with random weights, and a call of it.

    In float32 where the module insists on that.

    Raises:
        Exception: The module does not run on the call, or gives what is not finite.
    """

    def __init__(self, name: str, module: nn.Module, call: Call):
        self.name = name
        for dtype in (torch.float64, torch.float32):
            self.module, self.call = _random_copy(module, dtype), call.to(dtype)
            try:
                self.output = self.run(self.module)
            except Exception:
                if dtype is torch.float32:
                    raise
                continue
            if self.output.isfinite().all():
                return
        raise ProbeError(f"{type(module).__name__} gives values that are not finite")

    @property
    def names(self) -> list[str]:
        """The arguments of the module's forward."""
        return list(inspect.signature(self.module.forward).parameters)

    def with_arguments(self, values: dict[str, Any]) -> "Stage":
        """The same module with other arguments in the call."""
        other = copy.copy(self)
        other.call = Call(self.call.args, self.call.kwargs | values)
        return other

    def run(self, module: nn.Module) -> Tensor:
        """What a module of the same names returns for the call."""
        call = copy.deepcopy(self.call)  # some modules write into their arguments
        with torch.no_grad(), same_draws(module):
            return next(tensors_in(module(*call.args, **call.kwargs)))

    def counts(self, others: Iterable[tuple]) -> bool:
        """Whether the module gives something else with the numbers that others have (see ``numbers``), or fails."""
        own = numbers(self.module)
        try:
            return any(distance(self._run_as(each), self.output) > MOVED for each in others)
        except Exception:  # any user module may stand here
            return True
        finally:
            _set_numbers(self.module, own)

    def _run_as(self, others: tuple) -> Tensor:
        _set_numbers(self.module, others)
        return self.run(self.module)

    def root(self, module: nn.Module | None = None) -> nn.Module:
        """A model that holds nothing but the copy (or ``module``), under the name that it has in the whole one."""
        return under_its_name(self.name, self.module if module is None else module)

    def verdict(self, name: str, kind: str, found: Found) -> Verdict:
        """Probe one product, which lies in this module.

        The output must stay under a random change of basis, also of one after which the features on either side are
        large, where what clips them shows. Changing every other factor alone, the left ones or the right ones, is the
        control.
        """
        product = found(self.root())
        generator = torch.Generator().manual_seed(0)
        old = [factor.clone() for factor in product.augmented()]
        new = product.form.change_basis(old, generator)

        def moved(factors: Sequence[Tensor]) -> float:
            product.write(factors)
            return distance(self.run(self.module), self.output)

        try:
            change = moved(new)
            if change > REFUTED:  # a refutation whatever the controls say, which cost a replay each
                return Verdict(name, kind, change, 1.0)
            control = min(moved(_alternating(new, old)), moved(_alternating(old, new)))
            if control > MOVED:
                for left, right in ((LARGE, 1 / LARGE), (LARGE**-2, LARGE**2)):  # large on the left, then on the right
                    _rescale(new, left, right)
                    change = max(change, moved(new))
        finally:
            product.write(old)
        return Verdict(name, kind, change, control, None if control > MOVED else UNREACHED)


def under_its_name(name: str, module: nn.Module) -> nn.Module:
    """A model that holds nothing but a module, under the name that it has in the whole one."""
    for step in reversed(name.split(".") if name else []):
        parent = nn.Module()
        parent.add_module(step, module)
        module = parent
    return module


def _alternating(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Every other factor of two lists: the first of the one, the second of the other, …"""
    return [(left, right)[i % 2][i] for i in range(len(left))]


def _rescale(factors: Sequence[Tensor], left: float, right: float) -> None:
    """Multiply every left factor and every right one, in place: to allocate as much takes longer than all the rest."""
    for i, factor in enumerate(factors[: len(factors) // 2 * 2]):
        factor.mul_((left, right)[i % 2])


@dataclass
class new_basis:  # noqa: N801
    """Within, these sides of products have a random new basis; then their old factors, bit for bit."""

    products: Sequence[Factorization]
    sides: Sequence[str] = SIDES
    originals: list[list[Tensor]] = field(default_factory=list)

    def __enter__(self):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.originals = [[tensor.clone() for tensor in product.augmented()] for product in self.products]
            try:
                for product, original in zip(self.products, self.originals, strict=True):
                    product.write(product.form.change_basis(original, generator, self.sides))
            except BaseException:  # out of memory, say: nobody leaves what was never entered
                self.__exit__()
                raise

    def __exit__(self, *error):
        for product, original in zip(self.products, self.originals, strict=True):
            product.write(original)


# ----------------------------------------------------------------------------------------------------

# What a declaration was installed for has its name in it, and no forward reads it.
_OF_EVERY_MODULE = vars(nn.Module()).keys() | {"planned", "settings"}
FLAGS = 4  # entries that a buffer may have to be a flag or a scale
_NAMED = re.compile(r".*(cache|past|is_updated|layers\[|logger|warn).*")  # a line that looks a layer up, or tells of it
_LAYER_NUMBER = re.compile(r"(^|_)(layer|block)_?(idx|id|index|num|number)$|^idx$")


def fingerprint(module: nn.Module) -> tuple:
    """What the modules of one class may differ in but for the values of their weights.

    The classes below it, their plain attributes and flags but the number of the layer, the shapes of parameters and
    which of them are one, the config.
    """
    first: dict[int, int] = {}
    parameters = tuple(
        (name, tuple(parameter.shape), first.setdefault(id(parameter), i))
        for i, (name, parameter) in enumerate(module.named_parameters(remove_duplicate=False))
    )
    parts = []
    for name, part in module.named_modules():
        plain = [
            (key, repr(value))
            for key, value in (vars(part) | part._buffers).items()
            if key not in _OF_EVERY_MODULE and not _LAYER_NUMBER.search(key) and _is_plain(value)
        ]
        parts.append((name, type(part), tuple(sorted(plain)), id(getattr(part, "config", None))))
    return parameters, tuple(parts)


def numbers(module: nn.Module) -> tuple:
    """The numbers of layers that the parts of a module hold: (name of the part, attribute, number) of each."""
    return tuple(
        (name, key, value)
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if _LAYER_NUMBER.search(key) and isinstance(value, int)
    )


def may_count(module: nn.Module) -> bool:
    """Whether a forward may compute with the number of its layer, beyond finding its place in a cache of keys.

    By the lines that name it, so that the classes of transformers need no forward to show that they do not.
    """
    held = {(type(module.get_submodule(name)), key) for name, key, _ in numbers(module)}
    return any(_NAMED.sub("", line).count(key) for part, key in held for line in _lines(part))


def _lines(part: type) -> list[str]:
    """The source of a class and of those that it extends, without what builds it; what cannot be read is one line."""
    lines = []
    for each in part.__mro__:
        if each in nn.Module.__mro__:
            continue
        for name, function in vars(each).items():
            if inspect.isfunction(function) and name != "__init__":
                try:
                    lines += inspect.getsource(function).splitlines()
                except OSError:
                    lines += function.__code__.co_names
    return lines


def _set_numbers(module: nn.Module, values: tuple) -> None:
    for name, key, value in values:
        setattr(module.get_submodule(name), key, value)


def _is_plain(value: Any) -> bool:
    """Whether a value may decide what a forward does, and its ``repr`` tells which it is."""
    if isinstance(value, Tensor):
        return value.numel() <= FLAGS and not value.is_meta
    if isinstance(value, (tuple, list, set, frozenset)):
        return len(value) <= 16 and all(map(_is_plain, value))
    if isinstance(value, dict):
        return len(value) <= 16 and all(map(_is_plain, (*value, *value.values())))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = getattr(value, "__dict__", {})  # configs raise where layers differ in an attribute that is read of all
        return _is_plain([held.get(each.name) for each in dataclasses.fields(value)])
    return isinstance(value, (bool, int, float, str, type(None), torch.dtype, enum.Enum, FunctionType))


def _random_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in evaluation mode whose weights are drawn so that every part of it matters."""
    generator = torch.Generator().manual_seed(0)
    drawn = {
        id(parameter): nn.Parameter(_random_weight(name, parameter, dtype, generator), requires_grad=False)
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point()
    }
    module = copy.deepcopy(module, drawn).to(dtype).requires_grad_(False)  # the memo: no weight is copied
    for part in module.modules():
        part.training = False  # without `train`, in which layers of loralib change their weights
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return module


def _random_weight(name: str, like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator).to(like.device, dtype)
    if like.dim() >= 2:
        return noise.mul_((like.shape[0] / like.numel()) ** 0.5)  # features of variance one
    return noise.div_(4).add_(1.0 if name.endswith("weight") else 0.0)  # norms around one


def distance(output: Tensor, reference: Tensor) -> float:
    """The relative change of an output."""
    if output.shape != reference.shape:  # of a model that decides itself how long its output is
        return float("inf")
    return ((output - reference).norm() / reference.norm().clamp_min(1e-300)).item()
