"""`FNLTrainingArguments`: those of transformers, and those of decay, our optimizers, the warm start and ranks."""

import math
from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .decay import check_coefficient
from .rules.frobenius_decay import SCHEDULES
from .warm_start import parse_switch

_MODES = ("auto", "coupled", "decoupled")
_OPTIMIZERS = ("lamb", "nag", "spectron")
_ADAPTATIONS = ("dlrt", "tdlrt")


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
        rank_adaptation (`str`, *optional*):
            `"dlrt"`: layers of factors and narrow heads are trained as U S Vᵀ whose rank adapts (Schotthöfer et al.,
            NeurIPS 2022 and arXiv 2505.08022). Every `rank_interval` steps the orthonormal U and V grow by the
            gradient's directions, up to twice the rank; S is trained; its singular values settle the rank, one for all
            heads of a layer. `fnl_hf.fix_ranks(model)` makes ordinary factors of the result.
        rank_tolerance (`float`, defaults to 0.1):
            What the singular values that are cut off may be together, as a share of the norm of all. New directions
            stay if a cycle makes them larger than this: for short cycles it must be far smaller.
        rank_interval (`int`, defaults to 100):
            Optimizer steps between two changes of the rank. 1: every step is a whole cycle.
        rank_min (`int`, defaults to 2), rank_max (`int`, *optional*):
            Bounds of every rank after a cut. Not given: half of what a layer's matrix can have, or of the width of
            heads. Heads never keep all of their width, so that their bases can turn.
        log_factorizations (`bool`, defaults to `True`):
            Log norms, effective rank and balance of the factorizations beside the loss.

    Raises:
        ValueError: An argument is none of what it may be, a coefficient negative or not finite, the switch would come
            after the run, or two arguments exclude each other.
        NotImplementedError: ``rank_adaptation="tdlrt"``, which is not built yet.
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

    # Rank adaptation
    rank_adaptation: str | None = field(
        default=None,
        metadata={
            "help": "dlrt: layers of factors and narrow heads are trained as U S V^T whose rank adapts: every "
            "--rank_interval steps U and V grow by the gradient's directions, S is trained, and its singular values "
            "settle the rank. none: ranks stay as they are.",
            "choices": ("dlrt", "none"),
        },
    )
    rank_tolerance: float = field(
        default=0.1,
        metadata={
            "help": "What may be cut off of a product, as a share of its norm, when its rank is settled; far smaller "
            "for short cycles, in which new directions grow little."
        },
    )
    rank_interval: int = field(
        default=100,
        metadata={"help": "Optimizer steps between two changes of the rank. 1: every step is a whole cycle."},
    )
    rank_min: int = field(
        default=2, metadata={"help": "Lowest rank after a cut, where a matrix or heads can have that."}
    )
    rank_max: int | None = field(
        default=None,
        metadata={"help": "Highest rank after a cut. Not given: half of what a matrix, or the width of heads, allows."},
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
        self._check_ranks()
        if self.frobenius_decay is not None:
            check_coefficient(self.frobenius_decay, "frobenius_decay")
        for name, known in (
            ("frobenius_decay_mode", _MODES),
            ("frobenius_decay_schedule", tuple(SCHEDULES)),
            ("fnl_optim", (None, *_OPTIMIZERS)),
            ("rank_adaptation", (None, *_ADAPTATIONS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {known}")

    def _check_ranks(self) -> None:
        if self.rank_adaptation == "none":
            self.rank_adaptation = None
        if self.rank_adaptation == "tdlrt":
            raise NotImplementedError(
                "rank_adaptation='tdlrt' (ranks of Tucker factors) is not built yet: use 'dlrt', which adapts the "
                "ranks of matrices, those of convolutions too"
            )
        bounds = {"rank_tolerance": 0.1, "rank_interval": 100, "rank_min": 2, "rank_max": None}
        for name, default in bounds.items():
            value = getattr(self, name)
            if self.rank_adaptation is None and value != default:
                raise ValueError(
                    f"{name} is {value!r}, but rank_adaptation is None: set rank_adaptation='dlrt' too, or leave it out"
                )
            if name == "rank_tolerance":
                if not 0 <= value < 1:
                    raise ValueError(f"rank_tolerance is {value!r}, expected at least 0 and below 1: a share of a norm")
            elif value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}, expected an int of at least 1")
        if self.rank_max is not None and self.rank_min == bounds["rank_min"]:
            self.rank_min = min(self.rank_min, self.rank_max)
        if self.rank_max is not None and self.rank_max < self.rank_min:
            raise ValueError(f"rank_max is {self.rank_max}, below rank_min {self.rank_min}: swap or widen them")
        if self.rank_adaptation is not None:
            for name, value, why in (
                ("factorize_at", self.factorize_at, "factorize before training (fnl_hf.factorize)"),
                ("fnl_optim", self.fnl_optim if self.fnl_optim == "spectron" else None, "its steps are of two factors"),
            ):
                if value is not None:
                    raise ValueError(
                        f"rank_adaptation={self.rank_adaptation!r} does not work with {name}={value!r}: leave out one "
                        f"of them ({why})"
                    )


@dataclass
class FNLTrainingArguments(FNLArguments, TrainingArguments):
    """`TrainingArguments` with those of `FNLArguments`, at the same defaults."""


@dataclass
class FNLSeq2SeqTrainingArguments(FNLArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with those of `FNLArguments`, at the same defaults."""
