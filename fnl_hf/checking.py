"""What must hold before a model is changed, that it is plain and in memory, and after: that it gives the same."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .calls import Recording, outputs_of, snapshot
from .factorization import Factorization

# Largest change of an output, relative to its norm, by rounding alone
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
COARSE_ROUNDING = 3e-2  # in half precision


def refuse_wrapped(model: nn.Module) -> None:
    """Raise where the model is not the plain one, whole and in memory: factors put into it would go unseen.

    Raises:
        TypeError: It is, or holds, a wrapper; the message has the call to make.
        ValueError: Weights are sharded, or not in memory.
    """
    for name, module in model.named_modules():
        where = f"{name} is " if name else "the model is "
        if hasattr(module, "_orig_mod"):
            raise TypeError(
                f"{where}compiled: factorize what torch.compile was given, model._orig_mod, and compile that again"
            )
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise TypeError(
                f"{where}wrapped in {type(module).__name__}, which would not see new factors: factorize model.module "
                "and wrap that again"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                f"{where}wrapped in FSDP, which flattens parameters: factorize the model before sharding it"
            )
        if hasattr(module, "base_layer"):
            raise TypeError(
                f"{where}a layer with an adapter: factorize the model before adapters are added, or after "
                "model.merge_and_unload()"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(f"{name} is sharded over processes: factorize the model before sharding it")
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device, so its values are not in memory (offloaded, or never loaded): load the "
                "model with a device_map that leaves nothing on disk"
            )


class OutputsDiffer(ValueError):
    """A model gives other outputs than before it was changed."""


def check_unchanged(model: nn.Module, recording: Recording) -> None:
    """Raise `OutputsDiffer` if a model no longer gives what was recorded of it."""
    for before, after in zip(recording.output, outputs_of(model, recording.inputs), strict=True):
        if not before.isfinite().all():  # no reference
            continue
        allowed = ROUNDING.get(before.dtype, COARSE_ROUNDING) * before.float().norm()
        changed = (after.float() - before.float()).norm()
        if not changed <= allowed:
            raise OutputsDiffer(
                f"the factorized {type(model).__name__} gives other outputs than before (one of shape "
                f"{tuple(before.shape)} differs by {float(changed):.1e}, {float(allowed):.1e} is allowed), so it was "
                "restored: something uses these weights in a way that no replay of its attention showed; leave such "
                "modules out, and please report the class"
            )


@contextmanager
def kept_on_error(model: nn.Module) -> Iterator[list[tuple[Factorization, list[torch.Tensor]]]]:
    """Within, an error puts every module and attribute of a model back in its place.

    Yields a list for (product, its factors before they are written), which come back too, bit for bit.
    """
    restore = snapshot(model)
    config = getattr(model, "config", None)
    stored = dict(vars(config)) if hasattr(config, "__dict__") else None
    written: list[tuple[Factorization, list[torch.Tensor]]] = []
    try:
        yield written
    except BaseException:
        restore()
        if stored is not None:
            vars(config).clear()
            vars(config).update(stored)
        for product, factors in written:
            product.write(factors)
        raise
