"""How the heads of a projection lie in its weight, and which of their features are rotated."""

from dataclasses import dataclass
from math import prod

from torch import Tensor


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

    @classmethod
    def from_dict(cls, data: dict) -> "HeadSlice":
        """Inverse of ``dataclasses.asdict``, after JSON."""
        return cls(**{**data, "heads": tuple(data["heads"])})

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

    def read_activations(self, features: Tensor) -> Tensor:
        """What the projection puts out (takes, for axis "in") as heads.

        (positions, features) become (*batch, positions, width).
        """
        return self._split(features, -1).movedim(0, -2)

    def _split(self, tensor: Tensor, dim: int) -> Tensor:
        features = prod(self.heads) * self.width
        # A lone period is no batch dimension of its own, unless it is the only one.
        if self.repeats == 1 and self.heads:
            return tensor.narrow(dim, self.offset, features).unflatten(dim, (*self.heads, self.width))
        periods = tensor.unflatten(dim, (self.repeats, -1))
        dim = dim if dim < 0 else dim + 1
        return periods.narrow(dim, self.offset, features).unflatten(dim, (*self.heads, self.width))

    def flaw(self, axis: str) -> str | None:
        """What is wrong with it as read from JSON, where heads should be split along ``axis``."""
        names = (self.weight,) if self.bias is None else (self.weight, self.bias)
        if not all(isinstance(name, str) and name and name.isprintable() for name in names):
            return "weight and bias are names"
        sizes = (*self.heads, self.width, self.repeats, self.width if self.bias_width is None else self.bias_width)
        if not all(type(size) is int and size > 0 for size in sizes) or type(self.offset) is not int or self.offset < 0:
            return "sizes are whole numbers"
        if self.axis != axis:
            return f"axis is {self.axis!r}, expected {axis!r}"
        if type(self.transposed) is not bool:
            return "transposed is true or false"
        if self.bias_width is not None and (self.bias is None or self.bias_width != self.width):
            return "a bias of its own is as wide as the heads"
        return None

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

    def flaw(self, width: int) -> str | None:
        """What is wrong with it as read from JSON, in heads of this width."""
        if not all(type(number) is int for number in (self.start, self.dim, self.chunks)):
            return "sizes are whole numbers"
        if type(self.interleaved) is not bool:
            return "interleaved is true or false"
        if self.start < 0 or self.dim < 2 or self.start + self.dim > width or 0 < self.start < width - self.dim:
            return f"rotated features are the first or the last of {width}"
        if self.chunks < 1 or self.dim % (2 * self.chunks):
            return "each chunk holds planes of two features"
        return None

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
