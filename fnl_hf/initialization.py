"""Named initialisations of a product: (left, right, rank) -> (left, right).

left is (*batch, m, r), right (*batch, r, n), biases already appended as one more row or column; the result has ``rank``
in place of r. An initialisation is one function of factors; a new one is one more entry here.
"""

import torch
from torch import Tensor

from .algebra import chain
from .factorization import Factorization


def spectral(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors of the best approximation of rank ``rank``: the same product at full rank (METHODS 1.1)."""
    return chain.balance((left, right), rank)


def default(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors that the model has; at lower rank the leading ones of each head."""
    return left[..., :rank], right[..., :rank, :]


INITIALIZATIONS = {"spectral": spectral, "default": default}


@torch.no_grad()
def initial_factors(product: Factorization, rank: int, init: str) -> tuple[Tensor, Tensor]:
    """New factors of a product of two, biases appended: (*batch, m [+ 1], rank), (*batch, rank, n [+ 1]).

    A group of query heads is stacked over its shared key or value, so that the best shared basis comes out.
    """
    left, right = product.tensors()
    left_bias, right_bias = product.biases
    if left_bias is not None:
        left = torch.cat([left, left_bias()[..., None, :]], dim=-2)
    if right_bias is not None:
        right = torch.cat([right, right_bias()[..., :, None]], dim=-1)
    return INITIALIZATIONS[init](*chain.stack_groups(left, right), rank)


@torch.no_grad()
def write_factors(product: Factorization, left: Tensor, right: Tensor) -> None:
    """Write what ``initial_factors`` returned into the parameters of a product of that rank."""
    left_view, right_view = product.tensors()
    left_bias, right_bias = product.biases
    left = left.reshape(*left_view.shape[:-2], -1, left_view.shape[-1])
    right = right.reshape(*right_view.shape[:-1], -1)
    left_view.copy_(left[..., : left_view.shape[-2], :])
    right_view.copy_(right[..., : right_view.shape[-1]])
    if left_bias is not None:
        left_bias().copy_(left[..., -1, :])
    if right_bias is not None:
        right_bias().copy_(right[..., -1])
