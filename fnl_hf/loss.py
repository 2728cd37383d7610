"""How many labels the mean loss of a batch is over: what it weighs among the micro-batches of a step.

A causal loss takes no notice of the first label of a row, most others do. No name says which one a class computes:
GPT2LMHeadModel has a causal loss under a name that transformers does not know, BartForCausalLM an unshifted one of its
own, a prompt of PEFT's moves all labels to where they count. So it is measured, once, on the first batch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

IGNORED = -100


def labels_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """What a batch is scored by; a question has one label, where its answer starts."""
    names = ("shift_labels", "labels", "start_positions")
    return next((inputs[name] for name in names if inputs.get(name) is not None), None)


class LabelCount:
    """Counts the labels behind the mean loss of batches, for one model and its way to compute a loss.

    Args:
        model: What is trained; a wrapper for processes or a compiled one is looked through, an adapter is not.
        smoothed: None, or whether the label smoother that computes the loss instead of the model shifts labels.
        context: Makes what the forward that measures runs in, such as autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        smoothed: bool | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self._model = getattr(model, "_orig_mod", model)
        self._smoothed = smoothed
        self._context = context
        self._shifted: dict[int, tuple[int, ...]] = {}  # by dimensions of the labels: those whose first index is void
        self._over = _over(self._model) if smoothed is None else "labels"

    @property
    def sums(self) -> bool:
        """Whether the loss is no mean at all: the loss of a step is then the sum of its batches'."""
        return self._over == "nothing"

    def knows(self, inputs: Mapping[str, Any]) -> bool:
        """Whether it has seen labels of this kind, or needs to see none."""
        return not torch.is_tensor(inputs.get("labels")) or inputs["labels"].dim() in self._shifted

    def learn(self, inputs: Mapping[str, Any]) -> None:
        """See on a batch, on the model's device, how labels of its kind count: a few forwards, once."""
        self._shifted[inputs["labels"].dim()] = self._shifted_dims(inputs["labels"], inputs)

    def of(self, inputs: Mapping[str, Any]) -> Tensor:
        """How many labels the loss of a batch is the mean over."""
        labels = labels_of(inputs)
        if self._over == "rows":
            return torch.tensor(len(labels), device=labels.device)
        if inputs.get("labels") is None and "start_positions" in inputs:
            ids = inputs.get("input_ids")
            return (labels.ge(0) if ids is None else labels.lt(ids.shape[1])).sum()  # beyond the end: ignored
        if inputs.get("shift_labels") is None:
            for dim in self._shifted.get(labels.dim(), ()):
                labels = labels.narrow(dim, 1, labels.shape[dim] - 1)
        return labels.ne(self._ignored(labels)).sum()

    def _ignored(self, labels: Tensor) -> int:
        """The label that does not count: images have one of their own."""
        of_images = getattr(getattr(self._model, "config", None), "semantic_loss_ignore_index", None)
        return of_images if labels.dim() == 3 and isinstance(of_images, int) else IGNORED

    def _shifted_dims(self, labels: Tensor, inputs: Mapping[str, Any]) -> tuple[int, ...]:
        """Along which dimensions the first label does not count."""
        if labels.is_floating_point() or labels.dim() < 2 or not labels.numel() or self._over != "labels":
            return ()
        if self._smoothed is not None:
            return (labels.dim() - 1,) if self._smoothed else ()
        if _known_unshifted(self._model):
            return ()
        shifted, known = [], False
        with torch.no_grad(), self._context(), _as_evaluated(self._model):
            for dim in (dim for dim in range(1, labels.dim()) if labels.shape[dim] > 1):
                # Any model may stand here, and fail or have no number for so few labels.
                with suppress(Exception):
                    if not self._counts_first(labels, inputs, dim):
                        shifted.append(dim)
                    known = True
        if not known and _seems_causal(self._model):  # what its class says is all there is
            return (labels.dim() - 1,)
        return tuple(shifted)

    def _counts_first(self, labels: Tensor, inputs: Mapping[str, Any], dim: int) -> bool:
        """Whether the labels at index 0 of a dimension enter the loss: with them alone it is not that of no labels.

        The mean over no labels is 0/0; a class may add other terms to it, or return 0.
        """
        valid = labels[labels.ge(0)]
        none = torch.full_like(labels, IGNORED)

        def only(index: int) -> Tensor:
            alone = none.clone()
            alone.select(dim, index).fill_(valid[0].item() if valid.numel() else 0)
            return self._loss(inputs, alone)

        first = only(0)
        if first.isnan():
            if only(1).isnan():
                raise ValueError("the loss is not a number whatever the labels are")
            return False
        without = self._loss(inputs, none)
        return bool(without.isnan()) or not torch.isclose(first, without, rtol=1e-3)

    def _loss(self, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
        """The model's loss of a batch with other labels, nothing of it padded: padding would hide labels, too."""
        inputs = {name: value for name, value in inputs.items() if name != "shift_labels"}
        for name, value in inputs.items():
            if name.endswith("attention_mask") and torch.is_tensor(value) and value.dim() == 2:
                inputs[name] = torch.ones_like(value)
        outputs = self._model(**inputs | {"labels": labels})
        return outputs["loss"] if isinstance(outputs, dict) else outputs[0]


def _over(model: nn.Module) -> str:
    """What the loss of a model is a mean over: "labels", "rows" of the batch (each by its own length), "nothing"."""
    kind, config = getattr(model, "loss_type", None), getattr(model, "config", None)
    if kind == "ForCTC":
        return "nothing" if getattr(config, "ctc_loss_reduction", "mean") == "sum" else "rows"
    return "rows" if kind == "ParakeetForTDT" else "labels"


def _known_unshifted(model: nn.Module) -> bool:
    """Whether the class has a name by which transformers knows that its loss is another than the causal one."""
    mapped = LOSS_MAPPING.get(getattr(model, "loss_type", None))
    return mapped is not None and mapped is not ForCausalLMLoss and not hasattr(model, "_loss_function")


def _seems_causal(model: nn.Module) -> bool:
    """Whether the loss function that transformers hands to the model is the causal one."""
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return getattr(model, "loss_function", None) is ForCausalLMLoss and not encodes


@contextmanager
def _as_evaluated(model: nn.Module) -> Iterator[None]:
    """Without dropout, and without a trace: modes and random states are as before then."""
    modes = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
