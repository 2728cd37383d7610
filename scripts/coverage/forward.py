"""Running a model, and the numbers in what it returns."""

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def outputs(model: nn.Module, inputs: Mapping[str, Any], seed: int = 0) -> list[Tensor]:
    """All floating-point tensors of the model's output, the same at every call."""
    names = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in names and "use_cache" not in inputs else {}
    torch.manual_seed(seed)
    return list(tensors(model(**copy.deepcopy(inputs), **extra)))


def tensors(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in a model's output; caches and other objects are passed over."""
    if torch.is_tensor(value):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))
