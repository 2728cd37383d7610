"""Second moments of what multiplies the factors of a model, from batches that are run through it."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .plan import Activation, Target

_MASKS = ("attention_mask", "decoder_attention_mask")


class _Moment:
    """E[x xᵀ] of what a module takes or puts out, summed in float64 on the module's device."""

    def __init__(self, activation: Activation):
        self.activation = activation
        self.total: Tensor | None = None  # (*batch, width, width)
        self.positions = 0

    def add(self, features: Tensor, masks: Sequence[Tensor]) -> None:
        """Count ``features``, (…, features), but for positions that a mask of their shape leaves out.

        Where source and target of an encoder-decoder are equally long both masks fit, and a position counts only if
        neither leaves it out.
        """
        kept = torch.ones(features.shape[:-1], dtype=torch.bool, device=features.device)
        for mask in masks:
            if mask.shape == kept.shape:
                kept &= mask.to(kept.device)
        x = self.activation.read(features.detach()[kept].double())  # (*batch, positions, width)
        product = x.mT @ x
        self.total = product if self.total is None else self.total + product
        self.positions += int(kept.sum())

    def mean(self) -> Tensor | None:
        """None where nothing was seen."""
        return self.total / self.positions if self.positions else None


def moments(
    model: nn.Module, targets: Sequence[Target], batches: Iterable[Mapping[str, object]]
) -> dict[str, tuple[Tensor | None, ...]]:
    """Run batches through a dense model and collect the second moments of what multiplies each factor.

    Padding is left out, as ``attention_mask`` and ``decoder_attention_mask`` (or labels of -100) show it. The model is
    in evaluation mode meanwhile, and left as it was, whatever happens.

    Args:
        batches: dicts of model inputs, on the model's device.

    Returns:
        Name of a target -> one (*batch, width, width) float64 tensor E[x xᵀ] per entry of ``target.inputs()``; None
        where that has none, or the batches do not reach it.

    Raises:
        ValueError: There are no batches.
    """
    collected = {target.name: [a and _Moment(a) for a in target.inputs()] for target in targets}
    wanted = [moment for several in collected.values() for moment in several if moment is not None]
    masks: list[Tensor] = []
    modes, empty = {module: module.training for module in model.modules()}, True
    with contextlib.ExitStack() as stack, torch.no_grad():
        for moment in wanted:
            stack.callback(_hook(model, moment, masks).remove)
        stack.callback(_restore, modes)
        model.eval()
        for batch in batches:
            empty = False
            masks[:] = _masks(batch)
            model(**batch)
    if empty:
        raise ValueError("calibration holds no batches: pass at least one dict of model inputs")
    return {name: tuple(moment and moment.mean() for moment in several) for name, several in collected.items()}


def _hook(model: nn.Module, moment: _Moment, masks: list[Tensor]):
    module = model.get_submodule(moment.activation.module)
    if moment.activation.end == "input":
        return module.register_forward_pre_hook(lambda module, args: moment.add(args[0], masks))
    return module.register_forward_hook(lambda module, args, output: moment.add(output, masks))


def _masks(batch: Mapping[str, object]) -> Iterator[Tensor]:
    """Which positions count, (sequences, positions), of source and target."""
    for name in _MASKS:
        if isinstance(mask := batch.get(name), Tensor):
            yield mask.bool()
    labels = batch.get("labels")
    if "decoder_attention_mask" not in batch and isinstance(labels, Tensor):
        yield labels.ne(-100)


def _restore(modes: Mapping[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training
