"""LAMB, with Frobenius decay where its weight decay stands (FLAMBé), and fairseq's Nesterov momentum.

Both are the optimizers of the Transformer runs of Khodak et al. (ICLR 2021); torch and transformers have neither.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer


def evaluated(closure: Callable[[], Tensor] | None) -> Tensor | None:
    """The loss that a ``closure`` given to ``step`` evaluates, with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class Lamb(Optimizer):
    """LAMB (You et al., 2020): Adam's direction, scaled per tensor to the size of the weights it moves.

    u = m̂ / (√v̂ + ε) + λ p, then p ← p − lr · (‖p‖ / ‖u‖) · u, with trust ratio 1 where either norm is zero.

    FLAMBé: for parameters that ``frobenius`` names, the gradient of the Frobenius decay stands in the place of λ p,
    inside the trust ratio as weight decay is.

    Args:
        frobenius: returns parameter -> λ · gradient of the decay, called once per step before anything moves, so that
            every term is of the old factors.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr {lr}, betas {betas}, eps {eps}, weight_decay {weight_decay}: out of range")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.frobenius: Callable[[], Mapping[Tensor, Tensor]] = dict

    @torch.no_grad()
    def step(self, closure=None):
        """One update; ``closure`` re-evaluates the loss, as in every torch optimizer."""
        loss = evaluated(closure)
        terms = self.frobenius()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group, terms.get(p))
        return loss

    def _update(self, p: Tensor, group: dict, term: Tensor | None) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        m = state["exp_avg"].lerp_(p.grad, 1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        root = (v / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        update = (m / (1 - beta1 ** state["step"])).div_(root)
        if term is not None:
            update.add_(term)
        elif group["weight_decay"]:
            update.add_(p, alpha=group["weight_decay"])
        size, reach = p.norm(), update.norm()
        trust = torch.where((size > 0) & (reach > 0), size / reach, 1.0)
        p.sub_(update * (group["lr"] * trust))


class NAG(Optimizer):
    """Nesterov momentum as fairseq's ``nag``: the velocity carries the learning rate, and follows its changes.

    v ← μ (lr / lr_before) v − lr g and p ← p + μ v_new − lr g, with decoupled weight decay p ← (1 − lr λ) p before.
    """

    def __init__(self, params, lr=0.25, momentum=0.99, weight_decay=0.0):
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1:
            raise ValueError(f"lr {lr}, momentum {momentum}, weight_decay {weight_decay}: out of range")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "lr_before": None})

    @torch.no_grad()
    def step(self, closure=None):
        """One update; ``closure`` re-evaluates the loss, as in every torch optimizer."""
        loss = evaluated(closure)
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            rescale = lr / group["lr_before"] if group["lr_before"] else 1.0
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["velocity"] = torch.zeros_like(p)
                velocity = state["velocity"].mul_(momentum * rescale).sub_(p.grad, alpha=lr)
                p.mul_(1 - lr * group["weight_decay"]).add_(velocity, alpha=momentum).sub_(p.grad, alpha=lr)
            group["lr_before"] = lr
        return loss
