"""A model as the chain of blocks that most are: encoder layers, then decoder layers, each fed by the one before.

A block is called again with what it was called with before, but for the hidden states: those may come from a model
whose earlier blocks were changed. So batches advance through a model block by block, each block running once for each
look at it, and nothing is held of a batch but its hidden states (and masks, which blocks share).
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .moments import evaluated
from .outputs import without_cache

Batch = Mapping[str, object]


class _Stop(Exception):
    """Ends a forward whose rest is of no interest."""


class _Hidden:
    """Stands where a block is given the hidden states."""


@dataclass
class Calls:
    """The calls of a list of blocks on one batch.

    Attributes:
        arguments: of each block (args, kwargs), with ``_Hidden`` in the place of what the block before put out.
        hidden: what the block that is next is given there.
    """

    arguments: list[tuple[tuple, dict[str, Any]]]
    hidden: Tensor

    def run(self, model: nn.Module, names: Sequence[str], index: int) -> Tensor:
        """What a block makes of the hidden states."""
        args, kwargs = self.arguments[index]
        args = tuple(self.hidden if value is _Hidden else value for value in args)
        kwargs = {name: self.hidden if value is _Hidden else value for name, value in kwargs.items()}
        return _first(model.get_submodule(names[index])(*args, **kwargs))


def block_lists(model: nn.Module, batch: Batch) -> list[list[str]]:
    """Names of the model's blocks, a list for each chain of them, in the order in which they are called.

    A chain is a ``ModuleList`` whose modules are called once each, in order, and given what the one before them put
    out. That a walk through it gives what the model gives is checked on the batch; what does not is left out.
    """
    places = [
        [f"{name}.{child}".removeprefix(".") for child, _ in module.named_children()]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    chains: list[list[str]] = []
    for names in places:
        inside = any(names[0].startswith(f"{outer}.") for chain in chains for outer in chain)
        if not inside and _walks(model, names, batch):
            chains.append(names)
    order = _order(model, [chain[0] for chain in chains], batch)
    return sorted(chains, key=lambda chain: order.index(chain[0]))


def calls_of(model: nn.Module, names: Sequence[str], batch: Batch) -> Calls | None:
    """How a model calls its blocks on a batch; None if they are no chain."""
    arguments: list[tuple[tuple, dict]] = []
    called, outputs = [], []
    hidden: list[Tensor] = []

    def before(name):
        def hook(module, args, kwargs):
            called.append(name)
            if not outputs:
                tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
                hidden.extend(tensors[:1])
            fed = outputs[-1] if outputs else (hidden or [None])[0]
            arguments.append(
                (
                    tuple(_Hidden if value is fed else value for value in args),
                    {key: _Hidden if value is fed else value for key, value in kwargs.items()},
                )
            )

        return hook

    def after(module, args, output):
        outputs.append(_first(output))
        if len(called) == len(names):
            raise _Stop

    with contextlib.ExitStack() as stack, torch.no_grad(), evaluated(model), without_cache(model):
        for name in names:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        with contextlib.suppress(_Stop):
            model(**batch)
    fed = all(any(value is _Hidden for value in (*args, *kwargs.values())) for args, kwargs in arguments)
    return Calls(arguments, hidden[0]) if called == list(names) and hidden and fed else None


@contextlib.contextmanager
def stopped_after(count: int) -> Iterator[Any]:
    """A function to call ``count`` times within: the last time it ends the block, and all of the forward around it."""
    left = [count]

    def seen() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise _Stop

    with contextlib.suppress(_Stop):
        yield seen


def _walks(model: nn.Module, names: Sequence[str], batch: Batch) -> bool:
    """Whether blocks are a chain, and give by themselves what they give in the model."""
    try:
        calls = calls_of(model, names, batch)
    except Exception:  # any model may stand here: blocks that are not called, or take no such batch
        return False
    if calls is None:
        return False
    last: list[Tensor] = []
    handle = model.get_submodule(names[-1]).register_forward_hook(lambda m, args, output: last.append(_first(output)))
    try:
        with torch.no_grad(), evaluated(model), without_cache(model):
            model(**batch)
            once = len(last) == 1
            for index in range(len(names)):
                calls.hidden = calls.run(model, names, index)
    except Exception:
        return False
    finally:
        handle.remove()
    return once and bool((last[0] - calls.hidden).norm() <= 1e-3 * last[0].norm())  # not where it is no number


def _order(model: nn.Module, names: Iterable[str], batch: Batch) -> list[str]:
    """Modules in the order of their first calls."""
    called: list[str] = []
    with contextlib.ExitStack() as stack, torch.no_grad(), evaluated(model):
        for name in names:
            hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: called.append(name))
            stack.callback(hook.remove)
        model(**batch)
    return called


def _first(output: object) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output
