"""`HeadProduct`: the declaration that two projections of an attention module form a product per head."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..algebra import chain, rotary
from ..factorization import Factorization, Resizable, View, module_below, parameter_below, swap
from .leaf import HeadLinear
from .slices import HeadSlice, RotaryLayout

if TYPE_CHECKING:
    from ..plan import Target


class HeadProduct(Resizable, nn.Module):
    """Declares that two projections of an attention module form a product per head. No parameters, no forward.

    It sits on the common ancestor of both projections, named "qk" or "ov", so ``print(model)`` shows it and
    ``state_dict`` does not. Where its heads lie in narrow leaves, these say how.

    A deep one, Q_hᵀ S_h K_h or O_h S_h V_h, has its cores in the leaf of the right side: in a group of heads that share
    their keys or values, they share them too.

    Args:
        kind: "qk", "rotary-qk" or "ov".
        left, right: how the heads of both projections lie in their weights at full width, Q and K or O and V.
        head_dim: the width of a head in the dense model.
        rotary: which features of queries and keys are rotated.
        replaced: attributes of the parent that really narrower heads have changed, with what they were; None where
            narrow heads are padded to their old width.
        rank: what its heads have now; their full width if not given.
        deep: whether they have cores.
    """

    deep = False

    def __init__(
        self,
        kind: str,
        left: HeadSlice,
        right: HeadSlice,
        head_dim: int,
        rotary: RotaryLayout | None = None,
        replaced: dict[str, int] | None = None,
        rank: int | None = None,
        deep: bool = False,
    ):
        super().__init__()
        self.kind, self.left, self.right, self.head_dim, self.rotary = kind, left, right, head_dim, rotary
        self.replaced, self.rank, self.deep = replaced, head_dim if rank is None else rank, deep

    @property
    def core(self) -> str:
        """What the leaf of the right side calls its cores."""
        return f"{self.kind.rpartition('-')[2]}_core"

    def target(self, name: str) -> "Target | None":
        """Of the rank that it has today, and with the cores that it has."""
        target, held = super().target(name), {"rank": self.rank, "deep": self.deep}
        changed = {field: value for field, value in held.items() if getattr(target, field, value) != value}
        return replace(target, **changed) if changed else target

    def factorization(self, name: str, parent: nn.Module) -> Factorization:
        """The product as it stands now in ``parent``, the module that holds this declaration."""
        layout = "deep" if self.deep else "padded" if self.replaced is None else "compact"
        if self.rotary is None:
            # Q_hᵀ K_h reads Q's rows transposed; O_h V_h reads O's columns as they are.
            across = (lambda heads: heads.mT) if self.left.axis == "out" else None
            views = [self._view(parent, self.left, across, -2), self._view(parent, self.right, None, -1)]
            if self.deep:
                core = getattr(self.leaf(parent, self.right), self.core)
                views.insert(1, View(core, lambda cores: cores.unflatten(0, self.right.batch), -2))
            return Factorization(name, self.kind, chain, tuple(views), self.head_dim, layout)
        views = [self._view(parent, side, self.rotary.planes, -1) for side in (self.left, self.right)]
        if self.rotary.dim < self.left.width:
            rest = self.rotary.rest
            views.append(self._view(parent, self.left, lambda heads: rest(heads).mT, -2, self.rotary.dim))
            views.append(self._view(parent, self.right, rest, -1, self.rotary.dim))
        return Factorization(name, self.kind, rotary, tuple(views), self.head_dim, layout)

    @staticmethod
    def leaf(parent: nn.Module, side: HeadSlice) -> nn.Module:
        """The layer that holds a side's weight."""
        return module_below(parent, side.weight.rpartition(".")[0])

    def _view(
        self, parent: nn.Module, side: HeadSlice, then: Callable[[Tensor], Tensor] | None, outer: int, after: int = 0
    ) -> View:
        then = then or (lambda heads: heads)
        if isinstance(leaf := self.leaf(parent, side), HeadLinear):
            side = leaf.stored_slice(side)
        weight, bias = parameter_below(parent, side.weight), None
        if side.bias and side.axis == "out":
            bias = parameter_below(parent, side.bias)
        read_bias = lambda b: then(side.read_bias(b)[..., None])  # noqa: E731
        return View(weight, lambda w: then(side.read(w)), outer, bias, read_bias, side.offset + after)

    def resize(self, parent: nn.Module, rank: int, deep: bool) -> None:
        """Another rank of all its heads, in narrow leaves, with cores or without.

        Without cores, leaves in which nothing is narrow become ordinary layers.
        """
        leaves = {}
        for side in (self.left, self.right):
            leaves[leaf := self.leaf(parent, side)] = None
            leaf.resize(side, rank)
        leaf.set_core(self.core, self.right if deep else None)
        self.rank, self.deep = rank, deep
        if not deep:
            swap(parent, {leaf: leaf.dense() for leaf in leaves if not leaf.is_narrow()})

    def withdraw(self, parent: nn.Module) -> None:
        """Give the parent back the widths of the dense heads; what was frozen for its cores trains as they did."""
        if self.deep and self.leaf(parent, self.right).weight.requires_grad:
            self.leaf(parent, self.left).requires_grad_(True)
        for attribute, value in (self.replaced or {}).items():
            setattr(parent, attribute, value)

    def extra_repr(self) -> str:
        heads = f"{self.left.size} heads"
        if self.right.size != self.left.size:
            heads += f" in {self.right.size} groups"
        rank = "" if self.rank == self.head_dim else f" of {self.head_dim}"
        cores = ", with cores" if self.deep else ""
        rotated = "" if self.rotary is None else f", {self.rotary.dim} features rotated"
        return f"{self.left.weight} x {self.right.weight}, {heads}, rank {self.rank}{rank}{cores}{rotated}"
