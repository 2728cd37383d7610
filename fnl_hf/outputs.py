"""What a model puts out in a forward that leaves nothing changed behind, and how two outputs differ."""

import copy
import dataclasses
import inspect
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Every floating-point tensor that a model returns, in evaluation mode; modes and random state come back.

    It is given copies of the inputs: SAM 3, for one, writes into the lists that it gets.
    """
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    inputs = ({"use_cache": False} if takes_cache else {}) | {name: copied(inputs[name], None) for name in inputs}
    with as_it_was(model), evaluating(model), same_draws(model):
        return list(tensors_in(model(**inputs)))


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """After it, every module and attribute of a model is back in its place; values are not looked at.

    BigBird, for one, changes its attention for good when it meets a short input.
    """
    restore = snapshot(model)
    try:
        yield
    finally:
        restore()


def positions_that_count(mask: Tensor) -> Tensor:
    """Of an attention mask, (rows, positions), those that are no padding.

    Of one for each query, (rows, heads or 1, queries, keys), those that any query sees: True, or not far below 0 where
    it is added to scores.
    """
    if mask.dim() < 4:
        return mask.bool()
    return (mask > -1e3 if mask.is_floating_point() else mask.bool()).any(-2).any(1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, every module of a model is in evaluation mode, though none is told: ``train`` of some changes weights.

    Layers of loralib merge their adapters there. Scripted modules keep their mode out of reach of a snapshot.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def same_draws(model: nn.Module) -> Iterator[None]:
    """Within, random numbers are the same each time; afterwards all generators are as they were.

    ``torch.manual_seed`` would seed those of every accelerator, of which the model lies on few.
    """
    devices = _devices(model)
    with torch.random.fork_rng(devices=devices):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[each.index] for each in devices)):
            generator.manual_seed(0)
        yield


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Within, no forward keeps keys and values: a block that is called again would append to them again."""
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    before = [(config, config.use_cache) for config in configs.values() if getattr(config, "use_cache", None)]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, kept in before:
            config.use_cache = kept


_CONTAINERS = (dict, OrderedDict, list, set)  # the second holds hooks, which some models install in their first forward


def snapshot(model: nn.Module) -> Callable[[], None]:
    """What puts every module and attribute of a model back to where it is now, and what lists and dicts of it hold.

    Values of tensors are not looked at.
    """
    registries = ("_modules", "_parameters", "_buffers")
    before = {
        module: (
            dict(vars(module)),
            {name: dict(vars(module)[name]) for name in registries},
            [
                (value, copy.copy(value))
                for name, value in vars(module).items()
                if type(value) in _CONTAINERS and name not in registries
            ],
        )
        for module in model.modules()
    }

    def restore() -> None:
        for module, (attributes, entries, containers) in before.items():
            vars(module).clear()
            vars(module).update(attributes)
            for name, children in entries.items():
                vars(module)[name].clear()
                vars(module)[name].update(children)
            for value, content in containers:
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(content)

    return restore


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module returned, the main one first; caches of keys are no output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from tensors_in(tuple(value for name, value in output.items() if not re.search("past|cache", str(name))))
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(output):
        yield from tensors_in(vars(output))


def copied(value: Any, dtype: torch.dtype | None) -> Any:
    """Detached copies, floating-point tensors in ``dtype`` if given, through containers; other objects are copied."""
    if isinstance(value, Tensor):
        value = value.detach().clone()
        return value.to(dtype) if dtype and value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(copied(item, dtype) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: copied(item, dtype) for key, item in value.items()}
    return copy.deepcopy(value)


# -- differences ------------------------------------------------------------------------------------

# Largest relative change of an output by rounding alone
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE_ROUNDING = 3e-2  # in half precision
_MASK = 1e4  # from this size on an entry that stays what it was to the bit is of a mask: it would hide what changes


def largest_rounding(tensors: Iterable[Tensor]) -> float:
    """The largest relative change by rounding, as coarse as the coarsest of these: outputs, and weights behind them."""
    return max((_ROUNDING.get(tensor.dtype, _COARSE_ROUNDING) for tensor in tensors), default=0.0)


def changes(outputs: Sequence[Tensor], before: Sequence[Tensor]) -> list[float]:
    """The relative change of each output; of what is nearly zero, relative to the rest.

    An entry that was not finite is no reference. What is no longer finite, or of another shape, changes infinitely.
    """
    if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in before]:
        return [math.inf] * max(1, len(before))
    sizes = [_size_of_change(*pair) for pair in zip(outputs, before, strict=True)]
    least = 1e-3 * max((size for _, size in sizes), default=0.0)
    relative = [change / max(size, least) if change else 0.0 for change, size in sizes]
    return [change if math.isfinite(change) else math.inf for change in relative]


def _size_of_change(output: Tensor, before: Tensor) -> tuple[float, float]:
    """(norm of a change, of what it is relative to)."""
    output, before = (tensor if tensor.dtype is torch.float64 else tensor.float() for tensor in (output, before))
    if before.numel() and not torch.linalg.vector_norm(before, math.inf) < _MASK:
        hidden = ~before.isfinite() | ((before == output) & (before.abs() >= _MASK))
        output, before = output.masked_fill(hidden, 0.0), before.masked_fill(hidden, 0.0)
    change, size = float((output - before).norm()), float(before.norm())
    return change, size or (change and torch.finfo(torch.float32).tiny)


# ----------------------------------------------------------------------------------------------------


def _devices(model: nn.Module) -> list[torch.device]:
    """The accelerators that a model lies on, for ``fork_rng``."""
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
