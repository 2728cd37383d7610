"""Second moments of what multiplies the factors of a model, from batches that are run through it."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .algebra.tensors import accumulating
from .algebra.weighted import shrunk
from .plan import Activation, Target

UNSEEN = 0.1  # of a row that no batch looks up: how often it counts


class _Moment:
    """E[x xᵀ] of what a module takes or puts out, summed in float64 on the module's device."""

    def __init__(self, activation: Activation):
        self.activation = activation
        self.total: Tensor | None = None  # (*batch, width, width)
        self.positions = 0

    def add(self, module: nn.Module, value: object, masks: Sequence[Tensor]) -> None:
        """Count the features in what the module took or put out, but for positions that a mask leaves out."""
        features = value[0] if isinstance(value, (tuple, list)) else value
        features = self._spread(module, features.detach())
        kept = _kept(features, masks, self.activation.module)
        product = self._product(module, features[kept])
        self.total = product if self.total is None else self.total + product
        self.positions += int(kept.sum())

    def mean(self, shrink: bool) -> Tensor | None:
        """None where nothing was seen."""
        if not self.positions:
            return None
        mean = self.total / self.positions
        return shrunk(mean, self.positions) if shrink else mean

    def _spread(self, module: nn.Module, features: Tensor) -> Tensor:
        return features if self.activation.spread is None else self.activation.spread(module, features)

    def _product(self, module: nn.Module, features: Tensor) -> Tensor:
        x = self.activation.read(accumulating(features))  # (*batch, positions, width)
        return (x.mT @ x).double()  # a batch by itself in single precision, the sum of batches in double


class _Counts(_Moment):
    """How often a module looks up each of its rows, (1, rows): the diagonal that E[x xᵀ] has for one-hot x."""

    def _spread(self, module: nn.Module, features: Tensor) -> Tensor:
        return features[..., None]

    def _product(self, module: nn.Module, features: Tensor) -> Tensor:
        return torch.bincount(features.flatten(), minlength=module.num_embeddings).double()[None]

    def mean(self, shrink: bool) -> Tensor | None:
        return self.total.clamp_min(UNSEEN) / self.positions if self.positions else None


class Calibration:
    """What batches say of the products of a model: run through it once, when it is first asked for."""

    def __init__(self, model: nn.Module, batches: Iterable[Mapping[str, object]]):
        self.model, self.batches = model, batches
        self._sides: dict[tuple, tuple[Tensor | None, ...]] | None = None

    def of(self, targets: Sequence[Target]) -> dict[tuple, tuple[Tensor | None, ...]]:
        """``Factorization.weights`` -> moments, those of all layers that are tied together; of the first targets."""
        if self._sides is None:
            self._sides = {}
            for target, own in zip(targets, moments(self.model, targets, self.batches, True).values(), strict=True):
                product = target.found(self.model)
                self._sides[product.weights] = own + (self._sides.get(product.weights, ()) if product.lone else ())
        return self._sides


def moments(
    model: nn.Module, targets: Sequence[Target], batches: Iterable[Mapping[str, object]], shrink: bool = False
) -> dict[str, tuple[Tensor | None, ...]]:
    """Run batches through a dense model and collect the second moments of what multiplies each factor.

    Padding is left out, as ``attention_mask`` and ``decoder_attention_mask`` show it; of an encoder-decoder without the
    latter, as labels of -100 do. Which of them counts follows from the number of positions. Where source and target are
    equally long, a position counts only if neither leaves it out: fewer than there are, but never padding.
    The model is in evaluation mode meanwhile, and left as it was, whatever happens.

    Args:
        batches: dicts of model inputs; tensors are moved to the model's device.
        shrink: Draw moments of few positions to a multiple of the identity (``algebra.weighted.shrunk``).

    Returns:
        Name of a target -> one (*batch, width, width) float64 tensor E[x xᵀ] per entry of ``target.inputs()``, or
        (1, rows) of what is looked up; None where that has none. None for all of them if the batches do not reach one.

    Raises:
        TypeError: A batch is no dict.
        ValueError: There are no batches; there is padding, and a module has its positions in a shape of its own.
    """
    collected = {
        target.name: [a and (_Moment if a.read else _Counts)(a) for a in target.inputs()] for target in targets
    }
    wanted = [moment for several in collected.values() for moment in several if moment is not None]
    masks: list[Tensor] = []
    modes, empty = {module: module.training for module in model.modules()}, True
    with contextlib.ExitStack() as stack, torch.no_grad():
        for moment in wanted:
            stack.callback(_hook(model, moment, masks).remove)
        stack.callback(_restore, modes)
        model.eval()
        device = next((parameter.device for parameter in model.parameters()), None)
        for batch in batches:
            empty = False
            if not isinstance(batch, Mapping):
                one = " (calibration is one batch: pass a list of it)" if isinstance(batches, Mapping) else ""
                raise TypeError(f"a batch of calibration is a {type(batch).__name__}, expected a dict of inputs{one}")
            batch = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
            masks[:] = _masks(model, batch)
            model(**batch)
    if empty:
        raise ValueError("calibration holds no batches: pass at least one dict of model inputs")
    found = {name: tuple(moment and moment.mean(shrink) for moment in several) for name, several in collected.items()}
    for name, several in collected.items():
        if any(moment is not None and mean is None for moment, mean in zip(several, found[name], strict=True)):
            found[name] = (None,) * len(several)
    return found


def _hook(model: nn.Module, moment: _Moment, masks: list[Tensor]):
    module = model.get_submodule(moment.activation.module)
    if moment.activation.end == "output":
        return module.register_forward_hook(lambda module, args, output: moment.add(module, output, masks))
    return module.register_forward_pre_hook(
        lambda module, args, kwargs: moment.add(module, args[0] if args else next(iter(kwargs.values())), masks),
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
