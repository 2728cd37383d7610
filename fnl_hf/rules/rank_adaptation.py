"""Rank-adaptive training (DLRT): bases grow by the gradient's directions, only the core trains, a cut settles the rank.

A cycle of ``rank_interval`` optimizer steps, in the two-step scheme of Schotthöfer et al. (arXiv 2505.08022):

1. Its first step takes the gradients of U, S and V. They augment the bases before the optimizer moves anything, and
   give the augmented core the part of its gradient that they know (`dlrt.tangent_gradient`), so no step is lost.
2. The other steps train the core by the run's own optimizer; U and V are frozen, and in no optimizer.
3. After the last one the core is cut at ``rank_tolerance``.

Heads of attention have one rank for all heads of a layer: cut is what all of them together lose. Their bases grow up to
the width of the heads in the dense model, which is all that the attention module makes room for. A bias of queries,
keys or values is a row of their bases, and trained as these are: by the core, and by the directions that join.

With ``rank_interval=1`` every step is all of this: the one-pass scheme of Schotthöfer et al. (NeurIPS 2022), with the
gradient projected onto the tangent space. The last cycle of a run, whole or not, does not augment, so that the core is
trained at the ranks that it ends with.

What the optimizer keeps of a core goes along with every change of bases: see `fnl_hf.optimizer_state.change_bases`.
"""

import json
import os
import warnings

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ..algebra import dlrt
from ..config import FNLConfig
from ..divergence import check_finite
from ..messages import say
from ..optimizer_state import change_bases
from ..plan import Plan
from ..ranks import Adaptive, adaptive, keeping_their_rank, take_ranks, told
from .rule import Rule


class RankAdaptation(Rule, ExportableState):
    """What ``rank_adaptation="dlrt"`` asks for.

    Attributes:
        augmented: Whether the bases are wider than the rank that was last settled: the phase of the cycle.
        ranks: That rank, by the name of the layer or the product of heads.
    """

    def __init__(self):
        self.augmented = False
        self.ranks: dict[str, int] = {}
        self._logged: dict[str, int] = {}
        self._known_to_ddp: list[str] | None = None
        self._optimizer: Optimizer | None = None
        self._found: tuple[nn.Module, list[Adaptive]] | None = None

    # -- at the start ---------------------------------------------------------------------------------

    def bind(self, run) -> None:
        """Refuse what it cannot be right in.

        Raises:
            ValueError: Of the run, or of the model: see `fnl_hf.ranks.adaptive`.
        """
        super().bind(run)
        obstacles = {
            "FSDP (its shards have fixed shapes): use DDP": run.is_fsdp_enabled,
            "DeepSpeed (its engine holds the parameters): use DDP": run.is_deepspeed_enabled,
            "torch_compile (every new rank compiles the model anew): leave that out": run.args.torch_compile,
            "nn.DataParallel: launch one process per GPU (torchrun)": run.args.n_gpu > 1,
            "model_init: give the model": run.model_init is not None,
        }
        if obstacle := next((name for name, present in obstacles.items() if present), None):
            raise ValueError(f"rank_adaptation does not work with {obstacle}, or drop rank_adaptation")
        adaptive(run.model)

    def prepare(self) -> None:
        """U Σ Vᵀ in place of U Vᵀ; bases and cores are kept out of DDP, whose buckets have fixed shapes.

        Raises:
            ValueError: The optimizer was made before; or DDP would have nothing to do.
        """
        self._found = None
        if self._optimizer is not None:
            self._check_cores(self._optimizer)
        for each in self.products():
            each.make_orthonormal()
            if self._processes > 1:
                each.write(*(_from_the_first(factor) for factor in each.factors()))
        if self._processes > 1:
            parameters = {p for each in self.products() for p in (each.core, *each.bases)}
            named = self.run.model.named_parameters(remove_duplicate=False)
            names = [name for name, parameter in named if parameter in parameters]
            if all(p in parameters for p in self.run.model.parameters() if p.requires_grad):
                raise ValueError(
                    "rank_adaptation in several processes needs a parameter that trains beside the factors, as DDP "
                    "does: leave a bias or a normalisation unfrozen, or train in one process"
                )
            self._known_to_ddp = getattr(self.run.model, _IGNORED, None)
            setattr(self.run.model, _IGNORED, [*(self._known_to_ddp or ()), *names])

    def before_load(self, checkpoint: str) -> None:
        """The ranks of a checkpoint, into which its weights fit.

        Raises:
            ValueError: It is not of a run with ``rank_adaptation``.
        """
        path = os.path.join(checkpoint, "config.json")
        if not os.path.isfile(path):
            raise ValueError(f"{checkpoint} has no config.json, where a model of transformers keeps the ranks it holds")
        with open(path, encoding="utf-8") as file:
            stored = json.load(file).get("quantization_config")
        plan = Plan.of(FNLConfig.from_dict(stored)) if stored else Plan(())
        take_ranks(self.run.model, {target.name: target for target in plan.targets})
        with open(os.path.join(checkpoint, TRAINER_STATE_NAME), encoding="utf-8") as file:
            self._restore(json.load(file)["stateful_callbacks"])

    def attach(self, optimizer: Optimizer) -> None:
        """Keep it, to carry what it knows of cores.

        Raises:
            ValueError: It does not hold the cores, or keeps weights of its own that would not change with them.
        """
        name = f"{type(optimizer).__module__}.{type(optimizer).__name__}".lower()
        if any(word in name for word in ("schedulefree", "schedule_free", "lomo", "layerwise")):
            raise ValueError(
                f"rank_adaptation is not proven beside {type(optimizer).__name__}, which keeps or steps parameters in "
                "a way of its own: choose another optimizer, such as adamw_torch"
            )
        self._check_cores(optimizer)
        self._optimizer = optimizer

    def _check_cores(self, optimizer: Optimizer) -> None:
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if lacking := [each.name for each in self.products() if each.core is None or each.core not in held]:
            raise ValueError(
                f"{type(optimizer).__name__} does not hold the core of {lacking[0]}: let `train` of a new trainer make "
                "the optimizer (optim=..., or optimizer_cls_and_kwargs)"
            )

    def on_train_begin(self, args, state, control, **kwargs):
        """Say what adapts; go on in the phase of a checkpoint."""
        super().on_train_begin(args, state, control)
        if hasattr(self.run.model, _IGNORED):  # DDP wraps the model by now; another run may not adapt it
            delattr(self.run.model, _IGNORED)
            if self._known_to_ddp is not None:
                setattr(self.run.model, _IGNORED, self._known_to_ddp)
        state.stateful_callbacks.setdefault(type(self).__name__, {})
        self._restore(state.stateful_callbacks if state.global_step else {})
        if not state.global_step and state.max_steps <= args.rank_interval:
            warnings.warn(
                f"rank_interval is {args.rank_interval}, but the run has {state.max_steps} steps: no rank will change, "
                "since the last cycle of a run grows nothing; lower rank_interval, or train for longer",
                stacklevel=2,
            )
        ranks = self.ranks.values()
        say(
            f"fnl_hf: the ranks of {len(ranks)} products, {min(ranks)} to {max(ranks)}, adapt every "
            f"{args.rank_interval} steps at a tolerance of {args.rank_tolerance:g}{self._highest()}"
        )
        for line in told(keeping_their_rank(self.run.model)):
            say(f"fnl_hf: {line}")

    def _highest(self) -> str:
        """The bounds in words, and what can only sink."""
        args = self.run.args
        highest = {each.name: _bounds(each, args.rank_min, args.rank_max)[1] for each in self.products()}
        least, most = min(highest.values()), max(highest.values())
        full = sum(self.ranks[name] >= highest[name] for name in highest)
        start = f"; {full} of them cannot grow beyond where they are" if full else ""
        return f", up to {least if least == most else f'{least} to {most}'}{start}"

    def leave(self) -> None:
        """Whoever trains the model next trains all of it."""
        for each in self.products():
            each.freeze(False)
        if self.augmented:
            ranks = [each.rank for each in self.products()]
            say(
                f"fnl_hf: the model is one from within a cycle, whose bases have grown (ranks {min(ranks)} to "
                f"{max(ranks)}): fnl_hf.fix_ranks(model, rank_tolerance={self.run.args.rank_tolerance:g}) cuts them"
            )

    def state(self) -> dict:
        """What a checkpoint keeps: the phase, and the ranks that were settled last."""
        return {"args": {}, "attributes": {"augmented": self.augmented, "ranks": self.ranks}}

    def _restore(self, states: dict) -> None:
        """From those of a checkpoint; none of it is the start of a run."""
        saved = states.get(type(self).__name__, {}).get("attributes", {})
        self.augmented = saved.get("augmented", False)
        self.ranks = saved.get("ranks") or {each.name: each.rank for each in self.products()}

    # -- a cycle --------------------------------------------------------------------------------------

    def products(self) -> list[Adaptive]:
        """What adapts in the model as it is now; found anew only for another model."""
        if self._found is None or self._found[0] is not self.run.model:
            self._found = self.run.model, adaptive(self.run.model)
        return self._found[1]

    def on_step_begin(self, args, state, control, **kwargs):
        """The step before bases grow gives them gradients."""
        if self.augmented or self._ends_within_cycle(state):
            return
        for each in self.products():
            if not each.is_spectral():  # it was trained in the last cycle of a run that goes on
                self._put(each, *self._cut(each, 0.0, 1, each.rank))
            each.freeze(False)

    def after_backward(self, scale: float, logged: bool) -> None:
        """Gradients of all processes; from those of U and V, wider bases."""
        products = self.products()
        grows = products[0].bases[0].requires_grad
        # each once: the bases of heads may have a weight in common
        parameters = dict.fromkeys(p for each in products for p in (each.core, *(each.bases if grows else ())))
        self._reduce(list(parameters))
        if not grows:
            return
        found = [p.grad.isfinite().all() for p in parameters if p.grad is not None]
        grows = bool(found) and all(torch.stack(found).tolist())  # else the next step tries again, as fp16 does anyway
        reached = [each for each in products if each.core.grad is not None] if grows else []
        gradients = [each.gradients() for each in reached]  # all, before any weight is replaced
        for each, some in zip(reached, gradients, strict=True):
            self._augment(each, some)
        for each in products:
            each.freeze()
        self.augmented = grows

    def after_step(self) -> None:
        """At the end of a cycle the ranks are cut, alike on all processes."""
        if self.augmented and self.run.state.global_step % self.run.args.rank_interval == 0:
            args, products = self.run.args, self.products()
            bounds = [_bounds(each, args.rank_min, args.rank_max) for each in products]
            cuts = [self._cut(each, args.rank_tolerance, *some) for each, some in zip(products, bounds, strict=True)]
            ranks = torch.tensor([core.shape[-1] for _, core, _ in cuts], device=cuts[0][1].device)
            for each, factors, rank in zip(products, cuts, _from_the_first(ranks).tolist(), strict=True):
                if factors[1].shape[-1] != rank:  # rounding on this process took it across the tolerance
                    factors = dlrt.truncate(*each.factors(), 0.0, rank, rank)
                self._put(each, *map(_from_the_first, factors))
                self.ranks[each.name] = rank
            self.augmented = False

    @torch.no_grad()
    def _augment(self, each: Adaptive, gradients: dlrt.Factors) -> None:
        old = each.factors()
        grad_k, grad_l = dlrt.side_gradients(old, gradients)
        new = dlrt.augment(*old, grad_k, grad_l, each.widest)
        new = tuple(map(_from_the_first, new))
        self._put(each, *new)
        each.core.grad = dlrt.tangent_gradient(old, new, grad_k, grad_l, gradients[1]).view_as(each.core)

    @torch.no_grad()
    def _cut(self, each: Adaptive, tolerance: float, smallest: int, largest: int) -> dlrt.Factors:
        try:
            return dlrt.truncate(*each.factors(), tolerance, smallest, largest)
        except torch.linalg.LinAlgError:
            check_finite(self.run.model, self.run.state.global_step)
            raise

    @torch.no_grad()
    def _put(self, each: Adaptive, left: Tensor, core: Tensor, right: Tensor) -> None:
        """Other factors, and what the optimizer keeps of the core in their bases."""
        old_left, _, old_right = each.factors()
        rows, columns = left.mT @ old_left, old_right.mT @ right
        each.write(left, core, right)
        if self._optimizer is not None:
            change_bases(self._optimizer, each.core, rows, columns)

    # -- processes ------------------------------------------------------------------------------------

    @property
    def _processes(self) -> int:
        return self.run.accelerator.num_processes

    @torch.no_grad()
    def _reduce(self, parameters: list[nn.Parameter]) -> None:
        """The mean of gradients over processes, as DDP takes it of all others: in one message.

        A parameter that got no gradient on any process keeps none.
        """
        if self._processes == 1:
            return
        like = parameters[0]
        used = torch.tensor([float(p.grad is not None) for p in parameters], dtype=like.dtype, device=like.device)
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        message = torch.cat([used, *(gradient.flatten() for gradient in flat)])
        torch.distributed.all_reduce(message)
        used, *means = message.split([len(parameters), *(p.numel() for p in parameters)])
        for parameter, some, mean in zip(parameters, used.tolist(), means, strict=True):
            parameter.grad = (mean / self._processes).view_as(parameter).to(parameter.dtype) if some else None

    # -- the log --------------------------------------------------------------------------------------

    def logs(self) -> dict[str, float]:
        """Mean rank and compression (parameters of the factors / of the dense model there), and of each when new.

        Ranks are those that were settled last; ``augmented`` says whether the bases are wider now.
        """
        logs = {f"dlrt/{name}": value for name, value in self._measures(self.ranks).items()}
        logs["dlrt/augmented"] = float(self.augmented)
        for each in self.products():  # two numbers of every product: when they are new
            rank = self.ranks[each.name]
            if self._logged.get(each.name) != rank:
                logs[f"dlrt/rank/{each.name}"] = self._logged[each.name] = rank
                logs[f"dlrt/compression/{each.name}"] = each.size(rank) / each.dense_size
        return {name: float(f"{value:.6g}") for name, value in logs.items()}

    def results(self) -> dict[str, float]:
        """Mean rank and compression of the model as it is, also between two cuts: what `fix_ranks` makes of it."""
        ranks = {each.name: min(each.rank, each.full_rank) for each in self.products()}
        return {f"dlrt_{name}": value for name, value in self._measures(ranks).items()}

    def _measures(self, ranks: dict[str, int]) -> dict[str, float]:
        products = self.products()
        kept = sum(each.size(ranks[each.name]) for each in products)
        dense = sum(each.dense_size for each in products)
        return {"rank": sum(ranks.values()) / len(products), "compression": kept / dense}

    def _ends_within_cycle(self, state) -> bool:
        """Whether no cycle but this one begins before the run ends."""
        interval = self.run.args.rank_interval
        return (state.global_step // interval + 1) * interval >= state.max_steps


_IGNORED = "_ddp_params_and_buffers_to_ignore"  # of a module: names that DDP leaves alone


def is_of_adapting_run(checkpoint: str) -> bool:
    """Whether a checkpoint was written by a run with this rule."""
    path = os.path.join(checkpoint, TRAINER_STATE_NAME)
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8") as file:
        return RankAdaptation.__name__ in (json.load(file).get("stateful_callbacks") or {})


def _bounds(each: Adaptive, smallest: int, largest: int | None) -> tuple[int, int]:
    """Of a rank after a cut: at most half of what its matrix or its heads can have, where nothing else is given."""
    smallest = min(smallest, each.highest)
    return smallest, max(smallest, each.full_rank // 2 if largest is None else min(largest, each.highest))


def _from_the_first(tensor: Tensor) -> Tensor:
    """As the first process has it: bases that differ by rounding must not drift apart."""
    return broadcast(tensor.contiguous())
