"""Heads that are narrower: proof that a module computes with them what it should, and what it must be told for that."""

import copy
import re
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..factorization import FactorLeaf, declared, swap
from ..replay import MOVED, UNREACHED, Stage
from .slices import HeadSlice

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # of the output's norm, between equal modules

Narrow = Callable[[nn.Module], None]  # narrows heads in the model that a stage holds


def narrows_as_expected(stage: Stage, narrow: Narrow) -> tuple[bool | None, str]:
    """Whether a module with narrow leaves gives what it gives with their ordinary layers; None if they do not matter.

    Some classes hand weights to a kernel, past the leaves that hold them.
    """
    root = copy.deepcopy(stage.root())
    narrow(root)
    narrowed = stage.run(_inner(root, stage))
    swap(root, {leaf: leaf.dense() for leaf in root.modules() if isinstance(leaf, FactorLeaf)})
    if not _agrees(narrowed, stage.run(_inner(root, stage))):
        return False, ""
    return (True, "") if _moved(narrowed, stage.output) else (None, UNREACHED)


def compact_attributes(
    stage: Stage,
    owner: str,
    heads: HeadSlice,
    rank: int,
    narrow: Callable[[nn.Module, dict[str, int] | None], None],
) -> tuple[dict[str, int] | None, str]:
    """Attributes of an attention module with which really narrower heads give what padded ones give, or None and why.

    The width of a head stands under several names, and some classes compute their scale from it: what is tried counts
    only if outputs agree, and if changing either side of each product alone moves them.

    Args:
        owner: the attention module's name.
        heads: how they lie at full width.
        rank: what they get.
        narrow: (a model, attributes) -> narrows its heads; padded if there are no attributes.
    """
    padded = copy.deepcopy(stage.root())
    narrow(padded, None)
    reference = stage.run(_inner(padded, stage))
    for attributes in narrow_attributes(stage.root().get_submodule(owner), heads, rank):
        root = copy.deepcopy(stage.root())
        narrow(root, attributes)
        try:
            agrees = _agrees(stage.run(_inner(root, stage)), reference)
        except (RuntimeError, ValueError):  # shapes that do not fit
            continue
        if agrees and _agrees_under_a_mask(stage, root, padded):
            return (attributes, "") if _matters(stage, root, reference) else (None, UNREACHED)
    return None, "no attribute says their width"


def _agrees_under_a_mask(stage: Stage, root: nn.Module, padded: nn.Module) -> bool:
    """Whether both give the same for a mask too, which some classes treat in code of its own with another scale."""
    name = next((name for name in ("attention_mask", "mask") if name in stage.names), None)
    if name is None or stage.call.kwargs.get(name) is not None:
        return True
    length = stage.output.shape[-2]
    masked = stage.with_arguments({name: torch.zeros(1, 1, length, length, dtype=stage.output.dtype)})
    try:
        reference = masked.run(_inner(padded, stage))
    except Exception:  # it takes no such mask
        return True
    return _agrees(masked.run(_inner(root, stage)), reference)


def _matters(stage: Stage, root: nn.Module, reference: torch.Tensor) -> bool:
    """The control: each side of each product of a narrowed module moves its output."""
    for product in declared(root):
        original = [factor.clone() for factor in product.augmented()]
        for sides in (("left",), ("right",)):
            product.write(product.form.change_basis(original, torch.Generator().manual_seed(0), sides))
            if not _moved(stage.run(_inner(root, stage)), reference):
                return False
            product.write(original)
    return True


def _inner(root: nn.Module, stage: Stage) -> nn.Module:
    return root.get_submodule(stage.name)


def _agrees(output: torch.Tensor, reference: torch.Tensor) -> bool:
    allowed = TOLERANCE[reference.dtype] * reference.norm()
    return output.shape == reference.shape and bool((output - reference).norm() <= allowed)


def _moved(output: torch.Tensor, reference: torch.Tensor) -> bool:
    return bool((output - reference).norm() > MOVED * reference.norm())


def narrow_attributes(module: nn.Module, heads: HeadSlice, rank: int) -> Iterator[dict[str, int]]:
    """Attribute values of an attention module that may say its narrower heads, the fewest first.

    What is called a width and has the value of one is always told: without it, a module would read two narrow heads as
    a wide one, and a stored plan that lost an attribute could not be told from a sound one.
    """
    width, count = heads.width, heads.size
    numbers = {name: value for name, value in vars(module).items() if type(value) is int}
    of_head = {name: rank for name, value in numbers.items() if value == width and re.search("dim|size|d_kv", name)}
    of_all = {name: count * rank for name, value in numbers.items() if value == width * count}
    usual = {name: value for name, value in of_all.items() if name in ("all_head_size", "inner_dim", "split_size")}
    yield from (of_head, of_head | usual, of_head | of_all)
