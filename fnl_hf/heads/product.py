"""`HeadProduct`: the declaration that two projections of an attention module form a product per head."""

from collections.abc import Callable

from torch import Tensor, nn

from ..algebra import chain, rotary
from ..factorization import Declares, Factorization, View, parameter_below
from .slices import HeadSlice, RotaryLayout


class HeadProduct(Declares, nn.Module):
    """Declares that two projections of an attention module form a product per head. No parameters, no forward.

    It sits on the common ancestor of both projections, named "qk" or "ov", so ``print(model)`` shows it and
    ``state_dict`` does not.

    Args:
        kind: "qk", "rotary-qk" or "ov".
        left, right: how the heads of both projections lie in their weights now, Q and K or O and V.
        head_dim: the width of a head in the dense model.
        rotary: which features of queries and keys are rotated.
        replaced: attributes of the parent that really narrower heads have changed, with what they were; None where
            narrow heads are padded to their old width.
    """

    def __init__(
        self,
        kind: str,
        left: HeadSlice,
        right: HeadSlice,
        head_dim: int,
        rotary: RotaryLayout | None = None,
        replaced: dict[str, int] | None = None,
    ):
        super().__init__()
        self.kind, self.left, self.right, self.head_dim, self.rotary = kind, left, right, head_dim, rotary
        self.replaced = replaced

    def factorization(self, name: str, parent: nn.Module) -> Factorization:
        """The product as it stands now in ``parent``, the module that holds this declaration."""
        layout = "padded" if self.replaced is None else "compact"
        if self.rotary is None:
            # Q_hᵀ K_h reads Q's rows transposed; O_h V_h reads O's columns as they are.
            across = (lambda heads: heads.mT) if self.left.axis == "out" else None
            views = [self._view(parent, self.left, across, -2), self._view(parent, self.right, None, -1)]
            return Factorization(name, self.kind, chain, tuple(views), self.head_dim, layout)
        views = [self._view(parent, side, self.rotary.planes, -1) for side in (self.left, self.right)]
        if self.rotary.dim < self.left.width:
            rest = self.rotary.rest
            views.append(self._view(parent, self.left, lambda heads: rest(heads).mT, -2, self.rotary.dim))
            views.append(self._view(parent, self.right, rest, -1, self.rotary.dim))
        return Factorization(name, self.kind, rotary, tuple(views), self.head_dim, layout)

    @staticmethod
    def _view(
        parent: nn.Module, side: HeadSlice, then: Callable[[Tensor], Tensor] | None, outer: int, after: int = 0
    ) -> View:
        then = then or (lambda heads: heads)
        weight, bias = parameter_below(parent, side.weight), None
        if side.bias and side.axis == "out":
            bias = parameter_below(parent, side.bias)
        read_bias = lambda b: then(side.read_bias(b)[..., None])  # noqa: E731
        return View(weight, lambda w: then(side.read(w)), outer, bias, read_bias, side.offset + after)

    def withdraw(self, parent: nn.Module) -> None:
        """Give the parent back the widths of the dense heads."""
        for attribute, value in (self.replaced or {}).items():
            setattr(parent, attribute, value)

    def extra_repr(self) -> str:
        heads = f"{self.left.size} heads"
        if self.right.size != self.left.size:
            heads += f" in {self.right.size} groups"
        rank = "" if self.left.width == self.head_dim else f" of {self.head_dim}"
        rotated = "" if self.rotary is None else f", {self.rotary.dim} features rotated"
        return f"{self.left.weight} x {self.right.weight}, {heads}, rank {self.left.width}{rank}{rotated}"
