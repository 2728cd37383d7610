"""What must hold before a model is changed, that it is plain and in memory, and after: that it gives the same."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .calls import Recording
from .factorization import Factorization
from .outputs import changes, outputs_of, snapshot
from .proof import allowed_change, rounding_alone

JUMP = 4.0  # times what rounding alone does to a model, up to which it is the same


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


def check_unchanged(model: nn.Module, recording: Recording, products: Sequence[Factorization]) -> None:
    """Raise `OutputsDiffer` if a model no longer gives what was recorded of it.

    A model that routes, or an output that is a small difference of large ones, may move further than rounding of its
    outputs: then that of the products says how far.
    """
    changed = changes(outputs_of(model, recording.inputs), recording.output) or [0.0]
    worst, allowed = max(range(len(changed)), key=changed.__getitem__), allowed_change(recording, products)
    if changed[worst] > allowed:
        allowed = max(allowed, JUMP * rounding_alone(model, recording, products))
    if changed[worst] > allowed:
        shapes = [f"of shape {tuple(tensor.shape)} " for tensor in recording.output] or [""]
        raise OutputsDiffer(
            f"the factorized {type(model).__name__} gives other outputs than before (one {shapes[worst]}differs by "
            f"{changed[worst]:.1e} of its norm, {allowed:.1e} is allowed), so it was restored: something uses these "
            "weights in a way that no replay of its attention showed; leave such modules out, and please report the "
            "class"
        )


@contextmanager
def kept_on_error(model: nn.Module) -> Iterator[list[tuple[Factorization, list[torch.Tensor]]]]:
    """Within, an error puts every module and attribute of a model back in its place.

    Yields a list for (product, its factors before they are written), which come back too, bit for bit, the last one
    first: factors that are tied are written several times. So do biases, which a layer may cut when it is installed.
    """
    restore = snapshot(model)
    config = getattr(model, "config", None)
    stored = dict(vars(config)) if hasattr(config, "__dict__") else None
    biases = {parameter: parameter.detach().clone() for parameter in model.parameters() if parameter.dim() < 2}
    written: list[tuple[Factorization, list[torch.Tensor]]] = []
    try:
        yield written
    except BaseException:
        restore()
        if stored is not None:
            vars(config).clear()
            vars(config).update(stored)
        for product, factors in reversed(written):
            product.write(factors)
        with torch.no_grad():
            for parameter, value in biases.items():
                parameter.copy_(value)
        raise
