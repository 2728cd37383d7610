"""Weights that are no numbers any more: found and named, before eigenvalues of them are asked for."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def check_finite(model: nn.Module, step: int) -> None:
    """Look at every weight, on this process's shards.

    Raises:
        FloatingPointError: One holds NaN or infinity.
    """
    weights = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    weights = {name: weight for name, weight in weights.items() if weight.is_floating_point() and weight.numel()}
    if not weights:
        return
    devices: dict[torch.device, list] = {}
    for name, weight in weights.items():
        devices.setdefault(weight.device, []).append((name, torch.isfinite(weight).all()))
    for found in devices.values():
        finite = torch.stack([each for _, each in found]).tolist()  # one look at the device
        for (name, _), good in zip(found, finite, strict=True):
            if not good:
                raise FloatingPointError(
                    f"weights of {name} are not finite at step {step}: training has diverged; lower learning_rate, "
                    "warm it up for longer, or clip gradients (max_grad_norm)"
                )
