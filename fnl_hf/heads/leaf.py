"""Leaves whose heads hold fewer features than the rest of the model sees.

Hugging Face reshapes q, k and v with one ``head_dim`` and computes the scale from it, so a head of rank r keeps its
old width outside: the rows of q, k, v write zeros beyond r, the columns of o read the first r of each head. Scale,
caches and attention kernels stay as they are (no class has to know). Where a module is proven to compute the same with
heads that are really narrower, they may be (``make_compact``).
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..factorization import FactorLeaf
from ..leaves import taken_over


@dataclass(frozen=True)
class HeadPadding:
    """Narrow heads inside wide ones: ``repeats`` periods, each a run of blocks (heads, width outside, rank inside)."""

    repeats: int
    blocks: tuple[tuple[int, int, int], ...]

    @property
    def wide(self) -> int:
        """Features that the model sees."""
        return self.repeats * sum(heads * width for heads, width, _ in self.blocks)

    @property
    def narrow(self) -> int:
        """Features that are stored."""
        return self.repeats * sum(heads * rank for heads, _, rank in self.blocks)

    def pad(self, x: Tensor) -> Tensor:
        """(…, narrow) -> (…, wide), zeros beyond each head's rank."""
        stored = [heads * rank for heads, _, rank in self.blocks]
        return self._map(x, stored, lambda part, width, rank: F.pad(part, (0, width - rank)))

    def cut(self, x: Tensor) -> Tensor:
        """(…, wide) -> (…, narrow), the leading features of each head."""
        seen = [heads * width for heads, width, _ in self.blocks]
        return self._map(x, seen, lambda part, width, rank: part[..., :rank])

    def _map(self, x: Tensor, sizes: list[int], resize) -> Tensor:
        periods = x.unflatten(-1, (self.repeats, -1))  # (…, repeats, period)
        parts = [
            part if width == rank else resize(part.unflatten(-1, (heads, -1)), width, rank).flatten(-2)
            for part, (heads, width, rank) in zip(periods.split(sizes, -1), self.blocks, strict=True)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).flatten(-2)

    def narrow_offset(self, offset: int) -> int:
        """Where a block that starts at ``offset`` of the wide period starts in the narrow one."""
        starts = [0, *accumulate(heads * width for heads, width, _ in self.blocks)]
        return sum(heads * rank for heads, _, rank in self.blocks[: starts.index(offset)])


class HeadLinear(FactorLeaf, nn.Linear):
    """A projection of attention that stores its heads at their rank: ``weight`` is the factor, (narrow out, narrow in).

    ``in_features`` and ``out_features`` are what the model sees. ``rows`` narrows the output (q, k, v), ``columns``
    the input (o). ``dense_type`` is the class of the leaf that ``to_dense`` restores.
    """

    def __init__(self, in_features, out_features, bias, rows=None, columns=None, dense_type=nn.Linear, **factory):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.rows: HeadPadding | None = rows
        self.columns: HeadPadding | None = columns
        self.dense_type = dense_type
        self.compact = False
        stored_out = rows.narrow if rows else out_features
        stored_in = columns.narrow if columns else in_features
        self.weight = nn.Parameter(torch.empty(stored_out, stored_in, **factory))  # values are the caller's
        self.bias = nn.Parameter(torch.empty(stored_out, **factory)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        if self.compact:
            return F.linear(input, self.weight, self.bias)
        if self.columns is not None:
            input = self.columns.cut(input)
        output = F.linear(input, self.weight, self.bias)
        return output if self.rows is None else self.rows.pad(output)

    def make_compact(self) -> None:
        """Present the narrow heads as they are: for an attention module that has been told their width."""
        self.compact = True
        self.out_features, self.in_features = self.weight.shape

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={tuple(self.weight.shape)}"

    @classmethod
    def narrowed(cls, leaf: nn.Module, rows: HeadPadding | None, columns: HeadPadding | None) -> "HeadLinear":
        """A narrow copy of an ``nn.Linear`` or ``Conv1D``: the leading features of each head."""
        transposed = not isinstance(leaf, nn.Linear)  # Conv1D stores (in, out)
        weight = leaf.weight.mT if transposed else leaf.weight
        out_features, in_features = weight.shape
        narrow = cls(
            in_features, out_features, leaf.bias is not None, rows, columns, type(leaf),
            dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        with torch.no_grad():
            narrow.weight.copy_(_resize_weight(weight, rows, columns, "cut"))
            if leaf.bias is not None:
                narrow.bias.copy_(leaf.bias if rows is None else rows.cut(leaf.bias))
        return taken_over(narrow, leaf)

    def dense(self) -> nn.Module:
        """The ``nn.Linear`` or ``Conv1D`` of the same function: zeros beyond each head's rank."""
        out_features = self.rows.wide if self.rows else self.weight.shape[0]
        in_features = self.columns.wide if self.columns else self.weight.shape[1]
        with torch.no_grad():
            weight = _resize_weight(self.weight, self.rows, self.columns, "pad")
            bias = self.bias if self.bias is None or self.rows is None else self.rows.pad(self.bias)
        with torch.device("meta"):
            if self.dense_type is Conv1D:
                dense, weight = Conv1D(out_features, in_features), weight.mT
            else:
                dense = self.dense_type(in_features, out_features, bias is not None)
        dense.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        dense.bias = None if bias is None else nn.Parameter(bias.clone())
        return taken_over(dense, self)


def _resize_weight(weight: Tensor, rows: HeadPadding | None, columns: HeadPadding | None, method: str) -> Tensor:
    if rows is not None:
        weight = getattr(rows, method)(weight.mT).mT
    return weight if columns is None else getattr(columns, method)(weight)
