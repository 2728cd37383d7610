"""Another vocabulary for embeddings and heads that are made of factors.

``resize_token_embeddings`` writes a new table into ``embedding.weight``, which here is a product. So it gets to see the
ordinary layer, and what it makes of that goes back into U: rows that there were stay bit for bit, new ones become what
the right factor can make of them.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from ..factorization import when_declared
from .layer import FactorizedLayer


@when_declared
def _resize_factors() -> None:
    """From the first declaration of a process on."""
    for name in ("_get_resized_embeddings", "_get_resized_lm_head"):
        setattr(PreTrainedModel, name, _resizing(getattr(PreTrainedModel, name)))


def _resizing(method: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(method)
    def resized(self, layer: nn.Module, *args, **kwargs) -> nn.Module:
        if not isinstance(layer, FactorizedLayer):
            return method(self, layer, *args, **kwargs)
        dense = layer.dense()
        new = method(self, dense, *args, **kwargs)
        _take_rows(layer, new)
        return layer

    return resized


@torch.no_grad()
def _take_rows(layer: FactorizedLayer, new: nn.Module) -> None:
    """Give a layer the rows of an ordinary one of the same kind, its bias and its numbers of them."""
    left, weight = layer.left, new.weight
    rows, there = weight.shape[0], left.shape[0]
    if rows != there:
        right = layer.right if layer.middle is None else layer.right @ layer.middle.mT  # (n, rank)
        added = weight[there:].double() @ torch.linalg.pinv(right.double().mT)  # (new rows, rank)
        stacked = torch.cat([left[:rows], added.to(left.dtype)])
        parameter = layer.stored("weight")
        parameter.data = stacked.view(rows, *parameter.shape[1:]).clone()  # of all layers that it is tied to
    if getattr(new, "bias", None) is not None:
        layer.bias = new.bias
    for name in ("num_embeddings", "padding_idx", "out_features"):
        if name in vars(new):
            setattr(layer, name, getattr(new, name))
