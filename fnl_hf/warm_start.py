"""`factorize_at`: train the dense model first, factorize it in the middle of the run, and go on.

The switch takes the path of resume: the dense model and optimizer become factorized ones in memory, they are saved as
an ordinary checkpoint, and training resumes from that. Whatever wrapped the dense model (DDP, `torch.compile`) is
made anew, and a run that is killed at any moment resumes to the same end: before the switch from a dense checkpoint,
after it from a factorized one. The optimizer's state goes along: see `fnl_hf.optimizer_state`.
"""

import json
import os
import shutil
from collections.abc import Mapping

import torch
from accelerate.utils import broadcast
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from .config import FNLConfig
from .divergence import check_finite
from .factorization import factorizations, is_factorized
from .measure import mean_stable_rank
from .messages import say
from .optimizer_state import Before, carry_state
from .patching import factorize, install
from .plan import Plan, Target
from .planning import nothing_found, plan

STABLE = "stable"
_CHECKS = 40  # looks at the stable ranks in a run
_SETTLED = 0.05  # largest relative change of a stable rank between two looks that counts as settled
_LATEST = 0.5  # share of the run after which "stable" no longer waits


class SwitchNow(Exception):
    """Ends the dense part of a run, after the step's log and evaluation, in place of its checkpoint."""


class WarmStart(TrainerCallback, ExportableState):
    """Decides when a run switches from the dense to the factorized model.

    Args:
        at: "300", a step; "0.25", a fraction of the steps; "stable": when the stable rank of every target has settled
            (Wang et al., Cuttlefish, MLSys 2023), which is looked at 40 times in a run, and by its half at the latest.
        config: What the model will be factorized as: an `FNLConfig` or its dict.

    Raises:
        ValueError: ``at`` is none of the three.
    """

    def __init__(self, at: str, config: FNLConfig | dict):
        self.at = at
        self.config = config if isinstance(config, FNLConfig) else FNLConfig.from_dict(config)
        self.step, self.fraction = parse_switch(at)
        self.stable_ranks: list[float] | None = None  # at the last look, one per target
        self.due = False

    def state(self) -> dict:
        """What a checkpoint keeps of it: the stable ranks of the last look."""
        return {
            "args": {"at": self.at, "config": self.config.to_dict()},
            "attributes": {"stable_ranks": self.stable_ranks},
        }

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Fail at start and not at the switch; go on from a checkpoint's last look."""
        self.due = False
        stored = state.stateful_callbacks.setdefault(type(self).__name__, {})
        self.stable_ranks = stored.get("attributes", {}).get("stable_ranks", self.stable_ranks)
        if self.switch_step(state.max_steps) >= state.max_steps:
            raise ValueError(
                f"factorize_at is {self.at!r}, but the run has {state.max_steps} steps: the model would stay dense; "
                "give an earlier step, a fraction below 1, or factorize it before training"
            )
        if not is_factorized(model):
            self.targets = targets(model, self.config)
            say(f"fnl_hf: the model stays dense until factorize_at = {self.at}")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Ask for a checkpoint at the switch: the trainer then switches in its place."""
        if not is_factorized(model) and (
            state.global_step >= self.switch_step(state.max_steps) or self._settled(args, state, model)
        ):
            self.due = control.should_log = control.should_save = True
        return control

    def switch_step(self, max_steps: int) -> int:
        """The step after which the model is factorized, at the latest for "stable"."""
        return self.step if self.step is not None else max(1, round(self.fraction * max_steps))

    def _settled(self, args, state, model) -> bool:
        if self.at != STABLE or state.global_step % max(1, state.max_steps // _CHECKS):
            return False
        try:
            ranks = [mean_stable_rank(target.found(model)) for target in self.targets]
        except torch.linalg.LinAlgError:
            check_finite(model, state.global_step)
            raise
        before, self.stable_ranks = self.stable_ranks, ranks
        if before is None:
            return False
        settled = all(abs(new - old) < _SETTLED * old for old, new in zip(before, self.stable_ranks, strict=True))
        # The main process decides for all: rounding must not make one switch without the others.
        return bool(broadcast(torch.tensor(int(settled), device=args.device)))


def parse_switch(at: str) -> tuple[int | None, float]:
    """(step, fraction) of ``factorize_at``: one of them counts.

    Raises:
        ValueError: Neither a step of at least 1, nor a fraction in (0, 1), nor "stable".
    """
    if at == STABLE:
        return None, _LATEST
    try:
        step, fraction = (int(at), 0.0) if str(at).strip().isdigit() else (None, float(at))
    except ValueError:
        step, fraction = None, -1.0
    if step == 0 or (step is None and not 0 < fraction < 1):
        raise ValueError(
            f"factorize_at is {at!r}, expected a step such as 300, a fraction of the run such as 0.25, or 'stable'"
        )
    return step, fraction


@torch.no_grad()
def switch(model: nn.Module, config: FNLConfig, state: Mapping[str, dict]) -> dict[str, dict]:
    """Factorize a dense model in place, and carry the state of its optimizer.

    Args:
        state: parameter name -> what the optimizer keeps of it.

    Returns:
        The same for the factorized model; parameters that start anew are missing.
    """
    dense = dict(model.named_parameters())
    before = {target.name: Before.of(target.found(model)) for target in targets(model, config)}
    factorize(model, config)
    moves = [(before[product.name], product) for product in factorizations(model)]
    carried = carry_state(moves, {dense[name]: kept for name, kept in state.items()})
    factors = {p for _, product in moves for view in product.views for p in (view.parameter, view.bias)}
    kept = {
        name: carried.get(parameter) if parameter in factors else state.get(name)
        for name, parameter in model.named_parameters()
    }
    return {name: values for name, values in kept.items() if values}


def targets(model: nn.Module, config: FNLConfig) -> tuple[Target, ...]:
    """What ``factorize`` will make of a dense model.

    Raises:
        ValueError: Nothing, or a config that does not fit: as ``factorize`` raises.
    """
    planned = plan(model, config)
    if not planned.targets:
        raise ValueError(nothing_found(model, config, planned))
    return planned.targets


# ----------------------------------------------------------------------------------------------------


class WarmStartMixin:
    """The part of the trainers that switches."""

    def _set_up_warm_start(self, config: FNLConfig | None) -> None:
        """Called once the trainer is built.

        Raises:
            ValueError: One of ``factorize_at`` and ``fnl_config`` without the other; a setting that the switch cannot
                keep exact.
        """
        at = self.args.factorize_at
        self._warm_start = None
        if at is None and config is None:
            return
        if at is None or config is None:
            given, lacking = ("fnl_config", "factorize_at") if at is None else ("factorize_at", "fnl_config")
            raise ValueError(
                f"{given} is given without {lacking}: a warm start takes FNLTrainer(fnl_config=FNLConfig(...)) and "
                "factorize_at in its arguments; to factorize before training, call fnl_hf.factorize(model, config)"
            )
        obstacles = {
            "FSDP (its shards hold the dense parameters)": self.is_fsdp_enabled,
            "DeepSpeed (its engine holds the dense parameters)": self.is_deepspeed_enabled,
            "optimizers=(...) (a new one must be made for the factors)": self.optimizer is not None,
            "model_init": self.model_init is not None,
            "restore_callback_states_from_checkpoint (the switch restores its own)": (
                self.args.restore_callback_states_from_checkpoint
            ),
            "save_only_model (the switch goes through a checkpoint)": self.args.save_only_model,
            "save_strategy='best'": self.args.save_strategy == "best",
            "neftune_noise_alpha": self.neftune_noise_alpha is not None,
        }
        if obstacle := next((name for name, present in obstacles.items() if present), None):
            raise ValueError(
                f"factorize_at does not work with {obstacle}: drop that, or train the dense model, call "
                "fnl_hf.factorize(model, config) and train on"
            )
        self._warm_start = WarmStart(at, config)
        self.add_callback(self._warm_start)

    @property
    def switches(self) -> bool:
        """Whether this is a run in the middle of which the model is factorized."""
        return self._warm_start is not None

    @property
    def waits_for_switch(self) -> bool:
        """Whether the model is still dense and will be factorized in the middle of the run."""
        return self._warm_start is not None and not is_factorized(self.model)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As in `Trainer`; with ``factorize_at`` it trains the dense model, switches, and trains the factorized one."""
        if self._warm_start is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        stored = _stored_config(resume_from_checkpoint)
        if stored is not None and not is_factorized(self.model):
            install(self.model, stored, Plan.of(stored))  # the values of its factors come with the weights
        if is_factorized(self.model) and stored is None:
            raise ValueError(
                "factorize_at is given, but the model is factorized already: drop factorize_at and fnl_config, or call "
                "fnl_hf.to_dense(model) first"
            )
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except SwitchNow:
            self._close_progress_bar()
            checkpoint = self._switch()
        output = super().train(checkpoint, *args, **kwargs)
        if self.args.save_strategy == "no" and self.is_world_process_zero():
            shutil.rmtree(checkpoint)
        return output

    def _save_checkpoint(self, model, trial):
        if self._warm_start is not None and self._warm_start.due:
            raise SwitchNow
        super()._save_checkpoint(model, trial)

    def _close_progress_bar(self) -> None:
        """The run goes on in a bar of its own."""
        for callback in self.callback_handler.callbacks:
            if getattr(callback, "training_bar", None) is not None:
                callback.training_bar.close()

    def _switch(self) -> str:
        """Factorize model and optimizer in place and save them: the checkpoint to go on from."""
        self._warm_start.due = False
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        dense = self.optimizer.optimizer  # without accelerate's wrapper
        carried = switch(self.model, self._warm_start.config, {names[p]: state for p, state in dense.state.items()})
        self.model_wrapped, self.optimizer = self.model, None
        optimizer = self.create_optimizer()
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for group, before in zip(optimizer.param_groups, dense.param_groups, strict=True):
            group.update({key: value for key, value in before.items() if key not in ("params", "weight_decay")})
            for parameter in group["params"]:
                if names[parameter] in carried:
                    optimizer.state[parameter] = carried[names[parameter]]
        self.state.best_metric = self.state.best_model_checkpoint = self.state.best_global_step = (
            None  # of dense models
        )
        self._save_checkpoint(self.model, None)
        self.accelerator.wait_for_everyone()  # the main process writes what all read
        return os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")


def _stored_config(checkpoint: str | None) -> FNLConfig | None:
    """The config of a factorized checkpoint; None for a dense one, or no checkpoint."""
    try:
        with open(os.path.join(checkpoint or "", "config.json"), encoding="utf-8") as file:
            stored = json.load(file).get("quantization_config")
    except FileNotFoundError:
        return None
    return FNLConfig.from_dict(stored) if stored and stored.get("quant_method") == "fnl" else None
