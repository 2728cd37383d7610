"""What all layers of factors have in common: W = U Vᵀ, or U M Vᵀ, in the place of a stored W.

U lies under the ordinary layer's own key, ``weight``, in a shape that does not fit there: so plain transformers refuses
such a checkpoint, and everything that goes by names (optimizers, FSDP, resuming) meets a parameter like any other. The
attribute ``weight`` is the product (`ComposedWeight`).
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..algebra import chain
from ..factorization import Factorization, FactorLeaf, Resizable, View
from ..leaves import shell
from .composed import ComposedWeight

if TYPE_CHECKING:
    from ..plan import Target

# Of a dense product's cost: factor by factor must save this much before evaluation prefers it to the composed weight,
# since two thin products run at a lower rate than one.
WORTH_TWO_CALLS = 0.9


class FactorizedLayer(Resizable, FactorLeaf):
    """A layer whose matrix (m, n) is U Vᵀ or U M Vᵀ. Values are the caller's to write.

    Parameters: ``weight`` is U, (m, rank), or (m, rank, 1) where (m, rank) would be the shape of the dense weight;
    ``right`` is V, (n, rank); ``middle``, of a deep one, M, (rank, rank); and the bias of the ordinary layer.

    Training multiplies factor by factor, or composes first where that is cheaper. For ranks up to min(m, n) that is
    only where the composed weight, which the backward then keeps, has fewer numbers than the r-wide middle that it
    keeps otherwise. In evaluation a weight that is composed is kept until a factor changes, or somebody goes through
    the parameters of the model: who writes them as ``parameter.data`` does that unseen.
    """

    kind: ClassVar[str]
    factors: ClassVar[tuple[str, ...]] = ("weight", "middle", "right")  # names of the parameters, the weight first

    @classmethod
    def replacing(cls, leaf: nn.Module, rank: int, deep: bool = False) -> Self:
        """An uninitialised layer with all that was set on ``leaf``, and its bias."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        own = {name: value for name, value in vars(leaf).items() if name not in ("_parameters", "_modules")}
        vars(layer).update(own)
        vars(layer)["_buffers"] = dict(leaf._buffers)
        layer._ordinary = (shell(leaf),)  # in a tuple: it is no part of the model
        layer._dimensions(leaf)
        layer._make_factors(leaf.weight, rank, deep)
        trains = leaf.weight.requires_grad
        for parameter in layer.factor_parameters():
            parameter.requires_grad_(trains)
        if "bias" in leaf._parameters:
            layer._parameters["bias"] = leaf.bias
        layer._is_hf_initialized = True
        return layer

    def _make_factors(self, like: Tensor, rank: int, deep: bool) -> None:
        """Uninitialised parameters of the rank, of the type and on the device of the dense weight ``like``."""
        columns, options = self.matrix_shape[1], {"dtype": like.dtype, "device": like.device}
        left = self._left_shape(rank, tuple(like.shape))
        self._parameters["weight"] = nn.Parameter(torch.empty(left, **options))
        self.middle = nn.Parameter(torch.empty(rank, rank, **options)) if deep else None
        self.right = nn.Parameter(torch.empty(columns, rank, **options))

    # -- what the kinds say ---------------------------------------------------------------------------

    def _dimensions(self, leaf: nn.Module) -> None:
        """Set what the kind's attributes are called where the ordinary layer calls them otherwise."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n) of the matrix."""
        raise NotImplementedError

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Of the ordinary layer's weight."""
        return self.matrix_shape

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        """A dense weight as its matrix (m, n)."""
        return weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Inverse of ``as_matrix``."""
        return matrix

    # -- factors --------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return self._parameters["right"].shape[-1]

    def stored(self, name: str) -> nn.Parameter | None:
        """The parameter of this name, where the attribute is something else."""
        return self._parameters.get(name)

    def factor_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the product."""
        return (p for name in self.factors if (p := self._parameters.get(name)) is not None)

    @property
    def left(self) -> Tensor:
        """U, (m, rank)."""
        weight = self._parameters["weight"]
        return weight if weight.dim() == 2 else weight.squeeze(-1)  # not [..., 0], whose backward fills a new tensor

    def _left_shape(self, rank: int, dense: tuple[int, ...]) -> tuple[int, ...]:
        """Of the parameter that holds U: one that does not fit where the dense weight lies."""
        rows = self.matrix_shape[0]
        return (rows, rank, 1) if (rows, rank) == dense else (rows, rank)

    @property
    def deep(self) -> bool:
        """Whether it is U M Vᵀ."""
        return self._parameters.get("middle") is not None

    @torch.no_grad()
    def resize(self, parent: nn.Module, rank: int, deep: bool) -> None:
        """Factors of another rank; tied layers must be tied to it anew."""
        vars(self).pop("_composed", None)
        weight, inner, right = (self._parameters.get(name) for name in self.factors)
        shape = self._left_shape(rank, tuple(self.dense_shape))
        for parameter, size in ((weight, shape), (right, (right.shape[0], rank)), (inner, (rank, rank))):
            if parameter is not None:
                parameter.grad, parameter.data = None, parameter.new_empty(size)
        if not deep:
            self.middle = None
        elif inner is None:
            self.middle = nn.Parameter(right.new_empty(rank, rank))

    def composed(self) -> Tensor:
        """The weight of the ordinary layer, with its gradient."""
        left = self.left if self.middle is None else self.left @ self.middle
        return self.as_weight(left @ self.right.mT)

    @property
    def weight(self) -> Tensor:
        """The product, as the ordinary layer's weight.

        The stored factor where that has no values to multiply: on the meta device, as it is loaded there, and while it
        is sharded, as FSDP2 looks for it under this name.
        """
        if any(parameter.is_meta or isinstance(parameter, DTensor) for parameter in self.factor_parameters()):
            return self._parameters["weight"]
        return self.composed() if torch.compiler.is_compiling() else ComposedWeight(self)

    def __setattr__(self, name: str, value: object) -> None:
        if "_former_parameters" in vars(self) and isinstance(value, Tensor):  # a replica of nn.DataParallel
            self._parameters[name] = value
            return None
        if name != "weight":
            return super().__setattr__(name, value)
        if isinstance(value, ComposedWeight):
            return self.tie(value.layer)
        if not isinstance(value, nn.Parameter) or tuple(value.shape) == tuple(self.dense_shape):
            raise ValueError(
                f"the weight of a {type(self).__name__} is the product of its factors, and cannot be set to a dense "
                "one (of an embedding that it is tied to?): factorize both, or call fnl_hf.to_dense(model)"
            )
        self._parameters["weight"] = value

    def tie(self, other: "FactorizedLayer") -> None:
        """Share the factors of another layer, which may have other rows: a vocabulary that was resized.

        Raises:
            ValueError: Its matrix has rows of another width.
        """
        if other.matrix_shape[1] != self.matrix_shape[1]:
            raise ValueError(f"a {self.matrix_shape} matrix cannot be tied to one of {other.matrix_shape}")
        vars(self).pop("_composed", None)
        for name in self.factors:
            vars(self).pop(name, None)  # the M that it does not have
            self._parameters[name] = other._parameters.get(name)
        for name in ("num_embeddings", "out_features"):
            if name in vars(self):
                setattr(self, name, self.matrix_shape[0])

    def target(self, name: str) -> "Target | None":
        """Of the rank that it has today, and with the M that it has."""
        target, held = super().target(name), {"rank": self.rank, "deep": self.middle is not None}
        changed = {field: value for field, value in held.items() if getattr(target, field, value) != value}
        return replace(target, **changed) if changed else target

    def factorization(self, name: str, parent: nn.Module) -> Factorization:
        views = [View(self._parameters["weight"], _rows, -2)]
        if self.middle is not None:
            views.append(View(self.middle, lambda m: m[None], -2))
        views.append(View(self.right, lambda v: v.mT[None], -1))
        layout = "deep" if self.middle is not None else ""
        return Factorization(name, self.kind, chain, tuple(views), min(self.matrix_shape), layout)

    def dense(self) -> nn.Module:
        """The ordinary layer of the same function."""
        dense = copy.copy(self._ordinary[0])
        for name, value in vars(self).items():  # what changed since, such as the number of rows
            if name in vars(dense) and name not in ("_parameters", "_modules"):
                vars(dense)[name] = value
        with torch.no_grad():
            weight = self.composed().detach().clone(memory_format=torch.contiguous_format)
        vars(dense)["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=self.weight.requires_grad)}
        if "bias" in self._parameters:
            dense._parameters["bias"] = self._parameters["bias"]
        dense._is_hf_initialized = True
        return dense.train(self.training)

    # -- when it is composed --------------------------------------------------------------------------

    def _dense_weight(self, factored: float, dense: float, compose: float) -> Tensor | None:
        """The composed weight where multiplying by that is cheaper, None where factor by factor is.

        Args:
            factored, dense, compose: multiplications of a forward factor by factor, of one by the dense weight, and of
                composing it. A backward costs twice each.
        """
        if self._trains() or _is_recorded():  # a graph keeps nothing from one call to the next
            # Frozen bases of a core that trains get no gradient, which is a third of the work; a dense weight must
            worth = 1.0 if self.middle is None or self.right.requires_grad else 1.5
            return self.composed() if factored > worth * (dense + compose) else None
        return None if factored < WORTH_TWO_CALLS * dense else self._kept("composed")

    def _trains(self) -> bool:
        """Whether a forward now gives the factors gradients."""
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.factor_parameters())

    def _kept(self, method: str) -> Tensor | tuple[Tensor, ...]:
        """What a method makes of the factors alone, made anew only after a factor has changed."""
        if _is_recorded() or any(factor.is_inference() for factor in self.factor_parameters()):
            return getattr(self, method)()  # an inference tensor does not count its changes
        if (kept := self._kept_still(method)) is None:
            # no inference tensor: no backward could use it later
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.right.device.type, enabled=False):
                kept = getattr(self, method)()
            self.__dict__["_composed"] = method, self._changes(), kept
        return kept

    def _kept_still(self, method: str) -> Tensor | tuple[Tensor, ...] | None:
        """What `_kept` gave before, if no factor has changed since: a look that takes a microsecond."""
        kept = self.__dict__.get("_composed")
        return kept[2] if kept is not None and kept[0] == method and kept[1] == self._changes() else None

    def _changes(self) -> tuple[int, ...]:
        """Other numbers after any factor was written, or put in the place of another."""
        parameters = self._parameters
        left, middle, right = parameters["weight"], parameters.get("middle"), parameters["right"]
        if middle is None:
            return left._version, right._version, left.data_ptr(), right.data_ptr()
        inner = middle._version, middle.data_ptr()
        return left._version, right._version, left.data_ptr(), right.data_ptr(), *inner

    def named_modules(self, *args, **kwargs):
        vars(self).pop("_composed", None)
        return super().named_modules(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        vars(self).pop("_composed", None)
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        vars(self).pop("_composed", None)
        return super()._apply(*args, **kwargs)

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_composed"}


def _is_recorded() -> bool:
    """Whether what is computed now becomes a graph."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_exported() -> bool:
    """Whether what is computed now becomes a program for inputs of all sizes, in which none can decide."""
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()  # torch 2.6 has the second only


def _rows(weight: Tensor) -> Tensor:
    return (weight if weight.dim() == 2 else weight[..., 0])[None]
