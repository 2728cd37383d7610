"""Heads that are really narrower: what an attention module must be told so that it computes the same with them."""

import copy
import re
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from ..proof import Recording
from .slices import HeadSlice

TOLERANCE = 1e-6  # of the outputs' norm, between padded and compact heads


def compact_attributes(
    recording: Recording,
    name: str,
    owner: str,
    heads: HeadSlice,
    rank: int,
    narrow: Callable[[nn.Module, dict[str, int] | None], None],
) -> dict[str, int] | None:
    """Attributes of an attention module with which really narrower heads give what padded ones give, or None.

    The width of a head stands under several names, and some classes compute their scale from it: what is tried
    counts only if the replayed outputs agree.

    Args:
        name: of the executed module that is replayed.
        owner: of the attention module, below that.
        heads: how they lie at full width.
        rank: what they get.
        narrow: (a copy of the replayed module, attributes) -> narrows its heads; padded if there are no attributes.
    """
    try:
        dense = recording.copied(name)
        padded = copy.deepcopy(dense)
        narrow(padded, None)
        reference = recording.replay(name, padded)
        for attributes in narrow_attributes(dense.get_submodule(owner), heads, rank):
            module = copy.deepcopy(dense)
            narrow(module, attributes)
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
