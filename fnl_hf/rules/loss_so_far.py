"""What a checkpoint keeps of the training loss, so that a resumed run reports what an uninterrupted one does."""

from typing import Any

import torch
from transformers.trainer_callback import ExportableState

from .rule import Rule


class LossSoFar(Rule, ExportableState):
    """The sums behind the logged loss and ``train_loss``, which the Trainer starts anew with every call of ``train``.

    Every `FNLTrainer` has this rule.

    Attributes:
        since: The step from which on the losses are summed: 0, but for a run that goes on from a checkpoint without
            these sums.
        saved: What goes into the next checkpoint.
    """

    def __init__(self):
        self.since = 0
        self.saved: dict[str, Any] = {}

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"saved": self.saved}}

    def on_train_begin(self, args, state, control, **kwargs):
        """Go on from the sums of the checkpoint: of the step that it was saved at, not of another."""
        super().on_train_begin(args, state, control)
        stored = state.stateful_callbacks.setdefault(type(self).__name__, {})
        saved = stored.get("attributes", {}).get("saved") or {}
        if saved.get("step") == state.global_step:
            self.since = saved["since"]
            self.run._total_loss_scalar = saved["total"]
            self.run._globalstep_last_logged = saved["last_logged"]
            self.run._tr_loss = torch.full_like(self.run._tr_loss, saved["unlogged"])
        else:
            self.since = state.global_step

    def before_save(self) -> None:
        """Called on all processes; of the losses since the last log the mean over them is kept, as it is logged."""
        run, unlogged = self.run, self.run._tr_loss.detach().clone()
        if run.accelerator.num_processes > 1:
            unlogged = run.accelerator.gather(unlogged.reshape(1)).mean()
        self.saved = {
            "step": run.state.global_step,
            "since": self.since,
            "total": run._total_loss_scalar,
            "last_logged": run._globalstep_last_logged,
            "unlogged": unlogged.item(),
        }

    def mean(self) -> float:
        """The mean over the steps of the run; ``_total_loss_scalar`` then holds all of them."""
        return self.run._total_loss_scalar / max(self.run.state.global_step - self.since, 1)
