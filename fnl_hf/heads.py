"""Leaves whose heads hold fewer features than the rest of the model sees.

Hugging Face reshapes q, k and v with one ``head_dim`` and computes the scale from it, so a head of rank r keeps its
old width outside: the rows of q, k, v write zeros beyond r, the columns of o read the first r of each head. Scale,
caches and attention kernels stay as they are (no class has to know). Where a module is proven to compute the same with
heads that are really narrower, they may be (``make_compact``).
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.pytorch_utils import Conv1D

from .factorization import HeadProduct, HeadSlice, RotaryLayout


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


class HeadLinear(nn.Linear):
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
        self.weight = nn.Parameter(torch.empty(stored_out, stored_in, **factory))
        self.bias = nn.Parameter(torch.empty(stored_out, **factory)) if bias else None
        self.reset_parameters()

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
        return _like(narrow, leaf)

    def widened(self) -> nn.Module:
        """The ``nn.Linear`` or ``Conv1D`` of the same function: zeros beyond each head's rank."""
        out_features = self.rows.wide if self.rows else self.weight.shape[0]
        in_features = self.columns.wide if self.columns else self.weight.shape[1]
        dense = nn.Linear(
            in_features, out_features, self.bias is not None, dtype=self.weight.dtype, device=self.weight.device
        )
        with torch.no_grad():
            dense.weight.copy_(_resize_weight(self.weight, self.rows, self.columns, "pad"))
            if self.bias is not None:
                dense.bias.copy_(self.bias if self.rows is None else self.rows.pad(self.bias))
        if self.dense_type is Conv1D:
            conv = Conv1D(out_features, in_features)
            conv.weight, conv.bias = nn.Parameter(dense.weight.detach().mT.contiguous()), dense.bias
            dense = conv
        dense.__class__ = self.dense_type  # a subclass that computes the same, see planning
        return _like(dense, self)


def _refuse_merge(*args, **kwargs):
    raise ValueError(
        "an adapter cannot be merged into a factor of reduced rank, which has no room for it: call "
        "fnl_hf.to_dense(model) first, or keep the adapter unmerged"
    )


def _guard_merge(wrapper: nn.Module, name: str, leaf: nn.Module) -> None:
    """PEFT merges by writing into ``base_layer.weight``; a wrapper of a padded leaf gets a merge that says why not.

    An adapter of a compact leaf is as narrow as the leaf, and merges like any other.
    """
    if name == "base_layer" and isinstance(leaf, HeadLinear) and not leaf.compact:
        wrapper.merge = _refuse_merge
    elif name == "base_layer" and vars(wrapper).get("merge") is _refuse_merge:
        del wrapper.merge  # `to_dense` put the wide leaf in its place
        wrapper.fan_in_fan_out = isinstance(leaf, Conv1D)  # how PEFT lays out what it merges


register_module_module_registration_hook(_guard_merge)


@dataclass(frozen=True)
class Product:
    """A head product as planned: where it is declared, its projections at full width, and the rank it gets.

    This is what config.json stores, so that loading never searches.
    """

    owner: str
    kind: str
    left: HeadSlice
    right: HeadSlice
    rank: int
    rotary: RotaryLayout | None = None
    compact: dict[str, int] | None = None  # attributes of the owner under really narrower heads; None: padded

    @property
    def slot(self) -> str:
        """Name of the declaration in its owner: "qk" for both forms of it."""
        return self.kind.removeprefix("rotary-")

    @property
    def name(self) -> str:
        """Name of the declaration in the model."""
        return f"{self.owner}.{self.slot}" if self.owner else self.slot

    def leaf(self, side: HeadSlice) -> str:
        """Name in the model of the module that holds a side's weight."""
        path = side.weight.rpartition(".")[0]
        return f"{self.owner}.{path}" if self.owner and path else self.owner or path

    def to_dict(self) -> dict:
        """JSON-ready data, which ``from_dict`` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "Product":
        """Inverse of ``to_dict``."""
        sides = {side: HeadSlice(**{**data[side], "heads": tuple(data[side]["heads"])}) for side in ("left", "right")}
        rotary = data.get("rotary") and RotaryLayout(**data["rotary"])
        return cls(**{**data, **sides, "rotary": rotary})


def install(model: nn.Module, products: Iterable[Product]) -> None:
    """Declare products in a model, in place, and give projections that lose rank their narrow leaves.

    All new leaves are built before the first one is put in, so that a failure leaves the model as it was.
    """
    products = list(products)
    paddings = _paddings(model, products)
    narrow = {}
    for name, (rows, columns) in paddings.items():
        leaf = model.get_submodule(name)
        narrow[leaf] = HeadLinear.narrowed(leaf, rows, columns)
    swap(model, narrow)
    for product in products:
        left, right = (_narrow_slice(product, side, paddings) for side in (product.left, product.right))
        declaration = HeadProduct(product.kind, left, right, product.left.width, product.rotary)
        owner = model.get_submodule(product.owner)
        owner.add_module(product.slot, declaration)
        for side in (left, right):
            if side.bias and side.bias_width:  # added after padding: nothing may stand beyond the rank
                bias = owner.get_parameter(side.bias).data.unflatten(0, (*side.batch, side.bias_width))
                bias[..., side.width :].zero_()
        if product.compact is not None:
            _make_compact(model, product, owner, declaration)


def _make_compact(model: nn.Module, product: Product, owner: nn.Module, declaration: HeadProduct) -> None:
    for side in (product.left, product.right):
        model.get_submodule(product.leaf(side)).make_compact()
    for name, value in product.compact.items():
        declaration.wide[name] = getattr(owner, name)
        setattr(owner, name, value)


def swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put each replacement wherever its original stands in the model: a shared leaf stays shared."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in replacements:
                setattr(parent, name, replacements[child])


def _paddings(model, products) -> dict[str, tuple[HeadPadding | None, HeadPadding | None]]:
    """leaf name -> (rows, columns) paddings, for the leaves that hold a product of reduced rank."""
    sides = defaultdict(list)
    for product in products:
        for side in (product.left, product.right):
            sides[product.leaf(side), side.axis].append((side, product.rank))
    paddings = defaultdict(lambda: (None, None))
    for (name, axis), slices in sides.items():
        if all(side.width == rank for side, rank in slices):
            continue
        weight = model.get_submodule(name).weight
        out_axis = 1 if slices[0][0].transposed else 0
        padding = _padding(weight.shape[out_axis if axis == "out" else 1 - out_axis], slices)
        rows, columns = paddings[name]
        paddings[name] = (padding, columns) if axis == "out" else (rows, padding)
    return dict(paddings)


def _padding(features: int, slices: list[tuple[HeadSlice, int]]) -> HeadPadding:
    """The blocks of one weight's split features; what no product reads stays as wide as it is."""
    repeats = slices[0][0].repeats
    blocks, end = [], 0
    for side, rank in sorted(slices, key=lambda item: item[0].offset):
        if side.offset > end:
            blocks.append((1, side.offset - end, side.offset - end))
        heads = side.size // repeats
        blocks.append((heads, side.width, rank))
        end = side.offset + heads * side.width
    if features // repeats > end:
        blocks.append((1, features // repeats - end, features // repeats - end))
    return HeadPadding(repeats, tuple(blocks))


def _narrow_slice(product: Product, side: HeadSlice, paddings) -> HeadSlice:
    """How a projection's heads are read once its leaf is narrow."""
    rows, columns = paddings.get(product.leaf(side), (None, None))
    padding = rows if side.axis == "out" else columns
    transposed = side.transposed and rows is None and columns is None
    if padding is None:
        return replace(side, transposed=transposed)
    return replace(side, width=product.rank, offset=padding.narrow_offset(side.offset), transposed=transposed)


def _resize_weight(weight: Tensor, rows: HeadPadding | None, columns: HeadPadding | None, method: str) -> Tensor:
    if rows is not None:
        weight = getattr(rows, method)(weight.mT).mT
    return weight if columns is None else getattr(columns, method)(weight)


def _like(new: nn.Module, old: nn.Module) -> nn.Module:
    """Mode, frozen state and "do not re-initialise" of the leaf that it takes the place of."""
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(getattr(old, name).requires_grad)
    new._is_hf_initialized = True
    return new.train(old.training)
