"""`Rule`: what happens in a training step beside the optimizer's own update."""

from typing import Protocol

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerState, TrainingArguments


class Run(Protocol):
    """What a rule sees of a training run. The trainer is one."""

    model: nn.Module
    args: TrainingArguments
    state: TrainerState
    accelerator: Accelerator
    model_init: object | None  # what makes the model anew for every call of ``train``
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    waits_for_switch: bool  # the model is still dense: it is factorized in the middle of the run


class Rule(TrainerCallback):
    """Something that acts within a training step; every method may be left as it is, doing nothing.

    Pass rules of your own with the other callbacks: ``FNLTrainer(..., callbacks=[MyRule()])``. The trainer's own come
    first, yours follow in the order given. As callbacks they also hear ``on_train_begin`` and all the other events;
    one that defines ``on_step_end`` itself calls ``after_step`` itself, if it has one.

    Attributes:
        run: The training run, from ``bind`` on. Read ``run.model`` afresh at every use: its parameters are replaced by
            whatever wraps, shards, loads or factorizes it.
    """

    run: Run | None = None

    def bind(self, run: Run) -> None:
        """Once, when the rule joins a trainer."""
        self.run = run

    def prepare(self) -> None:
        """At the start of ``train``: the model is whole, and neither wrapped nor in an optimizer of this run."""

    def before_load(self, checkpoint: str) -> None:
        """The weights of a checkpoint are about to be read into the model, to resume from it or as the best one."""

    def attach(self, optimizer: Optimizer) -> None:
        """Once for every optimizer that is made, before its first step; the raw one, without accelerate's wrapper.

        Optimizer hooks are registered here, and what cannot work with this optimizer is refused.
        """

    def after_backward(self, scale: float, logged: bool) -> None:
        """Once per optimizer step: gradients are summed over micro-batches and processes, and not yet clipped.

        Args:
            scale: What gradients are multiplied by at this point; other than 1 under fp16's loss scaling alone. What
                is added to them is multiplied by it too.
            logged: Whether the step will be logged.
        """

    def after_step(self) -> None:
        """After the optimizer's step; ``run.state.global_step`` counts it already."""

    def leave(self) -> None:
        """When ``train`` ends, also by an error or Ctrl-C: what holds for the time of a run is undone here."""

    def covered(self) -> set[nn.Parameter]:
        """The parameters whose weight decay this rule replaces: they get none."""
        return set()

    def logs(self) -> dict[str, float]:
        """What joins the loss in the log; asked whenever a loss is logged."""
        return {}

    def results(self) -> dict[str, float]:
        """What joins the metrics that ``train`` returns."""
        return {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Refuse a trainer that knows no rules.

        Raises:
            ValueError: It is no `FNLTrainer`.
        """
        if self.run is None:
            raise ValueError(f"{type(self).__name__} is a rule, which only FNLTrainer and FNLSeq2SeqTrainer follow")

    def on_step_end(self, args, state, control, **kwargs):
        """The event behind ``after_step``."""
        self.after_step()
