"""What is wrong with a product of heads as it was read from config.json, by itself and in a model.

A plan is a file: cut off, edited, or written by someone else. What passes here installs without an error and does not
change the function of the model that was saved.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import ATTENTION_KINDS
from .compact import narrow_attributes
from .find import options_at
from .slices import RotaryLayout
from .target import HeadTarget

KINDS = (*ATTENTION_KINDS, "rotary-qk")


def flaw(target: HeadTarget) -> str | None:
    """What makes no sense in a product, whatever the model is."""
    if not isinstance(target.name, str) or not target.name.isprintable():
        return f"name is {target.name!r}, expected a string of one line"
    if target.kind not in KINDS:
        return f"kind is {target.kind!r}, expected one of {KINDS}"
    if target.slot != target.kind.rpartition("-")[2]:
        return f"kind is {target.kind!r}, and a product of that kind is not called {target.slot!r}"
    if (target.kind == "rotary-qk") != isinstance(target.rotary, RotaryLayout):
        return f"kind is {target.kind!r}, rotary is {target.rotary!r}"
    for side, axis in zip(target.sides, ("in" if target.slot == "ov" else "out", "out"), strict=True):
        if wrong := side.flaw(axis):
            return f"{side} makes no sense: {wrong}"
    if target.left.width != target.right.width:
        return f"its heads are {target.left.width} and {target.right.width} wide"
    if target.rotary and (wrong := target.rotary.flaw(target.left.width)):
        return f"{target.rotary} makes no sense: {wrong}"
    if type(target.rank) is not int or not 1 <= target.rank <= target.left.width:
        return f"rank is {target.rank!r}, expected an int in 1..{target.left.width}"
    if target.rotary and target.rank < target.left.width:
        return f"rank is {target.rank}, and rotary heads keep their full rank, {target.left.width}"
    return _compact_flaw(target) or _deep_flaw(target)


def _compact_flaw(target: HeadTarget) -> str | None:
    told = target.compact
    if told is None:
        return None
    if not isinstance(told, dict) or not all(type(size) is int and size > 0 for size in told.values()):
        return f"compact is {told!r}, expected whole numbers"
    if target.rotary or target.rank == target.left.width or (told and target.slot == "ov"):
        return f"compact is {told!r}, and a product of the kind {target.kind!r} and rank {target.rank} has none"
    return None


def _deep_flaw(target: HeadTarget) -> str | None:
    if type(target.deep) is not bool:
        return f"deep is {target.deep!r}, expected true or false"
    own_bias = any(side.bias_width is not None for side in target.sides)
    if target.deep and (target.rotary or target.compact is not None or own_bias):
        return "deep is true, expected only of heads that are neither rotated nor compact, in layers with their biases"
    return None


def misfit(target: HeadTarget, model: nn.Module) -> str | None:
    """What a model lacks that a sound product needs: both weights, with features for its heads.

    Where structure sees attention, the heads lie as it sees them: in that number, and in that order in a fused weight.
    A module in which it sees none may still have been proven when the plan was made. Nothing is searched for: only the
    modules that the product names are looked at.
    """
    for side in target.sides:
        lacks = f"has no {_path(target, side.weight)} whose features are split like that"
        try:
            weight = model.get_parameter(_path(target, side.weight))
            bias = model.get_parameter(_path(target, side.bias)) if side.bias else None
        except AttributeError:
            return lacks
        leaf = _module(model, target.leaf(side))
        if weight.dim() < 2 or side.transposed != isinstance(leaf, Conv1D):
            return lacks
        features = weight.shape[(side.axis == "in") != side.transposed]
        end = side.offset + side.size // side.repeats * side.width
        if features % side.repeats or end > features // side.repeats:
            return lacks
        entries = features if side.bias_width is None else side.size * side.bias_width
        if bias is not None and bias.shape != (entries,):
            return f"{lacks}, with the bias {_path(target, side.bias)}"
        if (target.rank < side.width or target.deep) and not isinstance(leaf, (nn.Linear, Conv1D)):
            return f"{lacks}, in a layer that can be narrower"
    known = [seen for seen in _seen(target, model) if set(seen.parameters()) & set(target.parameters())]
    if known and _place(target) not in map(_place, known):
        weights = " and ".join(target.parameters()[:2])
        return f"has no {weights} whose features are split like that"
    if target.compact is not None and target.slot == "qk":
        owner = _module(model, target.owner)
        if target.compact not in list(narrow_attributes(owner, target.left, target.rank)):
            names = " and ".join(target.compact) or "nothing"
            return f"{lacks}, below a module that would be told of narrower heads by {names}"
    return None


def _seen(target: HeadTarget, model: nn.Module) -> Iterator[HeadTarget]:
    """What structure sees in the modules around the inner projection, of queries or of values."""
    inner = target.leaf(target.right if target.slot == "ov" else target.left).split(".")
    for end in range(len(inner), -1, -1):
        yield from options_at(model, ".".join(inner[:end]))


def _place(target: HeadTarget) -> tuple:
    """Which entries of which parameters it is made of, whatever module declares it."""
    sides = (replace(side, weight="", bias=None) for side in target.sides)
    return target.slot, target.parameters(), *sides


def _path(target: HeadTarget, below: str) -> str:
    return f"{target.owner}.{below}" if target.owner else below


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
