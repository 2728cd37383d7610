"""A factorization: views of live parameters × a form of the algebra.

Modules *declare* factorizations (`Declares`); ``factorizations(model)`` asks them. A declaration holds names, never
parameters or sibling modules, so that ``.to()``, ``deepcopy``, loading, resizing, PEFT and FSDP may replace parameters
at will; what is handed out is resolved afresh at every call.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.pytorch_utils import Conv1D

from .algebra import Form

if TYPE_CHECKING:
    from .config import FNLConfig
    from .plan import Target


@dataclass(frozen=True)
class View:
    """One factor, read out of a live parameter: ``read`` is linear, strided, and serves data and gradient alike.

    A bias rides along as one more entry of the factor's outer dimension (``outer``): ``read_bias`` gives it that shape.
    Views of one parameter that differ in ``offset`` read different entries of it.
    """

    parameter: nn.Parameter
    read: Callable[[Tensor], Tensor]
    outer: int
    bias: nn.Parameter | None = None
    read_bias: Callable[[Tensor], Tensor] | None = None
    offset: int = 0

    def __call__(self) -> Tensor:
        return self.read(self.parameter)

    def augmented(self, of: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter) -> Tensor:
        """The factor with its bias appended; the factor itself, live, where it has none.

        ``of`` reads something else of the parameters' shapes, such as an optimizer's moments.
        """
        factor = self.read(of(self.parameter))
        return factor if self.bias is None else torch.cat([factor, self.read_bias(of(self.bias))], self.outer)

    @torch.no_grad()
    def write(self, value: Tensor, of: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter) -> None:
        """Write what has the shape of ``augmented`` into the parameter and the bias."""
        factor = self.read(of(self.parameter))
        size = factor.shape[self.outer]
        factor.copy_(value.narrow(self.outer, 0, size))
        if self.bias is not None:
            self.read_bias(of(self.bias)).copy_(value.narrow(self.outer, size, 1))


@dataclass(frozen=True)
class Factorization:
    """A matrix (or a batch of them) that a model uses but does not store. An ephemeral view: do not keep it.

    Attributes:
        name: dotted name of the declaring module in the model, e.g. "bert.encoder.layer.0.attention.self.qk".
        kind: "qk", "rotary-qk", "ov", …
        form: what knows norm, decay gradient and balance of such factors, a form of ``fnl_hf.algebra``.
        views: the factors, in the order in which the form takes them.
        full_rank: the rank that the dense model has in its place; None where nobody says.
        layout: how it lies in the model, in a word for the summary.
    """

    name: str
    kind: str
    form: Form
    views: tuple[View, ...]
    full_rank: int | None = None
    layout: str = ""

    @property
    def family(self) -> str:
        """The kind as users select it: "qk" includes its rotary form."""
        return self.kind.rpartition("-")[2]

    @property
    def lone(self) -> bool:
        """Whether it is a weight by itself, which has no factors yet."""
        return len(self.views) == 1

    @property
    def weights(self) -> tuple[tuple[int, int], ...]:
        """Equal for products of the same entries of the same parameters."""
        return tuple((id(view.parameter), view.offset) for view in self.views)

    def __repr__(self) -> str:
        shapes = " x ".join(str(tuple(tensor.shape)) for tensor in self.tensors())
        return f"Factorization({self.name!r}, {self.kind!r}, {shapes})"

    def size(self) -> tuple[int, int]:
        """(how many matrices, or heads; their rank)."""
        return self.form.size(self.tensors())

    def tensors(self) -> list[Tensor]:
        """The factors as strided views of the parameters, as the form takes them (batches broadcast in a group)."""
        return [view() for view in self.views]

    def factors(self) -> tuple[Tensor, ...]:
        """The factors (B, m, r), …, (B, r, n), whose matmul is ``matrix()``; live wherever strides allow.

        B counts heads, or key-value groups: then the query side of a group is stacked, (B, g·m, r). Rotary products
        give their planes, as ``fnl_hf.algebra.rotary`` describes them.
        """
        return self.form.batched(self.tensors())

    def matrix(self) -> Tensor:
        """The product, (B, m, n). For inspection: nothing in training forms it.

        Raises:
            ValueError: A rotary product, which has no single matrix.
        """
        return self.form.product(self.factors())

    def squared_norm(self) -> Tensor:
        """Σ over B of the squared Frobenius norm, a scalar, from Grams; differentiable."""
        return self.form.squared_norm(self.tensors())

    def parameters(self) -> list[nn.Parameter]:
        """The parameters it covers, each once, biases not among them."""
        return list({id(view.parameter): view.parameter for view in self.views}.values())

    def augmented(self) -> list[Tensor]:
        """``tensors``, with each bias appended to its factor."""
        return [view.augmented() for view in self.views]

    def write(self, factors: Sequence[Tensor]) -> None:
        """Write factors shaped as ``augmented`` gives them."""
        for view, factor in zip(self.views, factors, strict=True):
            view.write(factor)

    @torch.no_grad()
    def decay_gradients(self) -> list[tuple[View, Tensor]]:
        """(view, gradient of ½ squared_norm in the view's shape), one per factor that trains."""
        gradients = self.form.decay_gradients(self.tensors())
        return [(view, g) for view, g in zip(self.views, gradients, strict=True) if view.parameter.requires_grad]


@torch.no_grad()
def overwrite(product: Factorization, factors: Sequence[Tensor]) -> None:
    """Give a dense model the product of factors of lower rank, in the place and shape of what it has.

    Of a weight by itself the product, of heads the factors with zeros beyond their rank.
    """
    if product.lone:
        product.write([product.form.product(factors)])
        return
    padded = [torch.zeros_like(view.augmented()) for view in product.views]
    for whole, factor in zip(padded, factors, strict=True):
        whole[tuple(map(slice, factor.shape))] = factor
    product.write(padded)


# -- where they are found ----------------------------------------------------------------------------


class Declares(ABC):
    """Mixin of a module that declares a factorization: all that ``factorizations`` looks for.

    It may be the layer that holds the factors, which is then a `FactorLeaf` too, or a module without parameters and
    forward beside the layers that do, shown by ``print(model)`` and absent from ``state_dict``.

    Attributes:
        planned: the target that it was installed for; None for a layer that its model class builds by itself.
        settings: the config that asked for it, without a plan.
        for_inference: it holds the product in a form that has no factors of it, and declares a place in the plan only.
    """

    for_inference = False
    planned: "Target | None" = None
    settings: "FNLConfig | None" = None

    def __new__(cls, *args, **kwargs):  # copies and unpickled declarations come this way too
        _declares_first()
        return super().__new__(cls)

    def target(self, name: str) -> "Target | None":
        """The entry of a plan that would install it again in the dense model, where it is called ``name``.

        By default the target that it was installed for, under its name of today: right for all whose fields give
        other names relative to the module that holds the declaration, and where nothing has changed the rank since.
        """
        return None if self.planned is None else replace(self.planned, name=name)

    @abstractmethod
    def factorization(self, name: str, parent: nn.Module) -> Factorization:
        """The factorization as it stands now.

        Args:
            name: dotted name of this module in the model.
            parent: the module that holds this one, below which a declaration finds what it names.
        """

    def withdraw(self, parent: nn.Module) -> None:  # noqa: B027
        """Undo what installing it changed in ``parent``, beside leaves: called by ``to_dense`` before it is removed."""


class Resizable(Declares):
    """A declaration whose factors can be given another rank, and a core: U S Vᵀ in place of U Vᵀ."""

    @property
    @abstractmethod
    def deep(self) -> bool:
        """Whether there is a core."""

    @abstractmethod
    def resize(self, parent: nn.Module, rank: int, deep: bool) -> None:
        """Make its parameters those of factors of this rank, with or without a core, and drop their gradients.

        Values are left open, the caller writes them. U and V stay the same parameters with other data, and so does a
        core, so that whatever holds them holds them still. Below ``parent`` lies what the declaration names.
        """


_WHEN_DECLARED: list[Callable[[], None]] = []


def when_declared(action: Callable[[], None]) -> Callable[[], None]:
    """Have something done once in a process, when its first declaration is built, loaded, copied or unpickled."""
    _WHEN_DECLARED.append(action)
    return action


@functools.cache
def _declares_first() -> None:
    for action in _WHEN_DECLARED:
        action()


class FactorLeaf(nn.Module):
    """A layer that took the place of an ordinary one and stores factors: all that ``to_dense`` looks for.

    Attributes:
        compact: it presents its own widths to the model, and not those of the ordinary layer; an adapter of it is as
            narrow as it is, and merges like any other.
    """

    compact = False

    def __new__(cls, *args, **kwargs):  # copies and unpickled leaves come this way too
        _guard_merges()
        return super().__new__(cls)

    def dense(self) -> nn.Module:
        """The ordinary layer of the same function."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to make it dense")


def factorizations(model: nn.Module) -> list[Factorization]:
    """Every factorization of a model, in module order; those that share all their parameters are one.

    Returns:
        Ephemeral views of the model as it is now: call again after anything replaced parameters.
    """
    found, seen = [], set()
    for each in declared(model):
        # Tied weights are one factorization, whatever their modules are: decayed once.
        key = tuple(sorted((id(view.parameter), view.offset) for view in each.views))
        if key not in seen:
            seen.add(key)
            found.append(each)
    return found


def declared(model: nn.Module) -> Iterator[Factorization]:
    """The factorization of every declaration, in module order, those that share parameters each for itself."""
    for name, module in model.named_modules():
        if isinstance(module, Declares) and not module.for_inference:
            yield module.factorization(name, model.get_submodule(name.rpartition(".")[0]))


def parameter_counts(model: nn.Module, products: Sequence[Factorization]) -> tuple[int, int]:
    """(entries of the parameters that factorizations cover, of all parameters of the model)."""
    covered = {parameter for product in products for parameter in product.parameters()}
    return sum(p.numel() for p in covered), sum(p.numel() for p in model.parameters())


def is_factorized(model: nn.Module) -> bool:
    """Whether anything in a model declares a factorization or stores factors."""
    return any(isinstance(module, (Declares, FactorLeaf)) for module in model.modules())


def swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each replacement wherever its original stands in the model: a shared leaf stays shared."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() gives a child of two names once
            if child in replacements:
                setattr(parent, name, replacements[child])


def parameter_below(parent: nn.Module, path: str) -> nn.Parameter:
    """The parameter at a dotted path, seen through PEFT's wrapping of a layer (``base_layer``)."""
    layer, _, attribute = path.rpartition(".")
    return getattr(module_below(parent, layer), attribute)


def module_below(parent: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path, seen through PEFT's wrapping as well; the parent itself at an empty one."""
    module = parent
    for step in path.split(".") if path else ():
        module = getattr(module, step)
        module = getattr(module, "base_layer", module)
    return module


# -- adapters ----------------------------------------------------------------------------------------


@functools.cache
def _guard_merges() -> None:
    """Watch, once in a process and from its first factor leaf on, what wraps such leaves."""
    register_module_module_registration_hook(_guard_merge)


def _guard_merge(wrapper: nn.Module, name: str, leaf: nn.Module) -> None:
    """PEFT merges by writing into ``base_layer.weight``; a wrapper of a factor leaf gets a merge that says why not."""
    if name != "base_layer":
        return
    if isinstance(leaf, FactorLeaf) and not leaf.compact:
        wrapper.merge = _refuse_merge
    elif vars(wrapper).get("merge") is _refuse_merge:
        del wrapper.merge  # `to_dense` put the ordinary leaf in its place
        wrapper.fan_in_fan_out = isinstance(leaf, Conv1D)  # how PEFT lays out what it merges


def _refuse_merge(*args, **kwargs):
    raise ValueError(
        "an adapter cannot be merged into factors, whose rank leaves no room for it: call "
        "fnl_hf.to_dense(model) first, or keep the adapter unmerged"
    )
