"""Leaves whose heads hold fewer features than the rest of the model sees.

Hugging Face reshapes q, k and v with one ``head_dim`` and computes the scale from it, so a head of rank r keeps its
old width outside: the rows of q, k, v write zeros beyond r, the columns of o read the first r of each head. Scale,
caches and attention kernels stay as they are (no class has to know). Where a module is proven to compute the same with
heads that are really narrower, they may be (``make_compact``).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..factorization import FactorLeaf
from ..leaves import taken_over
from .slices import HeadSlice


@dataclass(frozen=True)
class HeadPadding:
    """Narrow heads inside wide ones: ``repeats`` periods, each a run of blocks (heads, width outside, rank inside)."""

    repeats: int
    blocks: tuple[tuple[int, int, int], ...]

    @property
    def widths(self) -> list[int]:
        """Features of a head that the model sees, by block."""
        return [width for _, width, _ in self.blocks]

    @property
    def ranks(self) -> list[int]:
        """Features of a head that are stored, by block."""
        return [rank for _, _, rank in self.blocks]

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
        return self._resized(x, self.ranks, self.widths)

    def cut(self, x: Tensor) -> Tensor:
        """(…, wide) -> (…, narrow), the leading features of each head."""
        return self._resized(x, self.widths, self.ranks)

    def stored_as(self, other: "HeadPadding", x: Tensor) -> Tensor:
        """(…, narrow) as another padding of the same heads stores it: cut, or with zeros."""
        return self._resized(x, self.ranks, other.ranks)

    def multiplied(self, x: Tensor, cores: Mapping[int, Tensor]) -> Tensor:
        """(…, narrow) with the features of each head multiplied by its core.

        Args:
            cores: start of a block in the wide period -> (repeats · heads, rank, rank)
        """
        parts = self._split(x, self.ranks)
        for offset, core in cores.items():
            block = self.block(offset)
            heads, _, rank = self.blocks[block]
            features = parts[block].unflatten(-1, (heads, rank))
            core = core.unflatten(0, (self.repeats, heads))
            parts[block] = torch.einsum("...phr,phsr->...phs", features, core).flatten(-2)
        return _joined(parts)

    def _resized(self, x: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
        """Features (…, heads · old) of every block as (…, heads · new)."""
        parts = [
            part if before == after else _fitted(part.unflatten(-1, (heads, before)), after).flatten(-2)
            for part, (heads, _, _), before, after in zip(self._split(x, old), self.blocks, old, new, strict=True)
        ]
        return _joined(parts)

    def _split(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The blocks of each period, (…, repeats, heads · size)."""
        features = [heads * size for (heads, _, _), size in zip(self.blocks, sizes, strict=True)]
        return list(x.unflatten(-1, (self.repeats, -1)).split(features, -1))

    def block(self, offset: int) -> int:
        """Which block starts at ``offset`` of the wide period."""
        return [0, *accumulate(heads * width for heads, width, _ in self.blocks)].index(offset)

    def narrow_offset(self, offset: int) -> int:
        """Where a block that starts at ``offset`` of the wide period starts in the narrow one."""
        return sum(heads * rank for heads, _, rank in self.blocks[: self.block(offset)])

    def with_rank(self, offset: int, rank: int) -> "HeadPadding":
        """The same with another rank of the block that starts at ``offset`` of the wide period."""
        blocks, block = list(self.blocks), self.block(offset)
        blocks[block] = (*blocks[block][:2], rank)
        return replace(self, blocks=tuple(blocks))


class HeadLinear(FactorLeaf, nn.Linear):
    """A projection of attention that stores its heads at their rank: ``weight`` is the factor, (narrow out, narrow in).

    ``in_features`` and ``out_features`` are what the model sees. ``rows`` narrows the output (q, k, v), ``columns``
    the input (o). ``dense_type`` is the class of the leaf that ``to_dense`` restores.

    Heads whose rank adapts have a core each, a parameter (heads, rank, rank) that multiplies what rows put out, biases
    included: ``cores`` has its name, and where the wide period has the block of its heads.
    """

    def __init__(self, in_features, out_features, bias, rows=None, columns=None, dense_type=nn.Linear, **factory):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.rows: HeadPadding | None = rows
        self.columns: HeadPadding | None = columns
        self.dense_type = dense_type
        self.compact = False
        self.cores: dict[str, int] = {}
        stored_out = rows.narrow if rows else out_features
        stored_in = columns.narrow if columns else in_features
        self.weight = nn.Parameter(torch.empty(stored_out, stored_in, **factory))  # values are the caller's
        self.bias = nn.Parameter(torch.empty(stored_out, **factory)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        if self.compact:
            return F.linear(input, self.weight, self.bias)
        if self.columns is not None:
            input = self.columns.cut(input)
        output = self._with_cores(F.linear(input, self.weight, self.bias))
        return output if self.rows is None else self.rows.pad(output)

    def make_compact(self) -> None:
        """Present the narrow heads as they are: for an attention module that has been told their width."""
        self.compact = True
        self.out_features, self.in_features = self.weight.shape

    def _with_cores(self, features: Tensor) -> Tensor:
        """(…, narrow out), multiplied by the cores."""
        if not self.cores:
            return features
        return self.rows.multiplied(features, {offset: getattr(self, name) for name, offset in self.cores.items()})

    def _composed(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that hold the cores."""
        if not self.cores:
            return self.weight, self.bias
        return self._with_cores(self.weight.mT).mT, None if self.bias is None else self._with_cores(self.bias)

    # -- ranks that change ----------------------------------------------------------------------------

    def stored_slice(self, side: HeadSlice) -> HeadSlice:
        """How heads that lie so at full width lie here."""
        padding = self.rows if side.axis == "out" else self.columns
        if padding is None:
            return replace(side, transposed=False)
        width = padding.ranks[padding.block(side.offset)]
        return replace(side, width=width, offset=padding.narrow_offset(side.offset), transposed=False)

    def is_narrow(self) -> bool:
        """Whether it differs from an ordinary layer: heads below their width, or with a core."""
        paddings = [padding for padding in (self.rows, self.columns) if padding is not None]
        return bool(self.cores) or any(padding.narrow < padding.wide for padding in paddings)

    @torch.no_grad()
    def resize(self, side: HeadSlice, rank: int) -> None:
        """Another rank for the heads that lie so at full width; other heads keep theirs, and all gradients go."""
        if side.axis == "in":
            old, self.columns = self.columns, self.columns.with_rank(side.offset, rank)
            _set(self.weight, old.stored_as(self.columns, self.weight))
            return
        old, self.rows = self.rows, self.rows.with_rank(side.offset, rank)
        _set(self.weight, old.stored_as(self.rows, self.weight.mT).mT)
        if self.bias is not None:
            _set(self.bias, old.stored_as(self.rows, self.bias))

    @torch.no_grad()
    def set_core(self, name: str, side: HeadSlice | None) -> None:
        """Give the heads of a side a core under this name, uninitialised, or (None) take it away."""
        if side is None:
            if self.cores.pop(name, None) is not None:
                delattr(self, name)
            return
        rank = self.rows.ranks[self.rows.block(side.offset)]
        core = self.weight.new_empty(side.size, rank, rank)
        if name in self.cores:
            _set(getattr(self, name), core)
        else:
            self.cores[name] = side.offset
            self.register_parameter(name, nn.Parameter(core))

    def merged(self) -> "HeadLinear":
        """A copy with the cores in its weight and bias."""
        merged = copy.copy(self)
        with torch.no_grad():
            composed = dict(zip(("weight", "bias"), self._composed(), strict=True))
        trains = any(parameter.requires_grad for parameter in self.parameters())
        vars(merged)["_parameters"] = {
            name: None if value is None else nn.Parameter(value.contiguous(), requires_grad=trains)
            for name, value in composed.items()
        }
        merged.cores = {}
        return merged

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
            weight, bias = self._composed()
            weight = _resize_weight(weight, self.rows, self.columns, "pad")
            bias = bias if bias is None or self.rows is None else self.rows.pad(bias)
        with torch.device("meta"):
            if self.dense_type is Conv1D:
                dense, weight = Conv1D(out_features, in_features), weight.mT
            else:
                dense = self.dense_type(in_features, out_features, bias is not None)
        dense.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        dense.bias = None if bias is None else nn.Parameter(bias.clone())
        taken_over(dense, self)
        if any(getattr(self, name).requires_grad for name in self.cores):  # beside bases that are frozen
            dense.requires_grad_(True)
        return dense


def _fitted(part: Tensor, size: int) -> Tensor:
    """(…, any) as (…, size), cut or with zeros."""
    return part[..., :size] if size < part.shape[-1] else F.pad(part, (0, size - part.shape[-1]))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Blocks (…, repeats, features) side by side, and periods in a row."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).flatten(-2)


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    """Other data, of any shape and in memory of its own, for the same parameter."""
    parameter.grad, parameter.data = None, value.clone(memory_format=torch.contiguous_format)


def _resize_weight(weight: Tensor, rows: HeadPadding | None, columns: HeadPadding | None, method: str) -> Tensor:
    if rows is not None:
        weight = getattr(rows, method)(weight.mT).mT
    return weight if columns is None else getattr(columns, method)(weight)
