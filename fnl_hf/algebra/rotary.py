"""Rotary planes: queries and keys whose score turns with their offset, so that no single matrix exists.

A score is Σ_p q_pᵀ R(ω_p D) k_p over planes p of two features each. Averaged over the phases, ‖W_qᵀ R W_k‖² is
½ Σ_p ‖Q_p‖² ‖K_p‖², which is what decays here. The change of basis that leaves every score alone is one rotation and
one scale per plane; balance means ‖Q_p‖ = ‖K_p‖ (METHODS 1.12).

Tensors are [Q planes, K planes] of shape (*batch, chunks, planes, 2, d), followed, where only a part of each head is
rotated, by [Q rest (*batch, d, r), K rest (*batch, r, d)], an ordinary chain. Batches broadcast as in ``chain``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import chain


def product(factors: Sequence[Tensor]) -> Tensor:
    """There is none.

    Raises:
        ValueError: Always.
    """
    raise ValueError("rotary queries and keys have no single matrix: their product turns with the offset of positions")


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """½ Σ_p ‖Q_p‖² ‖K_p‖² (plus the squared norm of the unrotated part), a scalar; differentiable."""
    queries, keys, *rest = tensors
    of_planes = (_summed_to(_sizes(queries), keys) * _sizes(keys)).sum() / 2
    return of_planes + chain.squared_norm(rest) if rest else of_planes


def decay_gradients(tensors: Sequence[Tensor], grams: tuple | None = None) -> list[Tensor]:
    """The gradients of ½ squared_norm, one per tensor: ½ ‖K_p‖² Q_p and ½ ‖Q_p‖² K_p."""
    queries, keys, *rest = tensors
    of_queries, of_keys, of_rest = decay_grams(tensors) if grams is None else grams
    gradients = [
        (of_keys[..., None, None] * queries / 2).to(queries.dtype),
        (of_queries[..., None, None] * keys / 2).to(keys.dtype),
    ]
    return gradients + (chain.decay_gradients(rest, of_rest) if rest else [])


def add_decay_(
    tensors: Sequence[Tensor], targets: Sequence[Tensor | None], scales: Sequence[float], grams: tuple
) -> None:
    """targets_i += scales_i · gradient in place, None targets left out; the targets may be the tensors themselves."""
    for gradient, target, scale in zip(decay_gradients(tensors, grams), targets, scales, strict=True):
        if target is not None:
            target.add_(gradient, alpha=scale)


def decay_grams(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, list]:
    """‖Q_p‖² (summed over a group) and ‖K_p‖² of every plane, and the Grams of the rest."""
    queries, keys, *rest = tensors
    return _summed_to(_sizes(queries), keys), _sizes(keys), chain.decay_grams(rest) if rest else []


def spectrum(grams: tuple[Tensor, Tensor, list]) -> Tensor:
    """What each plane contributes to the average norm, √(½ ‖Q_p‖² ‖K_p‖²), and the singular values of the rest."""
    of_queries, of_keys, of_rest = grams
    of_planes = (of_queries.double() * of_keys.double() / 2).sqrt().flatten(-2)
    return torch.cat([of_planes, chain.spectrum(of_rest)], -1) if of_rest else of_planes


def bound(grams: tuple[Tensor, Tensor, list]) -> Tensor:
    """What the sum of ``spectrum`` is at most, a scalar, tight at balance: Σ (‖Q_p‖² + ‖K_p‖²) / √8 and the rest's."""
    of_queries, of_keys, of_rest = grams
    of_planes = (of_queries.sum() + of_keys.sum()) / 8**0.5
    return of_planes + chain.bound(of_rest) if of_rest else of_planes


def imbalance(grams: tuple[Tensor, Tensor, list]) -> Tensor:
    """|‖Q_p‖² − ‖K_p‖²| / (‖Q_p‖² + ‖K_p‖²), the mean over the planes of a head, (*batch): zero at balance."""
    of_queries, of_keys, _ = grams
    total = (of_queries + of_keys).clamp_min(torch.finfo(of_keys.dtype).tiny)
    return ((of_queries - of_keys).abs() / total).mean((-2, -1))


def stiffness(grams: tuple[Tensor, Tensor, list], exact: bool = False) -> Tensor:
    """How much larger than its factor a decay gradient can be, a scalar; unless exact, a bound."""
    of_queries, of_keys, of_rest = grams
    planes = torch.maximum(of_queries.max(), of_keys.max()) / 2
    return torch.maximum(planes, chain.stiffness(of_rest, exact)) if of_rest else planes


def balance(tensors: Sequence[Tensor], rank: int | None = None) -> list[Tensor]:
    """The same scores with ‖Q_p‖ = ‖K_p‖ in every plane (over a group: Σ_h ‖Q_hp‖² = ‖K_p‖²), the rest balanced.

    Rotary heads keep their full rank: ``rank`` is there for the shared signature and does not apply.
    """
    queries, keys, *rest = tensors
    of_queries, of_keys = _summed_to(_sizes(queries), keys), _sizes(keys)
    both = (of_queries > 0) & (of_keys > 0)
    scale = torch.where(both, of_keys / of_queries, 1.0).pow(0.25)[..., None, None]
    balanced = [(queries * scale).to(queries.dtype), (keys / scale).to(keys.dtype)]
    return balanced + (list(chain.balance(rest)) if rest else [])


def carry(before: Sequence[Tensor], after: Sequence[Tensor], moments: Sequence[Tensor], power: int) -> list[Tensor]:
    """An optimizer's moments, carried to balanced planes: scaled against their plane (see ``chain.carry``)."""
    carried = []
    for old, new, moment in zip(before[:2], after[:2], moments[:2], strict=True):
        of_old, of_new = _sizes(old), _sizes(new)
        scale = torch.where((of_old > 0) & (of_new > 0), of_old / of_new, 1.0).sqrt().pow(power)
        carried.append((moment * scale[..., None, None]).to(moment.dtype))
    return carried + (chain.carry(before[2:], after[2:], moments[2:], power) if len(before) > 2 else [])


def leading(tensors: Sequence[Tensor], rank: int) -> list[Tensor]:
    """The tensors themselves, copied: rotary heads keep their full rank."""
    return [tensor.clone() for tensor in tensors]


def batched(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The planes as they are, (*batch, chunks, planes, 2, d), and the rest after them."""
    return tuple(tensors)


def change_basis(tensors: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """A random change of basis that leaves every score alone: a rotation and a scale per plane."""
    queries, keys, *rest = tensors
    shape = keys.shape[:-2]
    angle, log_scale = (torch.rand(shape, generator=generator, dtype=keys.dtype).to(keys.device) for _ in range(2))
    angle, scale = angle * 6.28, torch.exp(2 * log_scale - 1)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
    changed = [(scale[..., None, None] * turn) @ queries, (turn / scale[..., None, None]) @ keys]
    return changed + (chain.change_basis(rest, generator) if rest else [])


def _sizes(planes: Tensor) -> Tensor:
    """‖·‖² of each plane, (*batch, chunks, planes), in float32 or better."""
    return chain._accumulating(planes).square().sum((-2, -1))


def _summed_to(sizes: Tensor, planes: Tensor) -> Tensor:
    """Sum over the query heads that share a key."""
    return chain._sum_to(sizes[..., None, None], planes)[..., 0, 0]
