"""`factorize_at`: train the dense model first, factorize it in the middle of the run, and go on.

The switch takes the path of resume: the dense model and optimizer become factorized ones in memory, they are saved as
an ordinary checkpoint, and training resumes from that. Whatever wrapped the dense model (DDP, `torch.compile`) is
made anew, and a run that is killed at any moment resumes to the same end: before the switch from a dense checkpoint,
after it from a factorized one.

Optimizer state: what is not factorized keeps its own. Moments of the factors are carried over, since a factor's
gradient follows exactly from the gradient of the head that it came from (``algebra.chain.carry``); a reset would throw
away the direction and, with bias correction long over, make the first steps several times too large. A state that
carries no meaning there (Adafactor's rows and columns, 8-bit blocks) starts anew, as for a parameter never seen.
"""

import json
import os
import shutil
from collections.abc import Mapping

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from .config import FNLConfig
from .factorization import Factorization, factorizations
from .patching import factorize, install
from .plan import Plan, Target, attached
from .planning import nothing_found, plan

# Names of what optimizers keep per parameter, by its power of the gradient
_MOMENTS = {
    "exp_avg": 1, "momentum_buffer": 1, "velocity": 1, "grad_avg": 1,
    "exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2, "sum": 2,
}  # fmt: skip

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
        if attached(model) is None:
            self.targets = targets(model, self.config)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Ask for a checkpoint at the switch: the trainer then switches in its place."""
        if attached(model) is None and (
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
        before, self.stable_ranks = self.stable_ranks, [stable_rank(t.found(model)) for t in self.targets]
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


def targets(model: nn.Module, config: FNLConfig) -> tuple[Target, ...]:
    """What ``factorize`` will make of a dense model.

    Raises:
        ValueError: Nothing, or a config that does not fit: as ``factorize`` raises.
    """
    planned = plan(model, config)
    if not planned.targets:
        raise ValueError(nothing_found(model, config, planned))
    return planned.targets


@torch.no_grad()
def stable_rank(product: Factorization) -> float:
    """‖W‖²_F / ‖W‖²₂, the mean over heads: 1 for rank one, at most the width of a head."""
    energies = product.form.spectrum(product.form.decay_grams(product.tensors())).square()  # (*batch, rank)
    return float((energies.sum(-1) / energies.amax(-1).clamp_min(torch.finfo(energies.dtype).tiny)).mean())


def restore_structure(model: nn.Module, stored: FNLConfig) -> None:
    """Give a dense model the factors of a stored plan; their values are still to be loaded."""
    install(model, stored, Plan.of(stored))


@torch.no_grad()
def switch(model: nn.Module, config: FNLConfig, state: Mapping[str, dict]) -> dict[str, dict]:
    """Factorize a dense model in place, and carry the state of its optimizer.

    Args:
        state: parameter name -> what the optimizer keeps of it.

    Returns:
        The same for the factorized model; parameters that start anew are missing.
    """
    dense = dict(model.named_parameters())
    before = {}
    for target in targets(model, config):
        product = target.found(model)
        before[target.name] = product.views, [factor.clone() for factor in product.augmented()]
    factorize(model, config)
    moves = [(*before[product.name], product) for product in factorizations(model)]
    covered = {p for *_, product in moves for view in product.views for p in (view.parameter, view.bias)}
    kept, old, new = {}, {}, {}
    for name, parameter in model.named_parameters():
        if parameter not in covered:
            kept[name] = state.get(name, {})
        elif name in state and _has_only_moments(state[name], dense[name]):
            old[dense[name]] = state[name]
            new[parameter] = {key: _blank(value, key, dense[name], parameter) for key, value in state[name].items()}
    written = {parameter: torch.zeros_like(parameter) for parameter in new}
    for views, factors, product in moves:
        _carry(views, factors, product, old, new)
        for view, factor in zip(product.views, product.augmented(), strict=True):
            view.write(torch.ones_like(factor), lambda p: written[p] if p in written else torch.zeros_like(p))
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, values in new.items():
        # Rows of a fused weight that no product reads have no place in a narrower one: it starts anew.
        if parameter.shape == dense[names[parameter]].shape or written[parameter].all():
            kept[names[parameter]] = values
    return {name: values for name, values in kept.items() if values}


def _carry(views, factors: list[Tensor], product: Factorization, old: dict, new: dict) -> None:
    """The moments of one product, from the dense parameters' state into the new ones'."""
    for key, power in _MOMENTS.items():
        known = {parameter: state[key] for parameter, state in old.items() if state.get(key) is not None}
        if not any(view.parameter in known for view in views):
            continue
        moments = [view.augmented(lambda p: known[p] if p in known else torch.zeros_like(p)) for view in views]  # noqa: B023
        targets = {parameter: state[key] for parameter, state in new.items() if key in state}
        carried = product.form.carry(factors, product.augmented(), moments, power)
        for view, moment in zip(product.views, carried, strict=True):
            view.write(moment, lambda p: targets[p] if p in targets else torch.zeros_like(p))  # noqa: B023


def _has_only_moments(state: dict, parameter: Tensor) -> bool:
    """Whether every tensor in an optimizer's state is a moment that can be carried, or a count."""
    tensors = {key: value for key, value in state.items() if torch.is_tensor(value) and value.dim()}
    return all(key in _MOMENTS and value.shape == parameter.shape for key, value in tensors.items())


def _blank(value, key: str, old: Tensor, new: Tensor):
    """A state's entry for the new parameter: a moment to be written into, or the count as it is."""
    if key not in _MOMENTS or value is None:
        return value
    return value.clone() if old.shape == new.shape else value.new_zeros(new.shape)


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
    def _waits_for_switch(self) -> bool:
        return self._warm_start is not None and attached(self.model) is None

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As in `Trainer`; with ``factorize_at`` it trains the dense model, switches, and trains the factorized one."""
        if self._warm_start is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        stored = _stored_config(resume_from_checkpoint)
        if stored is not None and attached(self.model) is None:
            restore_structure(self.model, stored)
        if attached(self.model) is not None and stored is None:
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
        options = {
            names[parameter]: {key: value for key, value in group.items() if key not in ("params", "weight_decay")}
            for group in dense.param_groups
            for parameter in group["params"]
        }
        carried = switch(self.model, self._warm_start.config, {names[p]: state for p, state in dense.state.items()})
        self.model_wrapped, self.optimizer = self.model, None
        optimizer = self.create_optimizer()
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                group.update(options[names[parameter]])
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
