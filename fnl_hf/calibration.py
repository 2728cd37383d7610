"""Second moments of what multiplies the factors of a model, from batches that are run through it."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .plan import Activation, Target


class _Moment:
    """E[x xᵀ] of what a module takes or puts out, summed in float64 on the module's device."""

    def __init__(self, activation: Activation):
        self.activation = activation
        self.total: Tensor | None = None  # (*batch, width, width)
        self.positions = 0

    def add(self, value: object, masks: Sequence[Tensor]) -> None:
        """Count the features in what the module took or put out, but for positions that a mask leaves out."""
        features = value[0] if isinstance(value, (tuple, list)) else value
        kept = _kept(features, masks, self.activation.module)
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

    Padding is left out, as ``attention_mask`` and ``decoder_attention_mask`` show it; of an encoder-decoder without the
    latter, as labels of -100 do. Which of them counts follows from the number of positions. Where source and target are
    equally long, a position counts only if neither leaves it out: fewer than there are, but never padding.
    The model is in evaluation mode meanwhile, and left as it was, whatever happens.

    Args:
        batches: dicts of model inputs, on the model's device.

    Returns:
        Name of a target -> one (*batch, width, width) float64 tensor E[x xᵀ] per entry of ``target.inputs()``; None
        where that has none, or the batches do not reach it.

    Raises:
        ValueError: There are no batches; there is padding, and a module has its positions in a shape of its own.
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
            masks[:] = _masks(model, batch)
            model(**batch)
    if empty:
        raise ValueError("calibration holds no batches: pass at least one dict of model inputs")
    return {name: tuple(moment and moment.mean() for moment in several) for name, several in collected.items()}


def _hook(model: nn.Module, moment: _Moment, masks: list[Tensor]):
    module = model.get_submodule(moment.activation.module)
    if moment.activation.end == "output":
        return module.register_forward_hook(lambda module, args, output: moment.add(output, masks))
    return module.register_forward_pre_hook(
        lambda module, args, kwargs: moment.add(args[0] if args else next(iter(kwargs.values())), masks),
        with_kwargs=True,
    )


def _masks(model: nn.Module, batch: Mapping[str, object]) -> Iterator[Tensor]:
    """Which positions count, (sequences, positions), of source and target; all of a sequence that has no mask."""
    for name in ("attention_mask", "decoder_attention_mask"):
        if isinstance(mask := batch.get(name), Tensor) and mask.dim() == 2:
            yield mask.bool()
    labels, config = batch.get("labels"), getattr(model, "config", None)
    translates = getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in batch
    if translates and "decoder_attention_mask" not in batch and isinstance(labels, Tensor):
        yield labels.ne(-100)
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim() >= 2:
            yield torch.ones(value.shape[:2], dtype=torch.bool)


def _kept(features: Tensor, masks: Sequence[Tensor], module: str) -> Tensor:
    """Which positions of (…, features) count: those of the masks that have their shape, or theirs with time first."""
    kept, fits = torch.ones(features.shape[:-1], dtype=torch.bool, device=features.device), False
    for mask in masks:
        if kept.shape in (mask.shape, mask.mT.shape):
            kept, fits = kept & (mask if kept.shape == mask.shape else mask.mT).to(kept.device), True
    if not fits and not all(mask.all() for mask in masks):
        raise ValueError(
            f"{module} has positions of shape {tuple(kept.shape)}, which no mask has, so its padding cannot be left "
            "out: calibrate on batches without padding"
        )
    return kept


def _restore(modes: Mapping[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training
