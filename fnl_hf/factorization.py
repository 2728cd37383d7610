"""A factorization: views of live parameters × a form of the algebra.

Modules *declare* factorizations (``HeadProduct`` here, low-rank layers above); ``factorizations(model)`` asks them.
A declaration holds names, never parameters or sibling modules, so that ``.to()``, ``deepcopy``, loading, resizing,
PEFT and FSDP may replace parameters at will; what is handed out is resolved afresh at every call.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from types import ModuleType

import torch
from torch import Tensor, nn

from .algebra import chain, rotary


@dataclass(frozen=True)
class HeadSlice:
    """Which entries of a weight are the heads of one projection, and how to read them as a batch of matrices.

    The split features (``axis``: "out" rows of q, k, v; "in" columns of o) are ``repeats`` equal periods; inside each,
    ``prod(heads)`` heads of ``width`` features start at ``offset``. That covers a plain projection (one period, offset
    0), fused blocks [q, k, v] (one period, three offsets), heads interleaved in a fused weight (one period per head)
    and grouped heads (``heads = (groups, heads per group)``, ``(groups, 1)`` for the shared side).

    Attributes:
        weight, bias: parameter names below the declaring module, such as "self.query.weight".
        transposed: True for a Conv1D weight, which is stored (in, out).
        bias_width: features per head of a bias that is a parameter of the attention module itself, of this projection
            alone; it keeps that width when the heads get narrower. None for the bias of the weight's own leaf.
    """

    weight: str
    bias: str | None
    axis: str
    heads: tuple[int, ...]
    width: int
    repeats: int = 1
    offset: int = 0
    transposed: bool = False
    bias_width: int | None = None

    def read(self, weight: Tensor) -> Tensor:
        """A tensor shaped like the weight as (*batch, width, in) for axis "out", (*batch, out, width) for "in"."""
        matrix = weight.mT if self.transposed else weight.flatten(1)  # (out, in); flatten: a 1x1 convolution
        if self.axis == "in":
            return self._split(matrix, -1).movedim(0, -2)
        return self._split(matrix, 0)

    def read_bias(self, bias: Tensor) -> Tensor:
        """A tensor shaped like the bias, (out,), as (*batch, width)."""
        if self.bias_width is None:
            return self._split(bias, 0)
        return bias.unflatten(0, (*self.batch, self.bias_width)).narrow(-1, 0, self.width)

    def _split(self, tensor: Tensor, dim: int) -> Tensor:
        features = prod(self.heads) * self.width
        # A lone period is no batch dimension of its own, unless it is the only one.
        if self.repeats == 1 and self.heads:
            return tensor.narrow(dim, self.offset, features).unflatten(dim, (*self.heads, self.width))
        periods = tensor.unflatten(dim, (self.repeats, -1))
        dim = dim if dim < 0 else dim + 1
        return periods.narrow(dim, self.offset, features).unflatten(dim, (*self.heads, self.width))

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch dimensions of what it reads."""
        return self.heads if self.repeats == 1 and self.heads else (self.repeats, *self.heads)

    @property
    def size(self) -> int:
        """How many heads it reads."""
        return self.repeats * prod(self.heads)


@dataclass(frozen=True)
class RotaryLayout:
    """Which features of a head are rotated, and which two make a plane.

    ``dim`` features from ``start`` on, in ``chunks`` equal parts; inside a part feature p is paired with p + half of
    it, or, ``interleaved``, 2p with 2p + 1. The features outside are unrotated; they are a prefix or a suffix.
    """

    start: int
    dim: int
    interleaved: bool = False
    chunks: int = 1

    def planes(self, heads: Tensor) -> Tensor:
        """(*batch, width, d) as (*batch, chunks, planes, 2, d)."""
        rotated = heads.narrow(-2, self.start, self.dim)
        if self.interleaved:
            return rotated.unflatten(-2, (self.chunks, -1, 2))
        return rotated.unflatten(-2, (self.chunks, 2, -1)).transpose(-3, -2)

    def rest(self, heads: Tensor) -> Tensor:
        """(*batch, width, d) as its unrotated features, (*batch, width - dim, d)."""
        width = heads.shape[-2]
        return heads.narrow(-2, 0 if self.start else self.dim, width - self.dim)


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
        form: the module of ``fnl_hf.algebra`` that knows norm, decay gradient and balance of such factors.
        views: the factors, in the order in which the form takes them.
    """

    name: str
    kind: str
    form: ModuleType
    views: tuple[View, ...]

    @property
    def family(self) -> str:
        """The kind as users select it: "qk" includes its rotary form."""
        return self.kind.removeprefix("rotary-")

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


class HeadProduct(nn.Module):
    """Declares that two projections of an attention module form a product per head. No parameters, no forward.

    It sits on the common ancestor of both projections, named "qk" or "ov", so ``print(model)`` shows it and
    ``state_dict`` does not.
    """

    def __init__(self, kind: str, left: HeadSlice, right: HeadSlice, head_dim: int, rotary: RotaryLayout | None = None):
        super().__init__()
        self.kind, self.left, self.right, self.head_dim, self.rotary = kind, left, right, head_dim, rotary
        self.wide: dict[str, int] = {}  # attributes of the owner that a compact layout changed, as they were

    def factorization(self, name: str, parent: nn.Module) -> Factorization:
        """The product as it stands now in ``parent``, the module that holds this declaration."""
        if self.rotary is None:
            # Q_hᵀ K_h reads Q's rows transposed; O_h V_h reads O's columns as they are.
            across = (lambda heads: heads.mT) if self.left.axis == "out" else None
            views = [self._view(parent, self.left, across, -2), self._view(parent, self.right, None, -1)]
            return Factorization(name, self.kind, chain, tuple(views))
        views = [self._view(parent, side, self.rotary.planes, -1) for side in (self.left, self.right)]
        if self.rotary.dim < self.left.width:
            rest = self.rotary.rest
            views.append(self._view(parent, self.left, lambda heads: rest(heads).mT, -2, self.rotary.dim))
            views.append(self._view(parent, self.right, rest, -1, self.rotary.dim))
        return Factorization(name, self.kind, rotary, tuple(views))

    @staticmethod
    def _view(
        parent: nn.Module, side: HeadSlice, then: Callable[[Tensor], Tensor] | None, outer: int, after: int = 0
    ) -> View:
        then = then or (lambda heads: heads)
        weight, bias = _parameter(parent, side.weight), None
        if side.bias and side.axis == "out":
            bias = _parameter(parent, side.bias)
        read_bias = lambda b: then(side.read_bias(b)[..., None])  # noqa: E731
        return View(weight, lambda w: then(side.read(w)), outer, bias, read_bias, side.offset + after)

    def extra_repr(self) -> str:
        heads = f"{self.left.size} heads"
        if self.right.size != self.left.size:
            heads += f" in {self.right.size} groups"
        rank = "" if self.left.width == self.head_dim else f" of {self.head_dim}"
        rotated = "" if self.rotary is None else f", {self.rotary.dim} features rotated"
        return f"{self.left.weight} x {self.right.weight}, {heads}, rank {self.left.width}{rank}{rotated}"


def factorizations(model: nn.Module) -> list[Factorization]:
    """Every factorization of a model, in module order; products that share all their parameters are one.

    Returns:
        Ephemeral views of the model as it is now: call again after anything replaced parameters.
    """
    return list(_unique(_declared(model)))


def _declared(model: nn.Module) -> Iterator[Factorization]:
    for name, module in model.named_modules():
        if isinstance(module, HeadProduct):
            yield module.factorization(name, model.get_submodule(name.rpartition(".")[0]))


def _unique(products: Iterator[Factorization]) -> Iterator[Factorization]:
    """Tied weights are one factorization, decayed once."""
    seen = set()
    for product in products:
        key = (product.kind, *((id(view.parameter), view.offset) for view in product.views))
        if key not in seen:
            seen.add(key)
            yield product


def _parameter(parent: nn.Module, path: str) -> nn.Parameter:
    """The parameter at a dotted path, seen through PEFT's wrapping of a layer (``base_layer``)."""
    *steps, attribute = path.split(".")
    module = parent
    for step in steps:
        module = getattr(module, step)
        module = getattr(module, "base_layer", module)
    return getattr(module, attribute)
