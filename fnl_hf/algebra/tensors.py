"""What every form needs: the precision of sums, and batches that broadcast over groups of heads."""

from collections.abc import Collection

import torch
from torch import Tensor

SIDES = ("left", "right")


def accumulating(tensor: Tensor) -> Tensor:
    """float32 or better: a Gram accumulated in bfloat16 is wrong in the third digit."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def shared_axes(gram: Tensor, like: Tensor) -> list[int]:
    """The batch dimensions of a Gram along which ``like`` is shared (size 1); both end in two more dimensions."""
    sizes = zip(gram.shape[:-2], like.shape[:-2], strict=True)
    return [axis for axis, (size, of_like) in enumerate(sizes) if of_like == 1 < size]


def sum_to(gram: Tensor, like: Tensor) -> Tensor:
    """The sum of a Gram over the batch dimensions along which ``like`` is shared."""
    shared = shared_axes(gram, like)
    return gram.sum(shared, keepdim=True) if shared else gram


def stack_groups(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """(…, G, g, m, r) and (…, G, 1, r, n) as (…, G, g·m, r) and (…, G, r, n): one matrix per group.

    Raises:
        ValueError: The batches differ in another way, as where the left factor is the shared one.
    """
    of_left, of_right = left.shape[:-2], right.shape[:-2]
    if of_left == of_right:
        return left, right
    if not of_right or of_right != (*of_left[:-1], 1):
        raise ValueError(
            f"batches {tuple(of_left)} and {tuple(of_right)} of a product do not fit: heads of a group share the "
            "factor on the right, whose last batch dimension is then 1"
        )
    return left.flatten(-3, -2), right.squeeze(-3)


def check_sides(sides: Collection[str]) -> None:
    """Raise a ValueError where ``change_basis`` is asked for another side than "left" and "right"."""
    if isinstance(sides, str) or not set(sides) <= set(SIDES):
        raise ValueError(f"sides is {sides!r}, expected a selection of {SIDES}")
