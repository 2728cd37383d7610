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

from .outputs import evaluating, positions_that_count

HIDDEN = "last_hidden_state"
ANSWERS = ("start_logits", "end_logits")  # distributions over positions
LOGITS_OF_POSITIONS = ("logits", "prediction_logits")
LOGITS = ("logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits")
IGNORED = -100


class Teacher:
    """A model that is learned from, and how its outputs are compared with a student's.

    Args:
        model: It is put on the student's device, runs in evaluation mode, and gets no gradients.
        temperature: Divides logits before they become probabilities; the loss is scaled by its square.
        context: Makes what its forward runs in, such as autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 1.0,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model, self.temperature, self._context = model, temperature, context
        config = getattr(model, "config", None)
        self._translates = bool(getattr(config, "is_encoder_decoder", False))
        self._problem = getattr(config, "problem_type", None)
        self._detects = type(model).__name__.endswith("ForPreTraining")  # ELECTRA: of each token a yes or no
        self._rows: bool | None = None  # whether what is compared is one thing of each row
        self.numbers = 0  # of each position, or row, that are compared; known once outputs were seen

    @torch.no_grad()
    def outputs(self, inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """What the teacher makes of a batch.

        Raises:
            ValueError: It puts out neither logits nor hidden states.
        """
        device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        with evaluating(self.model.to(device)), self._context():
            outputs = self.model(**inputs)
        return {name: outputs[name] for name in self._compared(outputs)}

    def _compared(self, outputs: Mapping[str, Any]) -> list[str]:
        """Names of what is compared, logits if there are any."""
        if not isinstance(outputs, Mapping):
            raise ValueError(
                f"{type(self.model).__name__} gives a {type(outputs).__name__}, which does not tell what is compared: "
                "set return_dict to True"
            )
        found = [name for name in LOGITS if isinstance(outputs.get(name), Tensor)]
        names = found or [name for name in (HIDDEN,) if name in outputs]
        if not names:
            raise ValueError(
                f"{type(self.model).__name__} gives {', '.join(outputs)}, and none of {', '.join(LOGITS)} or {HIDDEN} "
                "that another model could learn: give one of a class that does"
            )
        of_tokens = outputs[names[0]].dim() == 3 or (outputs[names[0]].dim() == 2 and self._detects)
        self._rows = not of_tokens or names[0] not in (HIDDEN, *LOGITS_OF_POSITIONS)
        self.numbers = sum(self._numbers(name, outputs[name]) for name in names)
        return names

    def _numbers(self, name: str, outputs: Tensor) -> int:
        if name in ANSWERS or (outputs.dim() == 2 and self._is_detection(name)):
            return 1  # of each position
        return outputs.shape[1 if outputs.dim() == 4 else -1]

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
            ValueError: The student has no such outputs, or of other shapes; padding cannot be told.
        """
        parts, mask = [], self._mask(inputs)
        _check_padding(teacher, mask, inputs)
        for name, wanted in teacher.items():
            given = student.get(name) if isinstance(student, Mapping) else None
            if given is None or given.shape != wanted.shape:
                shape = "none" if given is None else str(tuple(given.shape))
                raise ValueError(
                    f"the teacher's {name} have the shape {tuple(wanted.shape)}, the student's {shape}: give a teacher "
                    "of the same class, vocabulary and width"
                )
            given, wanted = given.float(), wanted.to(given.device).float()
            if name == HIDDEN and given.dim() == 3:
                parts.append(_of_hidden(given, wanted, _or_everywhere(mask, given)))
                continue
            (given, weights), (wanted, _) = self._rows_of(name, given, mask), self._rows_of(name, wanted, mask)
            each = self._divergence(name, given, wanted)
            parts.append((each * weights).sum() / weights.sum().clamp_min(torch.finfo(each.dtype).tiny))
        return sum(parts)

    def _rows_of(self, name: str, outputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs as (things, classes), and what each thing counts: those of padding are left out.

        Of a text as a whole, where positions count, it counts as many as the text has; where an answer begins is no
        padding.
        """
        if outputs.dim() == 4:  # of images: classes are channels
            outputs = outputs.movedim(1, -1)
        of_positions = mask is not None and outputs.shape[:2] == mask.shape
        if outputs.dim() == 2 and of_positions and self._is_detection(name):
            outputs = outputs[..., None]
        elif outputs.dim() == 2 and of_positions and name in ANSWERS:
            outputs = outputs.masked_fill(~mask, -1e9)
        if outputs.dim() > 2:
            outputs = outputs[mask] if of_positions else outputs.flatten(0, -2)
        elif mask is not None and not self._rows:
            return outputs, mask.sum(1).to(outputs)
        return outputs, outputs.new_ones(len(outputs))

    def _is_yes_or_no(self, name: str) -> bool:
        return self._problem == "multi_label_classification" or self._is_detection(name)

    def _is_detection(self, name: str) -> bool:
        return name == "logits" and self._detects

    def _divergence(self, name: str, given: Tensor, wanted: Tensor) -> Tensor:
        """Of each thing, (things, classes) -> (things,)."""
        if self._problem == "regression" or (given.shape[-1] == 1 and not self._is_yes_or_no(name)):
            return (given - wanted).square().mean(-1)
        given, wanted, scale = given / self.temperature, wanted / self.temperature, self.temperature**2
        if self._is_yes_or_no(name):
            chance = wanted.sigmoid()
            from_itself = F.binary_cross_entropy_with_logits(wanted, chance, reduction="none")
            return scale * (F.binary_cross_entropy_with_logits(given, chance, reduction="none") - from_itself).sum(-1)
        logs = F.log_softmax(wanted, dim=-1)
        return scale * (logs.exp() * (logs - F.log_softmax(given, dim=-1))).sum(-1)

    def probe(self, outputs: Mapping[str, Tensor], inputs: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """A scalar of a model's own outputs whose gradients by them, drawn at random, have the curvature of
        ``distance`` for their second moments: the log-probabilities of drawn classes, or sums of drawn signs.

        Summed over positions, or rows.
        """
        compared, mask, parts = {name: outputs[name] for name in self._compared(outputs)}, self._mask(inputs), []
        _check_padding(compared, mask, inputs)
        for name, given in compared.items():
            given = given.float()
            if name == HIDDEN and given.dim() == 3:
                parts.append(_probe_of_hidden(given, _or_everywhere(mask, given), generator))
                continue
            given, weights = self._rows_of(name, given, mask)
            parts.append((self._probe_of_rows(name, given, generator) * weights.sqrt()).sum())
        return sum(parts)

    def _probe_of_rows(self, name: str, given: Tensor, generator: torch.Generator) -> Tensor:
        if self._problem == "regression" or (given.shape[-1] == 1 and not self._is_yes_or_no(name)):
            return (_signs(given, generator) * given).sum(-1)
        drawn = torch.rand(given.shape if self._is_yes_or_no(name) else (len(given), 1), generator=generator).to(given)
        if self._is_yes_or_no(name):
            yes = (drawn < given.detach().sigmoid()).to(given)
            return -F.binary_cross_entropy_with_logits(given, yes, reduction="none").sum(-1)
        chosen = (given.detach().softmax(-1).cumsum(-1) < drawn).sum(-1).clamp(max=given.shape[-1] - 1)
        return F.log_softmax(given, dim=-1).gather(-1, chosen[:, None])[:, 0]

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _mask(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Which positions count, (rows, positions); of an encoder-decoder those of its target."""
        if self._translates:
            mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
            if mask is None and isinstance(labels, Tensor) and labels.dim() == 2:
                return labels.ne(IGNORED)
            ids = inputs.get("decoder_input_ids")
            if mask is not None or ids is not None:
                return torch.ones_like(ids, dtype=torch.bool) if mask is None else positions_that_count(mask)
        mask = inputs.get("attention_mask")  # of a decoder that is given the source too
        if isinstance(mask, Tensor) and mask.dim() in (2, 4):
            return positions_that_count(mask)
        ids = inputs.get("input_ids")
        return torch.ones_like(ids, dtype=torch.bool) if isinstance(ids, Tensor) and ids.dim() == 2 else None


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


def _check_padding(outputs: Mapping[str, Tensor], mask: Tensor | None, inputs: Mapping[str, Any]) -> None:
    """Raises a ValueError where sounds are padded, which become fewer frames than their mask has positions."""
    if mask is None or "input_ids" in inputs or mask.all():
        return
    for name, output in outputs.items():
        if output.dim() == 3 and output.shape[:2] != mask.shape:
            raise ValueError(
                f"{name} have positions of shape {tuple(output.shape[:2])}, the attention mask {tuple(mask.shape)}, so "
                "padding cannot be left out: give batches without padding"
            )


def _or_everywhere(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """The mask, where it is one of these positions; else all of them."""
    if mask is not None and mask.shape == hidden.shape[:2]:
        return mask
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)


def _relative(given: Tensor, wanted: Tensor) -> Tensor:
    return (given - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(torch.finfo(wanted.dtype).tiny)


def _main(inputs: Mapping[str, Any]) -> Tensor:
    """What a batch is a batch of."""
    named = [inputs[name] for name in ("input_ids", "inputs_embeds") if isinstance(inputs.get(name), Tensor)]
    return next(iter([*named, *(value for value in inputs.values() if isinstance(value, Tensor))]))
