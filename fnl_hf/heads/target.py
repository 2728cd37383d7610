"""`HeadTarget`: a head product in a plan, from its place in the dense model to the narrow leaves that it may get."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

from torch import nn

from ..config import FNLConfig
from ..factorization import Factorization, swap
from ..leaves import is_plain_linear
from ..plan import Activation, Renaming, Skip, Target
from ..proof import Evidence
from ..replay import Stage
from ..trial import Trial
from .compact import compact_attributes, narrows_as_expected
from .leaf import HeadLinear, HeadPadding
from .product import HeadProduct
from .slices import HeadSlice, RotaryLayout

KEPT = (
    "a narrower basis does not commute with a rotation, and only the heads of nn.Linear and Conv1D can be narrowed, "
    "where the module reads them through these layers"
)


@dataclass(frozen=True)
class HeadTarget(Target):
    """A product of an attention module's heads.

    Attributes:
        left, right: how the heads lie in the weights of both projections at full width; the parameters are named
            below ``owner``, the module that will hold the declaration.
        rotary: which features of queries and keys are rotated.
        compact: attributes of the owner under really narrower heads; None: they are padded to their old width.
        deep: every head has a core between its factors, as heads have whose rank adapts.
    """

    family: ClassVar[str] = "heads"

    left: HeadSlice
    right: HeadSlice
    rotary: RotaryLayout | None = None
    compact: dict[str, int] | None = None
    deep: bool = False

    @property
    def owner(self) -> str:
        """Name of the common ancestor of both projections, which holds the declaration."""
        return self.name.rpartition(".")[0]

    @property
    def slot(self) -> str:
        """Name of the declaration in its owner: "qk" for both forms of it."""
        return self.name.rpartition(".")[2]

    @property
    def sides(self) -> tuple[HeadSlice, HeadSlice]:
        return self.left, self.right

    def leaf(self, side: HeadSlice) -> str:
        """Name in the model of the module that holds a side's weight."""
        return self._full(side.weight).rpartition(".")[0]

    def _full(self, path: str) -> str:
        return f"{self.owner}.{path}" if self.owner else path

    # -- what every target answers --------------------------------------------------------------------

    def found(self, model: nn.Module) -> Factorization:
        """The product at full width."""
        declaration = HeadProduct(self.kind, self.left, self.right, self.left.width, self.rotary)
        return declaration.factorization(self.name, model.get_submodule(self.owner))

    def parameters(self) -> tuple[str, ...]:
        """The weights of both projections, and their biases where they have any."""
        paths = [side.weight for side in self.sides] + [side.bias for side in self.sides if side.bias]
        return tuple(map(self._full, paths))

    def inputs(self) -> tuple[Activation | None, Activation | None]:
        """The features of each head: what q and k put out, what the output projection takes.

        A value projection has None: what multiplies a head's values is known only once attention has averaged it.
        """

        def activation(side: HeadSlice, end: str) -> Activation | None:
            own = side.weight.rpartition(".")[0] and side.bias_width is None  # else no module puts it out as it is
            return Activation(self.leaf(side), end, side.read_activations) if own else None

        if self.slot == "ov":
            return activation(self.left, "input"), None
        queries, keys = activation(self.left, "output"), activation(self.right, "output")
        return (queries, keys) if queries and keys else (None, None)

    def output(self) -> Activation | None:
        """The queries, or what the output projection puts out."""
        if self.slot == "qk":
            return self.inputs()[0]
        own = self.left.weight.rpartition(".")[0]
        return Activation(self.leaf(self.left), "output", lambda x: x[None]) if own else None

    def renamed(self, rename: Renaming) -> "HeadTarget | None":
        """The product under the names that its weights get in a model, below their nearest common ancestor."""
        names = {path: rename(self._full(path)) for side in self.sides for path in (side.weight, side.bias) if path}
        if None in names.values():
            return None
        # The owner is no leaf: what ends in "leaf.weight" is at least two steps below it.
        parents = [names[side.weight].split(".")[: -min(2, len(side.weight.split(".")))] for side in self.sides]
        owner = ".".join(os.path.commonprefix(parents))
        local = {path: name[len(owner) + 1 :] if owner else name for path, name in names.items()}
        left, right = (
            replace(side, weight=local[side.weight], bias=side.bias and local[side.bias]) for side in self.sides
        )
        return replace(self, name=f"{owner}.{self.slot}" if owner else self.slot, left=left, right=right)

    def flaw(self, model: nn.Module | None = None) -> str | None:
        """What is wrong with a product as it was read; with a model, why its heads do not lie there."""
        from .checks import flaw, misfit  # which knows the finder, and that knows this class

        return flaw(self) if model is None else misfit(self, model)

    @classmethod
    def from_dict(cls, data: dict) -> "HeadTarget":
        """Inverse of ``to_dict``; entries of format 1 give their owner, and no name."""
        data = dict(data)
        if "owner" in data:
            owner, slot = data.pop("owner"), data["kind"].removeprefix("rotary-")
            data["name"] = ".".join([owner, slot] if owner else [slot])
        sides = {side: HeadSlice.from_dict(data[side]) for side in ("left", "right")}
        rotary = None if data.get("rotary") is None else RotaryLayout(**data["rotary"])
        return cls(**{**data, **sides, "rotary": rotary})

    # -- ranks and layouts ----------------------------------------------------------------------------

    @classmethod
    def settle(
        cls, model: nn.Module, config: FNLConfig, targets: Sequence["HeadTarget"], evidence: Evidence
    ) -> list["HeadTarget"]:
        """The products that can be narrower get the rank that was asked for; in a compact layout where that is proven.

        Raises:
            ValueError: A rank is above the width of its heads; a lower one is asked for and nothing can have it.
        """
        settled, kept = [], []
        for target in targets:
            if target.rank > target.left.width:
                raise ValueError(
                    f"{target.name}: head rank {target.rank} is above its head_dim {target.left.width}; give at most "
                    f"{target.left.width}"
                )
            if target.rank < target.left.width and not target._narrows(model, evidence):
                kept.append(target.kind)
                target = replace(target, rank=target.left.width)
            settled.append(target)
        if kept and len(kept) == len(settled):
            asked = " with a rank_pattern" if config.rank_pattern else ""
            raise ValueError(
                f"head_rank is {config.head_rank}{asked}, but every product found ({', '.join(sorted(set(kept)))}) "
                f"keeps its full rank: {KEPT}; leave head_rank at 1.0"
            )
        return _compacted(model, settled, evidence) if config.head_layout == "compact" else settled

    def is_reducible(self, model: nn.Module, evidence: Evidence) -> bool:
        """Whether heads of half the width are proven."""
        width = self.left.width
        return width > 1 and replace(self, rank=width // 2)._narrows(model, evidence)

    def _narrows(self, model: nn.Module, evidence: Evidence) -> bool:
        """Whether the heads of a product can have a lower rank: not under rotation, in ordinary leaves, as proven."""
        leaves = (_submodule(model, self.leaf(side)) for side in self.sides)
        if self.rotary is not None or not all(map(is_plain_linear, leaves)):
            return False

        def answer(stage: Stage) -> tuple[bool | None, str]:
            return narrows_as_expected(stage, lambda root: self.install(root, [replace(self, compact=None)]))

        question = ("narrow", self.slot, self.kind, self.rank)
        answers = evidence.tried(self.owner, self.found(model), question, answer)
        return next((narrows for narrows, _ in answers if narrows is not None), False)

    @classmethod
    def quicken(cls, model: nn.Module, targets: Sequence["HeadTarget"], trial: Trial) -> list[Skip]:
        from .inference import quickened  # which knows this class

        return quickened(model, targets, trial)

    @classmethod
    def notes(cls, config: FNLConfig, products: Sequence[Factorization]) -> list[str]:
        """Which products keep their full rank, and which are not compact, though the config asks for both."""
        full = [p.kind for p in products if p.size()[1] == p.full_rank and p.layout != "deep"]
        notes = []
        if full and (isinstance(config.head_rank, int) or config.head_rank < 1):  # 1 is rank one
            notes = [f"{len(full)} products keep their full rank ({', '.join(sorted(set(full)))}): {KEPT}"]
        if config.head_layout == "compact":
            padded = sum(product.layout == "padded" for product in products)
            why = ": not proven equal at a smaller width, or of full rank" if padded else ""
            notes.append(f"{len(products) - padded} products are compact, {padded} padded{why}")
        return notes

    # -- putting them in place ------------------------------------------------------------------------

    @classmethod
    def install(cls, model: nn.Module, targets: Sequence["HeadTarget"]) -> None:
        """Declare products, and give projections that lose rank their narrow leaves.

        All new leaves are built before the first one is put in, so that a failure leaves the model as it was.

        Raises:
            ValueError: Products overlap in a leaf that gets narrower, or only one of an attention's two is compact.
        """
        _check_compact_pairs(targets)
        paddings = _paddings(model, targets)
        narrow: dict[nn.Module, HeadLinear] = {}
        tied: dict[tuple, HeadLinear] = {}
        for name, (rows, columns) in paddings.items():
            leaf = model.get_submodule(name)
            narrow[leaf] = HeadLinear.narrowed(leaf, rows, columns)
            first = tied.setdefault((id(leaf.weight), id(leaf.bias), rows, columns), narrow[leaf])
            narrow[leaf].weight, narrow[leaf].bias = first.weight, first.bias
        swap(model, narrow)
        for target in targets:
            owner = model.get_submodule(target.owner)
            for side in target.sides:
                if side.bias and side.bias_width:  # added after padding: nothing may stand beyond the rank
                    bias = owner.get_parameter(side.bias).data.unflatten(0, (*side.batch, side.bias_width))
                    bias[..., target.rank :].zero_()
            replaced = None
            if target.compact is not None:
                for side in target.sides:
                    model.get_submodule(target.leaf(side)).make_compact()
                replaced = {name: getattr(owner, name) for name in target.compact}
                for name, value in target.compact.items():
                    setattr(owner, name, value)
            width, rank, deep = target.left.width, target.rank, target.deep
            declaration = HeadProduct(target.kind, *target.sides, width, target.rotary, replaced, rank, deep)
            owner.add_module(target.slot, declaration)
            if deep:
                declaration.leaf(owner, target.right).set_core(declaration.core, target.right)


def _compacted(model: nn.Module, targets: list[HeadTarget], evidence: Evidence) -> list[HeadTarget]:
    """With really narrower heads in the attention modules where both products agree and a replay proves them."""
    compact: dict[str, HeadTarget] = {}
    for qk in (target for target in targets if target.slot == "qk"):
        pairs = (target for target in targets if target.slot == "ov" and _in_one_attention(target, qk))
        if (ov := next(pairs, None)) is None or not qk.rank == ov.rank < qk.left.width == ov.left.width:
            continue
        attributes = _attributes(model, qk, ov, evidence)
        if attributes is not None:
            compact |= {qk.name: replace(qk, compact=attributes), ov.name: replace(ov, compact={})}
    return [compact.get(target.name, target) for target in targets]


def _attributes(model: nn.Module, qk: HeadTarget, ov: HeadTarget, evidence: Evidence) -> dict[str, int] | None:
    """What ``qk.owner`` must be told about really narrower heads; None where they are not proven."""

    def narrow(root: nn.Module, attributes: dict[str, int] | None) -> None:
        compact = (None, None) if attributes is None else (attributes, {})
        HeadTarget.install(root, [replace(t, compact=told) for t, told in zip((qk, ov), compact, strict=True)])

    def answer(stage: Stage) -> tuple[dict[str, int] | None, str]:
        return compact_attributes(stage, qk.owner, qk.left, qk.rank, narrow)

    answers = evidence.tried(ov.owner, qk.found(model), ("compact", qk.owner.rpartition(".")[2], qk.rank), answer)
    return next((attributes for attributes, _ in answers if attributes is not None), None)


def _paddings(model, targets) -> dict[str, tuple[HeadPadding | None, HeadPadding | None]]:
    """leaf name -> (rows, columns) paddings, for the leaves that hold a product of reduced rank, or a deep one."""
    sides, narrow = defaultdict(list), set()
    for target in targets:
        for side in target.sides:
            sides[target.leaf(side), side.axis].append((side, target.rank))
            if target.rank < side.width or target.deep:
                narrow.add((target.leaf(side), side.axis))
    paddings = defaultdict(lambda: (None, None))
    for (name, axis), slices in sides.items():
        if (name, axis) not in narrow:
            continue
        if _overlap([side for side, _ in slices]):
            raise ValueError(f"{name} cannot be narrower: two products overlap in its features")
        weight = model.get_submodule(name).weight
        out_axis = 1 if slices[0][0].transposed else 0
        padding = _padding(weight.shape[out_axis if axis == "out" else 1 - out_axis], slices)
        rows, columns = paddings[name]
        paddings[name] = (padding, columns) if axis == "out" else (rows, padding)
    return dict(paddings)


def _overlap(sides: list[HeadSlice]) -> bool:
    """Whether heads in one weight's split features have entries in common, or are laid out in different ways."""
    places = sorted((side.offset, side.offset + side.size // side.repeats * side.width) for side in sides)
    alike = len({(side.repeats, side.transposed) for side in sides}) == 1
    return not alike or any(end > start for (_, end), (start, _) in pairwise(places))


def _check_compact_pairs(targets: Sequence[HeadTarget]) -> None:
    """Queries, keys and values of an attention module are compact together, or not at all."""
    compact = [target for target in targets if target.compact is not None]
    for target in compact:
        partners = (t for t in compact if t.slot != target.slot and t.rank == target.rank)
        if not any(_in_one_attention(*sorted((target, t), key=lambda t: t.slot)) for t in partners):
            raise ValueError(f"{target.name} is compact, and the other product of its attention is not")


def _in_one_attention(ov: HeadTarget, qk: HeadTarget) -> bool:
    """Whether the values of one are projected inside the owner of the other."""
    return ov.parameters()[1].startswith(f"{qk.owner}." if qk.owner else "")


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


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # a parameter of the attention module itself, such as in_proj_weight
        return None
