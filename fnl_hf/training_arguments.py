"""`FNLTrainingArguments`: those of transformers, and those of decay, the two optimizers and the warm start."""

import math
from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .decay import check_coefficient
from .rules.frobenius_decay import SCHEDULES
from .warm_start import parse_switch

_MODES = ("auto", "coupled", "decoupled")
_OPTIMIZERS = ("lamb", "nag", "spectron")


@dataclass
class FNLArguments:
    """What both classes of training arguments add. No default of transformers is changed.

    Args:
        frobenius_decay (`float`, *optional*):
            Coefficient of the Frobenius decay of every factorization. Not given: that of `weight_decay`, the rule of
            Khodak et al. (ICLR 2021). 0: none; the factors then take weight decay as all other weights do.
        frobenius_decay_kinds (`list[str]`, *optional*):
            Kinds that decay, such as `["ov"]`; `"qk"` includes its rotary form. Not given: all.
        frobenius_decay_mode (`str`, defaults to `"auto"`):
            `"coupled"`: the gradient of the decay joins the loss's, before clipping. `"decoupled"`: factors shrink
            beside the optimizer's step, by learning rate x coefficient x gradient. `"auto"`: coupled for SGD and NAG,
            else decoupled.
        frobenius_decay_schedule (`str`, defaults to `"constant"`):
            The coefficient over the run: `"constant"`, or down to 0 by a line (`"linear"`) or a cosine (`"cosine"`).
        fnl_optim (`str`, *optional*):
            An optimizer beside those of `optim`. `"lamb"`: with decoupled decay FLAMBé, with coupled decay the paper's
            LAMB + FD; betas and epsilon from `adam_*`. `"nag"`: fairseq's Nesterov momentum (0.99, or `optim_args`).
            `"spectron"`: steps of bounded spectral norm on hidden matrices and products of two factors (momentum 0.95,
            or `optim_args`), AdamW with the usual arguments on everything else; a dense model is trained by Muon.
            Decoupled decay goes at its own rate: a coefficient counts `factor_learning_rate / learning_rate` times what
            it does under AdamW.
        factor_learning_rate (`float`, *optional*):
            Of Spectron: how far a product moves in a step, by spectral norm, at the top of the schedule; 0.03 if not
            given.
        factorize_at (`str`, *optional*):
            Train the dense model first and factorize it after this step (`"300"`), this share of the run (`"0.25"`),
            or when the stable ranks have settled (`"stable"`; by half the run at the latest). The config goes to
            `FNLTrainer(fnl_config=...)`.
        distillation_weight (`float`, defaults to 1):
            With `FNLTrainer(teacher=...)`: the share of the loss that comes from the teacher's outputs; the rest is the
            model's own, from labels. At 1 no labels are needed.
        distillation_temperature (`float`, defaults to 1):
            Of the teacher's and the student's logits, before they become probabilities.
        log_factorizations (`bool`, defaults to `True`):
            Log norms, effective rank and balance of the factorizations beside the loss.

    Raises:
        ValueError: An argument is none of what it may be, a coefficient negative or not finite, or the switch would
            come after the run.
    """

    # Frobenius decay
    frobenius_decay: float | None = field(
        default=None,
        metadata={
            "help": "Coefficient of the Frobenius decay of every factorization. Not given: that of weight_decay, the "
            "paper's rule. 0: none; the factors then take weight decay as all other weights do."
        },
    )
    frobenius_decay_kinds: list[str] | None = field(
        default=None,
        metadata={"help": "Kinds that decay, such as `ov`; `qk` includes its rotary form. Not given: all."},
    )
    frobenius_decay_mode: str = field(
        default="auto",
        metadata={
            "help": "coupled: the gradient of the decay joins the loss's, before clipping. decoupled: factors shrink "
            "beside the optimizer's step, by learning rate x coefficient x gradient. auto: coupled for SGD and "
            "NAG, else decoupled.",
            "choices": _MODES,
        },
    )
    frobenius_decay_schedule: str = field(
        default="constant",
        metadata={
            "help": "The coefficient over the run: constant, or down to 0 by a line or a cosine.",
            "choices": SCHEDULES,
        },
    )

    # Optimizer
    fnl_optim: str | None = field(
        default=None,
        metadata={
            "help": "An optimizer beside those of --optim. lamb: with decoupled decay FLAMBé, with coupled decay the "
            "paper's LAMB + FD; betas and epsilon from adam_*. nag: fairseq's Nesterov momentum (0.99, or "
            "--optim_args momentum=...). spectron: steps of bounded spectral norm on hidden matrices and products of "
            "two factors, AdamW on everything else. none: that of --optim.",
            "choices": (*_OPTIMIZERS, "none"),
        },
    )
    factor_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Of spectron: how far a product moves in a step, by spectral norm, at the top of the schedule; "
            "0.03 if not given."
        },
    )

    # Warm start
    factorize_at: str | None = field(
        default=None,
        metadata={
            "help": "Train the dense model first and factorize it after this step (300), this share of the run (0.25), "
            "or when the stable ranks have settled (stable; by half the run at the latest). train_runtime is "
            "then that of the steps after it. The config goes to FNLTrainer(fnl_config=...)."
        },
    )

    # Distillation
    distillation_weight: float = field(
        default=1.0,
        metadata={
            "help": "With a teacher: the share of the loss that comes from its outputs; the rest is the model's own, "
            "from labels. At 1 no labels are needed."
        },
    )
    distillation_temperature: float = field(
        default=1.0,
        metadata={"help": "Of the teacher's and the student's logits, before they become probabilities."},
    )

    # Logging
    log_factorizations: bool = field(
        default=True,
        metadata={"help": "Log norms, effective rank and balance of the factorizations beside the loss."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.fnl_optim == "none":
            self.fnl_optim = None
        if not 0 < self.distillation_weight <= 1:
            raise ValueError(f"distillation_weight is {self.distillation_weight}, expected a share in (0, 1]")
        if not (math.isfinite(self.distillation_temperature) and self.distillation_temperature > 0):
            raise ValueError(f"distillation_temperature is {self.distillation_temperature}, expected a number above 0")
        if self.factorize_at is not None:
            step, _ = parse_switch(self.factorize_at)
            if step is not None and 0 < self.max_steps <= step:  # steps counted from epochs: when training begins
                raise ValueError(
                    f"factorize_at is {self.factorize_at!r}, but the run has {self.max_steps} steps: give an earlier "
                    "step, or a fraction below 1"
                )
        if isinstance(self.frobenius_decay_kinds, str):
            self.frobenius_decay_kinds = [self.frobenius_decay_kinds]
        if self.factor_learning_rate is not None:
            if self.fnl_optim != "spectron":
                raise ValueError(
                    f"factor_learning_rate is {self.factor_learning_rate}, but fnl_optim is {self.fnl_optim!r}: it is "
                    "a rate of 'spectron'. Set that too, or leave it out"
                )
            if not 0 <= self.factor_learning_rate < 1:
                raise ValueError(
                    f"factor_learning_rate is {self.factor_learning_rate}, expected at least 0 and below 1: it bounds "
                    "how far a product moves in a step, by spectral norm"
                )
        if self.fnl_optim == "spectron" and self.optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(
                f"fnl_optim is 'spectron', which steps what is no hidden matrix by AdamW, but optim is "
                f"{str(getattr(self.optim, 'value', self.optim))!r}: leave it at 'adamw_torch_fused' or 'adamw_torch'"
            )
        if self.frobenius_decay is not None:
            check_coefficient(self.frobenius_decay, "frobenius_decay")
        for name, known in (
            ("frobenius_decay_mode", _MODES),
            ("frobenius_decay_schedule", tuple(SCHEDULES)),
            ("fnl_optim", (None, *_OPTIMIZERS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {known}")


@dataclass
class FNLTrainingArguments(FNLArguments, TrainingArguments):
    """`TrainingArguments` with those of `FNLArguments`, at the same defaults."""


@dataclass
class FNLSeq2SeqTrainingArguments(FNLArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with those of `FNLArguments`, at the same defaults."""
