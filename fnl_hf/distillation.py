"""The loss of a model that learns from another one what that makes of the same inputs: no labels needed.

Where both put out logits, the divergence of their distributions (Hinton et al., *Distilling the Knowledge in a Neural
Network*, 2015); of a model without a head the hidden states, and their means over a text, which is what sentence
encoders are used for.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN = "last_hidden_state"
LOGITS_OF_POSITIONS = ("logits", "prediction_logits")
LOGITS = ("logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits")
IGNORED = -100


class Teacher:
    """A model that is learned from, and how its outputs are compared with a student's.

    Args:
        model: It is put on the student's device and into evaluation mode; it gets no gradients.
        temperature: Divides logits before they become probabilities; the loss is scaled by its square.
        context: Makes what its forward runs in, such as autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 1.0,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model, self.temperature, self._context = model.eval(), temperature, context
        config = getattr(model, "config", None)
        self._translates = bool(getattr(config, "is_encoder_decoder", False))
        self._regresses = getattr(config, "problem_type", None) == "regression"
        self._rows: bool | None = None  # whether what is compared is one thing of each row

    @torch.no_grad()
    def outputs(self, inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """What the teacher makes of a batch.

        Raises:
            ValueError: It puts out neither logits nor hidden states.
        """
        device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        self.model.to(device).eval()
        with self._context():
            outputs = self.model(**inputs)
        return {name: outputs[name] for name in self._compared(outputs)}

    def _compared(self, outputs: Mapping[str, Any]) -> list[str]:
        """Names of what is compared, logits if there are any."""
        found = [name for name in LOGITS if isinstance(outputs.get(name), Tensor)]
        names = found or [name for name in (HIDDEN,) if name in outputs]
        if not names:
            raise ValueError(
                f"{type(self.model).__name__} gives {', '.join(outputs)}, and none of {', '.join(LOGITS)} or {HIDDEN} "
                "that another model could learn: give one of a class that does"
            )
        self._rows = outputs[names[0]].dim() < 3 or names[0] not in (HIDDEN, *LOGITS_OF_POSITIONS)
        return names

    def count(self, inputs: Mapping[str, Any]) -> Tensor:
        """How many positions of a batch, or rows, the loss is a mean over; the first batch is run to see which."""
        if self._rows is None:
            self.outputs({name: v.to(self._device()) if isinstance(v, Tensor) else v for name, v in inputs.items()})
        mask = None if self._rows else self._mask(inputs)
        return torch.tensor(len(_main(inputs))) if mask is None else mask.sum()

    def loss(self, student: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """How far a student's outputs on a batch are from what the teacher makes of it: see ``distance``."""
        return self.distance(student, self.outputs(inputs), inputs)

    def distance(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], inputs: Mapping[str, Any]
    ) -> Tensor:
        """The mean over positions, or rows, of how far a student's outputs are from the teacher's.

        Args:
            student: its outputs on a batch.
            teacher: what ``outputs`` gave for the batch.
            inputs: the batch, padding in its masks.

        Raises:
            ValueError: The student has no such outputs, or of other shapes.
        """
        parts = []
        for name, wanted in teacher.items():
            given = student.get(name) if isinstance(student, Mapping) else None
            if given is None or given.shape != wanted.shape:
                shape = "none" if given is None else str(tuple(given.shape))
                raise ValueError(
                    f"the teacher's {name} have the shape {tuple(wanted.shape)}, the student's {shape}: give a teacher "
                    "of the same class, vocabulary and width"
                )
            parts.append(self._distance(name, given, wanted.to(given.device), self._mask(inputs)))
        return sum(parts)

    def probe(self, outputs: Mapping[str, Tensor], inputs: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """A scalar of a model's own outputs whose gradients by them, drawn at random, have the curvature of
        ``distance`` for their second moments: the log-probabilities of drawn classes, or sums of drawn signs.

        Summed over positions, or rows.
        """
        compared, mask = {name: outputs[name] for name in self._compared(outputs)}, self._mask(inputs)
        parts = []
        for name, given in compared.items():
            given = given.float()
            if name == HIDDEN and given.dim() == 3:
                parts.append(_probe_of_hidden(given, _everywhere(given) if mask is None else mask, generator))
                continue
            if given.dim() > 2:
                given = given.flatten(0, -2) if self._rows or mask is None else given[mask]
            if self._regresses or given.shape[-1] == 1:
                parts.append((_signs(given, generator) * given).sum())
                continue
            chances = F.softmax(given.detach(), dim=-1)
            drawn = (chances.cumsum(-1) < torch.rand(len(chances), 1, generator=generator).to(chances)).sum(-1)
            drawn = drawn.clamp(max=chances.shape[-1] - 1)
            parts.append(F.log_softmax(given, dim=-1).gather(-1, drawn[:, None]).sum())
        return sum(parts)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _distance(self, name: str, given: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
        given, wanted = given.float(), wanted.float()
        if name == HIDDEN and given.dim() == 3:
            return _of_hidden(given, wanted, _everywhere(given) if mask is None else mask)
        if given.dim() > 2:
            given, wanted = (x.flatten(0, -2) if self._rows or mask is None else x[mask] for x in (given, wanted))
        if self._regresses or given.shape[-1] == 1:
            return F.mse_loss(given, wanted)
        pair = (F.log_softmax(x / self.temperature, dim=-1) for x in (given, wanted))
        return self.temperature**2 * F.kl_div(*pair, reduction="batchmean", log_target=True)

    def _mask(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Which positions count, (rows, positions); of an encoder-decoder those of its target."""
        if self._translates:
            mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
            if mask is None and isinstance(labels, Tensor) and labels.dim() == 2:
                return labels.ne(IGNORED)
            ids = inputs.get("decoder_input_ids")
            return mask.bool() if mask is not None else None if ids is None else torch.ones_like(ids, dtype=torch.bool)
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask.bool()
        ids = inputs.get("input_ids")
        return torch.ones_like(ids, dtype=torch.bool) if isinstance(ids, Tensor) else None


def _of_hidden(given: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """Mean over positions of ‖s − t‖²/‖t‖², and of the same of the mean over the text in which each stands."""
    weights = mask[..., None].to(given.dtype)
    lengths = weights.sum(1)  # (rows, 1)
    means = [(x * weights).sum(1) / lengths.clamp_min(1) for x in (given, wanted)]
    of_positions, of_texts = _relative(given, wanted)[mask].sum(), (_relative(*means) * lengths[:, 0]).sum()
    return (of_positions + of_texts) / mask.sum().clamp_min(1)


def _probe_of_hidden(hidden: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Σ s·h/‖h‖ over positions, and over texts Σ √length s·m/‖m‖ of their means m, with drawn signs s."""
    weights = mask[..., None].to(hidden.dtype)
    lengths = weights.sum(1)
    means = (hidden * weights).sum(1) / lengths.clamp_min(1)
    of_positions, of_texts = (_signs(x, generator) * x / _lengths(x) for x in (hidden, means))
    return (of_positions * weights).sum() + (of_texts * lengths.sqrt()).sum()


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """-1 or 1, each as likely."""
    return torch.randint(0, 2, like.shape, generator=generator).to(like).mul(2).sub(1)


def _lengths(vectors: Tensor) -> Tensor:
    return vectors.detach().norm(dim=-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)


def _everywhere(hidden: Tensor) -> Tensor:
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)


def _relative(given: Tensor, wanted: Tensor) -> Tensor:
    return (given - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(torch.finfo(wanted.dtype).tiny)


def _main(inputs: Mapping[str, Any]) -> Tensor:
    """What a batch is a batch of."""
    named = [inputs[name] for name in ("input_ids", "inputs_embeds") if isinstance(inputs.get(name), Tensor)]
    return next(iter([*named, *(value for value in inputs.values() if isinstance(value, Tensor))]))
