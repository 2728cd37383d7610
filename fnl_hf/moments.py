"""Second moments of what multiplies the factors of a model, from batches that are run through it."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .algebra.tensors import accumulating
from .algebra.weighted import shrunk
from .messages import progress
from .outputs import evaluating, positions_that_count, same_draws
from .plan import Activation, Target


class NoMaskFits(ValueError):
    """A module has its positions in a shape of its own, and there is padding."""


UNSEEN = 0.1  # of a row that no batch looks up: how often it counts


class Moment:
    """E[x xᵀ] of what a module takes or puts out, summed in float64 on the module's device."""

    def __init__(self, activation: Activation):
        self.activation = activation
        self.total: Tensor | None = None  # (*batch, width, width)
        self.cross: Tensor | None = None  # the same of what stands for x
        self.positions = 0

    def hook(
        self, model: nn.Module, take: Callable[[nn.Module, Tensor], None], detached: bool = True
    ) -> RemovableHandle:
        """Hand (the module, its tensor that is read) to ``take`` in every forward of a model from now on."""
        module = model.get_submodule(self.activation.module)

        def given(value: object) -> None:
            value = value[0] if isinstance(value, (tuple, list)) else value
            take(module, value.detach() if detached else value)

        if self.activation.end == "output":
            return module.register_forward_hook(lambda module, args, output: given(output))
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: given(args or next(iter(kwargs.values()))), with_kwargs=True
        )

    def features(self, module: nn.Module, value: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """x, (*batch, positions, width): all positions but those that a mask leaves out."""
        spread = value if self.activation.spread is None else self.activation.spread(module, value)
        return self.activation.read(accumulating(self.kept(spread, masks)))

    def kept(self, features: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """The positions of (…, features) that no mask leaves out, (positions, features)."""
        return features[_kept(features, masks, self.activation.module)]

    def add(self, module: nn.Module, value: Tensor, masks: Sequence[Tensor]) -> None:
        """Count a batch."""
        self.add_features(self.features(module, value, masks))

    def add_features(self, x: Tensor, stood_for: Tensor | None = None) -> None:
        """Count what ``features`` gave, and with it what it stands for, in the same positions."""
        # a batch by itself in single precision, the sum of batches in double
        self.total = plus(self.total, x.mT @ x)
        if stood_for is not None:
            self.cross = plus(self.cross, stood_for.mT @ x)
        self.positions += x.shape[-2]

    def mean(self, shrink: bool) -> tuple[Tensor | None, Tensor | None]:
        """E[x xᵀ], and E[x x̃ᵀ] where x̃ stands for x: the first is of x̃ then. None where nothing was seen."""
        if not self.positions:
            return None, None
        if not self.total.isfinite().all():
            raise ValueError(
                f"what {self.activation.module} has for its {self.activation.end} on the calibration holds NaN or "
                "infinite numbers: load a sound checkpoint, or one in another dtype"
            )
        mean, cross = (sums if sums is None else sums / self.positions for sums in (self.total, self.cross))
        return shrunk(mean, self.positions, cross) if shrink else (mean, cross)


class _Counts(Moment):
    """How often a module looks up each of its rows, (1, rows): the diagonal that E[x xᵀ] has for one-hot x."""

    def add(self, module: nn.Module, value: Tensor, masks: Sequence[Tensor]) -> None:
        kept = self.kept(value[..., None], masks)
        self.total = plus(self.total, torch.bincount(kept.flatten(), minlength=module.num_embeddings)[None])
        self.positions += kept.numel()

    def mean(self, shrink: bool) -> tuple[Tensor | None, None]:
        return (self.total.clamp_min(UNSEEN) / self.positions if self.positions else None), None


def plus(total: Tensor | None, more: Tensor) -> Tensor:
    """A sum in double precision, of what is given in single."""
    return more.double() if total is None else total + more


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
    collected = {target.name: [a and (Moment if a.read else _Counts)(a) for a in target.inputs()] for target in targets}
    wanted = [moment for several in collected.values() for moment in several if moment is not None]
    masks: list[Tensor] = []
    with contextlib.ExitStack() as stack, torch.no_grad():
        for moment in wanted:
            take = partial(moment.add, masks=masks)  # filled anew for every batch
            stack.callback(moment.hook(model, take).remove)
        stack.enter_context(evaluated(model))
        for batch in checked(model, batches, "moments of inputs"):
            masks[:] = masks_of(model, batch)
            run(model, batch)
    found = {
        name: tuple(moment and moment.mean(shrink)[0] for moment in several) for name, several in collected.items()
    }
    for name, several in collected.items():
        if any(moment is not None and mean is None for moment, mean in zip(several, found[name], strict=True)):
            found[name] = (None,) * len(several)
    return found


def checked(
    model: nn.Module, batches: Iterable[Mapping[str, object]], what: str = "batches"
) -> Iterator[dict[str, object]]:
    """The batches with their tensors on the model's device, and a bar that says ``what`` is done.

    Raises:
        TypeError, ValueError: A batch is no dict; there is none; there can be no graphs.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("calibration within torch.inference_mode: call factorize outside of it (no_grad may stay)")
    empty = True
    for batch in progress(batches, what):
        empty = False
        if not isinstance(batch, Mapping):
            one = " (calibration is one batch: pass a list of it)" if isinstance(batches, Mapping) else ""
            raise TypeError(f"a batch of calibration is a {type(batch).__name__}, expected a dict of inputs{one}")
        for part in _unambiguous(_with_rows(batch)):
            yield on_device(model, part)
    if empty:
        raise ValueError("calibration holds no batches: pass at least one dict of model inputs")


def on_device(model: nn.Module, batch: Mapping[str, object]) -> dict[str, object]:
    """A batch with its tensors where the model is."""
    device = next((parameter.device for parameter in model.parameters()), None)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def run(model: nn.Module, batch: Mapping[str, object]) -> Any:
    """What a model makes of a batch.

    Raises:
        ValueError: It does not run on that.
    """
    try:
        return model(**batch)
    except NoMaskFits:
        raise
    except Exception as error:  # whatever a model raises at inputs that it is not for
        given = ", ".join(
            f"{name} {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
            for name, value in batch.items()
        )
        raise ValueError(
            f"{type(model).__name__} does not run on a batch of the calibration ({given}; tensors with a row for each "
            f"sequence are expected): {type(error).__name__}: {error}"
        ) from error


def _with_rows(batch: Mapping[str, object]) -> Mapping[str, object]:
    """A batch as tensors, also of one text by itself, as a tokenizer or a dataset gives it."""
    batch = {name: torch.tensor(v) if _is_numbers(v) else v for name, v in batch.items()}
    ids = batch.get("input_ids")
    if not (isinstance(ids, Tensor) and ids.dim() == 1):
        return batch
    return {name: v[None] if isinstance(v, Tensor) else v for name, v in batch.items()}


def _is_numbers(value: object) -> bool:
    """Whether it is a list of numbers, or of lists of them that are equally long."""
    if not isinstance(value, list) or not value:
        return False
    if isinstance(value[0], list):
        return all(isinstance(v, list) and len(v) == len(value[0]) and _is_numbers(v) for v in value)
    return all(isinstance(v, (int, float)) for v in value)


def _unambiguous(batch: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """A batch, in two parts where it has as many sequences as positions: some models put time first inside."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    mask = batch.get("attention_mask")
    square = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == mask.shape[1] > 1 and not mask.all()
    if not square or any(len(value) != len(mask) for value in tensors):
        yield batch
        return
    for part in (slice(-1), slice(-1, None)):
        yield {name: v[part] if isinstance(v, Tensor) and v.dim() else v for name, v in batch.items()}


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Within, a model is in evaluation mode; its modes and the random state come back."""
    with evaluating(model), same_draws(model):
        yield


def masks_of(model: nn.Module, batch: Mapping[str, object]) -> Iterator[Tensor]:
    """Which positions count, (sequences, positions), of source and target; all of a sequence that has no mask.

    Of multiple choice the choices are sequences.
    """
    for name in ("attention_mask", "decoder_attention_mask"):
        if isinstance(mask := batch.get(name), Tensor) and mask.dim() in (2, 3, 4):
            yield positions_that_count(mask).flatten(0, -2)
    labels, config = batch.get("labels"), getattr(model, "config", None)
    translates = getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in batch
    if translates and "decoder_attention_mask" not in batch and isinstance(labels, Tensor) and labels.dim() == 2:
        yield labels.ne(-100)
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim() >= 2:
            yield torch.ones(value.shape[:2], dtype=torch.bool)
        if isinstance(value, Tensor) and value.dim() >= 3 and value.is_floating_point():
            yield torch.ones(len(value), 0, dtype=torch.bool)  # images or sounds: their positions have no mask


def _kept(features: Tensor, masks: Sequence[Tensor], module: str) -> Tensor:
    """Which positions of (…, features) count: those of the masks that have their shape, or theirs with time first.

    Tokens in one row have a mask's as one row. What is no batch of a mask's sequences has none of its padding: one
    thing of each sequence, a table of positions, or other inputs beside the masked ones, such as images.
    """
    kept, fits = torch.ones(features.shape[:-1], dtype=torch.bool, device=features.device), False
    for mask in masks:
        for shaped in (mask, mask.mT, mask.flatten()):
            if kept.shape == shaped.shape:
                kept, fits = kept & shaped.to(kept.device), True
                break
    padded = [mask for mask in masks if not mask.all()]
    rows = {len(mask) for mask in padded}
    of_sequences = kept.dim() > 1 and not rows.isdisjoint(kept.shape[:2]) or kept.dim() == 1 and len(kept) not in rows
    if padded and not fits and of_sequences and all(mask.shape[-1] for mask in masks):
        raise NoMaskFits(
            f"{module} has positions of shape {tuple(kept.shape)}, which no mask has, so its padding cannot be left "
            "out: calibrate on batches without padding"
        )
    return kept
