"""Which modules of a model compute attention, seen from outside: by watching softmax, however the model is written."""

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def watching_softmax(model: nn.Module) -> Iterator[set[str]]:
    """Yields a set that fills with the names of the modules whose own forward computes attention over scores."""
    executed, stack, handles = set(), [], []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True))
    originals = {
        (torch, "softmax"): torch.softmax,
        (torch.Tensor, "softmax"): torch.Tensor.softmax,
        (nn.functional, "softmax"): nn.functional.softmax,
        (nn.functional, "scaled_dot_product_attention"): nn.functional.scaled_dot_product_attention,
    }

    def watched(original):
        def call(tensor, *args, **kwargs):
            if stack and isinstance(tensor, torch.Tensor) and tensor.dim() >= 3:  # routers' softmax has two
                executed.add(stack[-1] if not isinstance(model.get_submodule(stack[-1]), nn.Softmax) else stack[-2])
            return original(tensor, *args, **kwargs)

        return call

    for (owner, name), original in originals.items():
        setattr(owner, name, watched(original))
    try:
        yield executed
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)
        for handle in handles:
            handle.remove()


def has_queries(module: nn.Module) -> bool:
    """Whether a module that ran a softmax holds something named like queries, keys or values of its own.

    Routers, deformable attention (whose weights come from one projection) and pooling by a learned score do not.
    """
    names = [name for name, _ in module.named_children()] + [name for name, _ in module.named_parameters(recurse=False)]
    parts = [set(re.split(r"[_\W]+", name.lower())) for name in names]
    return any(words & {"q", "query", "qkv", "queries", "qk"} for words in parts)
