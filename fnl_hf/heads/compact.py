"""Heads that are really narrower: what an attention module must be told so that it computes the same with them."""

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..proof import Recording

if TYPE_CHECKING:
    from .target import HeadTarget

TOLERANCE = 1e-6  # of the outputs' norm, between padded and compact heads


def compact_attributes(recording: Recording, qk: "HeadTarget", ov: "HeadTarget") -> dict[str, int] | None:
    """Attributes of ``qk.owner`` with which really narrower heads give what padded ones give, or None.

    The width of a head stands under several names, and some classes compute their scale from it: what is tried
    counts only if the replayed outputs agree.
    """
    name = recording.executed_above(ov.owner)
    if name is None:
        return None
    install = type(qk).install
    try:
        padded = recording.copied(name)
        qk, ov = (replace(target, name=target.name.removeprefix(name).removeprefix(".")) for target in (qk, ov))
        dense = copy.deepcopy(padded)
        install(padded, [qk, ov])
        reference = recording.replay(name, padded)
        for attributes in _narrow_attributes(dense.get_submodule(qk.owner), qk):
            module = copy.deepcopy(dense)
            install(module, [replace(qk, compact=attributes), replace(ov, compact={})])
            if _agrees(recording, name, module, reference):
                return attributes
    except Exception:  # any user model may stand here, and padded heads are always right
        return None
    return None


def _agrees(recording: Recording, name: str, module: nn.Module, reference: Tensor) -> bool:
    try:
        output = recording.replay(name, module)
    except (RuntimeError, ValueError):  # shapes that do not fit
        return False
    same_shape = output.shape == reference.shape
    return same_shape and bool((output - reference).norm() <= TOLERANCE * reference.norm())


def _narrow_attributes(module: nn.Module, target: "HeadTarget") -> Iterator[dict[str, int]]:
    """Attribute values of an attention module that may say its narrower heads, the fewest first."""
    width, heads, rank = target.left.width, target.left.size, target.rank
    numbers = {name: value for name, value in vars(module).items() if type(value) is int}
    of_head = {name: rank for name, value in numbers.items() if value == width and re.search("dim|size|d_kv", name)}
    of_all = {name: heads * rank for name, value in numbers.items() if value == width * heads}
    usual = {name: value for name, value in of_all.items() if name in ("all_head_size", "inner_dim", "split_size")}
    yield from ({}, of_head, of_head | usual, of_head | of_all)
