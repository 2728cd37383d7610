"""Under which names ``save_pretrained`` writes the weights of a model that holds factors."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from .factorization import FactorLeaf

_CONVERSIONS = "_weight_conversions"  # of a PreTrainedModel: back to the names of the checkpoint that it came from


def save_under_own_names(model: nn.Module) -> None:
    """Where leaves hold factors, keep ``save_pretrained`` from going back to names of older checkpoints.

    Its conversions fuse, split and permute weights as if all had their full size. At full rank they are right.
    """
    if any(isinstance(module, FactorLeaf) for module in model.modules()):
        for module in _submodels(model):
            vars(module)[_CONVERSIONS] = []


def save_under_any_names(model: nn.Module) -> None:
    """Take back what ``save_under_own_names`` set."""
    for module in _submodels(model):
        if vars(module).get(_CONVERSIONS) == []:
            del vars(module)[_CONVERSIONS]


@contextmanager
def own_names(model: nn.Module) -> Iterator[None]:
    """Within, ``save_pretrained`` keeps the names of the model's own parameters, whatever checkpoint it came from."""
    submodels = _submodels(model)
    before = [vars(module).get(_CONVERSIONS) for module in submodels]
    for module in submodels:
        vars(module)[_CONVERSIONS] = []
    try:
        yield
    finally:
        for module, value in zip(submodels, before, strict=True):
            vars(module)[_CONVERSIONS] = value
            if value is None:
                del vars(module)[_CONVERSIONS]


def _submodels(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]
