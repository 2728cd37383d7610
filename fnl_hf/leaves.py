"""Ordinary layers: which of them another layer may stand for, and what that takes over from them."""

import copy
import inspect

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

HOOKS = [name for name in vars(nn.Module()) if "_hook" in name]
_LINEAR = {name for name in vars(nn.Linear(1, 1, device="meta")) if not name.startswith("_")}


def is_plain_linear(leaf: nn.Module | None) -> bool:
    """Whether a leaf is an ``nn.Linear`` or ``Conv1D``, or a subclass that only writes the same product differently.

    Falcon's is one: it is made by the same arguments and computes the same.
    """
    if type(leaf) in (nn.Linear, Conv1D):
        return True
    if not isinstance(leaf, nn.Linear) or leaf.weight.shape != (leaf.out_features, leaf.in_features):
        return False
    if list(inspect.signature(type(leaf)).parameters) != list(inspect.signature(nn.Linear).parameters):
        return False  # what else it was made from would be lost
    if (
        leaf._buffers
        or {name for name in vars(leaf) if not name.startswith("_")} != _LINEAR
        or len(list(leaf.parameters())) > 2
    ):
        return False  # it has state of its own
    if leaf.weight.is_meta:
        return True
    x = torch.linspace(-1, 1, 3 * leaf.in_features, dtype=leaf.weight.dtype, device=leaf.weight.device).view(3, -1)
    with torch.no_grad():
        return torch.allclose(leaf(x), F.linear(x, leaf.weight, leaf.bias), rtol=1e-3, atol=1e-5)


def taken_over(new: nn.Module, old: nn.Module) -> nn.Module:
    """``new`` with mode, frozen state, hooks and "do not re-initialise" of the leaf that it takes the place of."""
    for name in HOOKS:
        setattr(new, name, getattr(old, name))  # the same dict, so that the handles of the hooks still remove them
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(getattr(old, name).requires_grad)
    new._is_hf_initialized = True
    return new.train(old.training)


def shell(leaf: nn.Module) -> nn.Module:
    """A copy of a leaf without its parameters: its class and all that its user set on it."""
    empty = copy.copy(leaf)
    vars(empty)["_parameters"] = {}
    return empty
