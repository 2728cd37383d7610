"""Frobenius decay in a training run: which coefficient when, by which way in, and where it would be wrong."""

import math
import warnings
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from ..decay import add_decay_gradients, decay_step, decay_terms, decayed, of_kinds
from ..divergence import check_finite
from ..factorization import Factorization, factorizations
from ..messages import aligned, say
from ..optim import NAG, Lamb
from .rule import Rule

# name -> share of the coefficient at a share of the run
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2,
}

_HOOKS: WeakKeyDictionary[Optimizer, RemovableHandle] = WeakKeyDictionary()  # of the rule that decays in its steps


class FrobeniusDecay(Rule):
    """λ/2 Σ ‖product‖²_F, as the ``frobenius_decay…`` arguments ask for it; every `FNLTrainer` has this rule.

    Coupled, its gradient joins that of the loss before clipping (Khodak et al., ICLR 2021). Decoupled, the factors
    shrink beside the optimizer's step as under AdamW; in LAMB it stands where weight decay does, inside the trust
    ratio (FLAMBé). What is decayed is decided by the identity of parameters, never by their names.
    """

    _couples = False  # until an optimizer is attached
    _optimizer: Optimizer | None = None  # in whose steps factors shrink

    @property
    def coefficient(self) -> float:
        """λ: ``frobenius_decay``, or ``weight_decay`` where that is not given."""
        args = self.run.args
        return args.weight_decay if args.frobenius_decay is None else args.frobenius_decay

    def coefficient_now(self) -> float:
        """λ at this step of the run, by the schedule."""
        done = min(1.0, self.run.state.global_step / max(1, self.run.state.max_steps))
        return self.coefficient * SCHEDULES[self.run.args.frobenius_decay_schedule](done)

    def kinds(self) -> Sequence[str] | None:
        """The kinds that decay; None for all.

        Of a model that is factorized on the way those that it has: a budget may leave all layers of a kind dense, and
        that shows too late to stop the run.
        """
        asked = self.run.args.frobenius_decay_kinds
        if asked is None or not self.run.switches:
            return asked
        present = {product.family for product in factorizations(self.run.model)}
        return [kind for kind in asked if kind in present]

    def products(self) -> list[Factorization]:
        """What decays, as the model is now."""
        if not self.coefficient or self.run.waits_for_switch:
            return []
        return decayed(self.run.model, self.kinds())

    def covered(self) -> set[nn.Parameter]:
        return {parameter for product in self.products() for parameter in product.parameters()}

    def attach(self, optimizer: Optimizer) -> None:
        """Set decay up for an optimizer, and say what is decayed how.

        Raises:
            ValueError: Decay is asked for but nothing can be decayed, or it would be wrong in this run.
        """
        args, products = self.run.args, self.products()
        if not self.run.waits_for_switch:
            of_kinds(self.run.model, self.kinds())  # refuses unknown ones now, and not at the first log
            if left := set(args.frobenius_decay_kinds or ()) - set(self.kinds() or ()):
                warnings.warn(f"nothing of kind {', '.join(sorted(left))} was factorized, and decays", stacklevel=2)
        if args.frobenius_decay and not products and not self.run.waits_for_switch:
            frozen = of_kinds(self.run.model, self.kinds())
            remedy = (
                f"the parameters of all {len(frozen)} are frozen, as adapters freeze them: unfreeze some, or set "
                "frobenius_decay to 0"
                if frozen
                else "call fnl_hf.factorize(model) before making the trainer"
            )
            raise ValueError(
                f"frobenius_decay is {args.frobenius_decay}, but the model has no factorization that trains; {remedy}"
            )
        if not products and args.frobenius_decay is None and factorizations(self.run.model):
            warnings.warn(
                "the model is factorized but nothing decays it; set frobenius_decay (or weight_decay)", stacklevel=2
            )
        if products:
            self._refuse_what_is_sharded_elsewhere()
            _refuse_what_decay_cannot_reach(optimizer, products)
        mode = args.frobenius_decay_mode
        if mode == "auto":
            mode = "coupled" if isinstance(optimizer, (SGD, NAG)) else "decoupled"
        self._couples = mode == "coupled"
        self._optimizer = optimizer if products and mode == "decoupled" else None
        self._take_over(optimizer)
        schedule = args.frobenius_decay_schedule
        coefficient = f"{self.coefficient:g}" + ("" if schedule == "constant" else f", {schedule} to 0")
        say(decay_table(self.run.model, optimizer, products, mode, coefficient))

    def on_train_begin(self, args, state, control, **kwargs):
        """An optimizer may have been another trainer's meanwhile: in this run it decays what this run asks for."""
        super().on_train_begin(args, state, control)
        if self._optimizer is not None:
            self._take_over(self._optimizer)

    def _take_over(self, optimizer: Optimizer) -> None:
        """Decoupled decay in the steps of an optimizer, in place of that of any trainer that had it before."""
        if (other := _HOOKS.pop(optimizer, None)) is not None:
            other.remove()
            if isinstance(optimizer, Lamb):
                optimizer.frobenius = dict
        if self._optimizer is None:
            return
        if isinstance(optimizer, Lamb):
            optimizer.frobenius = lambda: decay_terms(self.products(), self.coefficient_now())
        _HOOKS[optimizer] = optimizer.register_step_pre_hook(lambda optimizer, *_: self._before_step(optimizer))

    def _before_step(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, Lamb):  # it has its own place for the decay
            return
        try:
            decay_step(self.products(), optimizer, self.coefficient_now())
        except (FloatingPointError, torch.linalg.LinAlgError):
            check_finite(self.run.model, self.run.state.global_step)
            raise

    def after_backward(self, scale: float, logged: bool) -> None:
        """Coupled decay joins the gradients. Loss scales are powers of two: scaling the decay alike is exact."""
        if self._couples and (products := self.products()):
            add_decay_gradients(products, self.coefficient_now() * scale)

    def _refuse_what_is_sharded_elsewhere(self) -> None:
        accelerator_state = self.run.accelerator.state
        if getattr(accelerator_state, "deepspeed_plugin", None) is not None:
            raise ValueError(
                "Frobenius decay does not work under DeepSpeed, whose engine holds partitions of its own in place of "
                "parameters and gradients: use FSDP 2, or set frobenius_decay to 0"
            )
        fsdp = getattr(accelerator_state, "fsdp_plugin", None)
        if fsdp is not None and getattr(fsdp, "fsdp_version", 1) < 2:
            raise ValueError(
                "Frobenius decay does not work under FSDP 1, which flattens parameters: set version 2 in fsdp_config, "
                "or frobenius_decay to 0"
            )


def _refuse_what_decay_cannot_reach(optimizer: Optimizer, products: Sequence[Factorization]) -> None:
    """Stop where Frobenius decay would be wrong, or not happen at all."""
    covered = {parameter for product in products for parameter in product.parameters() if parameter.requires_grad}
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    name = f"{type(optimizer).__module__}.{type(optimizer).__name__}".lower()
    remedy = "choose another optimizer, or set frobenius_decay to 0"
    if any(word in name for word in ("schedulefree", "schedule_free", "lomo", "layerwise")):
        raise ValueError(
            f"Frobenius decay is not proven beside {type(optimizer).__name__}, which does not step a parameter "
            f"from its value and its .grad: {remedy}"
        )
    if outside := covered - held:
        raise ValueError(
            f"{type(optimizer).__name__} does not hold {len(outside)} of the {len(covered)} trainable factors, as "
            f"layer-wise and in-backward optimizers do not: {remedy}, or freeze those factors"
        )
    for product in products:
        for parameter in product.parameters():
            if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                raise ValueError(
                    f"{product.name} has a factor of {parameter.dtype}: a quantized weight is not what the model "
                    "multiplies by; dequantize the model, or freeze both factors"
                )
    for group in optimizer.param_groups:
        if group.get("weight_decay") and (both := covered.intersection(group["params"])):
            raise ValueError(
                f"{len(both)} parameters under Frobenius decay are in an optimizer group with weight_decay "
                f"{group['weight_decay']}; two decays must not hit one parameter: give them a group with 0.0"
            )


def _beside_cores(model: nn.Module) -> set[nn.Parameter]:
    """The factors between which a core trains alone, as under ``rank_adaptation``."""
    deep = [product for product in factorizations(model) if product.layout == "deep"]
    views = [view for product in deep if product.views[1].parameter.requires_grad for view in product.views]
    return {p for view in views for p in (view.parameter, view.bias) if p is not None and not p.requires_grad}


def decay_table(
    model: nn.Module, optimizer: Optimizer, products: Sequence[Factorization], mode: str, coefficient: str
) -> str:
    """What the optimizer decays how: a row per coefficient of L2 decay and per kind of product."""
    covered = {p for product in products for p in product.parameters() if p.requires_grad}
    l2: dict[float, list] = {}
    for group in optimizer.param_groups:
        l2.setdefault(group.get("weight_decay") or 0.0, []).extend(p for p in group["params"] if p not in covered)
    rows = [("L2", f"{decay:g}", "", l2[decay]) for decay in sorted(l2, reverse=True) if decay]
    for kind in dict.fromkeys(product.kind for product in products):
        some = [product for product in products if product.kind == kind]
        trained = dict.fromkeys(p for product in some for p in product.parameters() if p.requires_grad)
        rows.append((f"Frobenius, {mode}", coefficient, f"{len(some)} {kind}", list(trained)))
    rows.append(("none", "", "", l2.get(0.0, [])))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    bases = _beside_cores(model)
    if turned := [p for p in frozen if p in bases]:
        rows.append(("bases", "", "turn with the ranks", turned))
        frozen = [p for p in frozen if p not in bases]
    still = sum(all(not p.requires_grad for p in product.parameters()) for product in factorizations(model))
    if frozen:
        rows.append(("frozen", "", f"{still} skipped" if still else "", frozen))
    table = [("decay", "coefficient", "products", "tensors", "parameters")]
    table += [(*row[:3], str(len(row[3])), f"{sum(p.numel() for p in row[3]):,}") for row in rows]
    return "fnl_hf: what is decayed\n" + aligned(table)
