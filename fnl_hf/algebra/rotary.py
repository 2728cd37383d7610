"""Rotary planes: queries and keys whose score turns with their offset, so that no single matrix exists.

A score at offset D is xᵀ W_qᵀ R(D) W_k y, where R(D) turns plane p, two features of the head, by the angle ω_p D.
W_qᵀ R W_k is a sum over planes; in its squared norm, averaged over angles that are spread evenly and independently,
products of different planes vanish, and a plane alone keeps E‖Q_pᵀ R K_p‖² = ½ ‖Q_p‖² ‖K_p‖² (with R = cos θ I +
sin θ J, both cos² and sin² average to ½, and ‖Q_pᵀK_p‖² + ‖Q_pᵀJK_p‖² = ‖Q_p‖²‖K_p‖²). The sum of these is what
decays here. The change of basis that leaves every score alone is what commutes with all turns: one rotation and one
scale per plane. Balance means ‖Q_p‖ = ‖K_p‖.

Factors are [Q planes, K planes] of shape (*batch, chunks, planes, 2, d), followed, where only a part of each head is
rotated, by [Q rest (*batch, d, r), K rest (*batch, r, d)], an ordinary chain, whose cross terms with the planes vanish
in the average too. Batches broadcast as in ``chain``. ``Form`` says what each function means for every form.
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from . import chain
from .tensors import SIDES, accumulating, check_sides, sum_to

Grams = tuple[Tensor, Tensor, chain.Grams]

has_matrix = False


def product(factors: Sequence[Tensor]) -> Tensor:
    """There is none.

    Raises:
        ValueError: Always.
    """
    raise ValueError("rotary queries and keys have no single matrix: their product turns with the offset of positions")


def squared_norm(factors: Sequence[Tensor]) -> Tensor:
    """½ Σ_p ‖Q_p‖² ‖K_p‖² (plus the squared norm of the unrotated part), a scalar; differentiable."""
    queries, keys, *rest = factors
    of_queries, of_keys = _plane_sizes(queries, keys)
    of_planes = (of_queries * of_keys).sum() / 2
    return of_planes + chain.squared_norm(rest) if rest else of_planes


def decay_gradients(factors: Sequence[Tensor], grams: Grams | None = None) -> list[Tensor]:
    """The gradients of ½ squared_norm, one per factor: ½ ‖K_p‖² Q_p and ½ ‖Q_p‖² K_p."""
    queries, keys, *rest = factors
    of_queries, of_keys, of_rest = decay_grams(factors) if grams is None else grams
    gradients = [
        (of_keys[..., None, None] * queries / 2).to(queries.dtype),
        (of_queries[..., None, None] * keys / 2).to(keys.dtype),
    ]
    return gradients + (chain.decay_gradients(rest, of_rest) if rest else [])


def add_decay_(
    factors: Sequence[Tensor], targets: Sequence[Tensor | None], scales: Sequence[float], grams: Grams
) -> None:
    """targets_i += scales_i · gradient in place, None targets left out; the targets may be the factors themselves."""
    for gradient, target, scale in zip(decay_gradients(factors, grams), targets, scales, strict=True):
        if target is not None:
            target.add_(gradient, alpha=scale)


def decay_grams(factors: Sequence[Tensor]) -> Grams:
    """‖Q_p‖² (summed over a group) and ‖K_p‖² of every plane, and the Grams of the rest."""
    queries, keys, *rest = factors
    return *_plane_sizes(queries, keys), chain.decay_grams(rest) if rest else []


def spectrum(grams: Grams) -> Tensor:
    """What each plane contributes to the average norm, √(½ ‖Q_p‖² ‖K_p‖²), and the singular values of the rest.

    In descending order, (*batch, planes + rest), float64; their squares sum to ``squared_norm``.
    """
    of_queries, of_keys, of_rest = grams
    return _contributions(of_queries.double(), of_keys.double(), chain.spectrum(of_rest) if of_rest else None)


def bound(grams: Grams) -> Tensor:
    """What the sum of ``spectrum`` is at most, a scalar, tight at balance: Σ (‖Q_p‖² + ‖K_p‖²) / √8 and the rest's."""
    of_queries, of_keys, of_rest = grams
    of_planes = (of_queries.sum() + of_keys.sum()) / 8**0.5
    return of_planes + chain.bound(of_rest) if of_rest else of_planes


def imbalance(grams: Grams) -> Tensor:
    """|‖Q_p‖² − ‖K_p‖²| / (‖Q_p‖² + ‖K_p‖²), the mean over the features of a head, (*batch): zero at balance.

    The unrotated features count with the imbalance of their chain.
    """
    of_queries, of_keys, of_rest = grams
    total = (of_queries + of_keys).clamp_min(torch.finfo(of_keys.dtype).tiny)
    of_planes = ((of_queries - of_keys).abs() / total).mean((-2, -1))
    if not of_rest:
        return of_planes
    rotated, others = 2 * math.prod(of_keys.shape[-2:]), of_rest[-1][0].shape[-1]
    return (rotated * of_planes + others * chain.imbalance(of_rest)) / (rotated + others)


def stiffness(grams: Grams, exact: bool = False, moving: Sequence[bool] | None = None) -> Tensor:
    """How much larger than its factor a decay gradient can be, a scalar; unless exact, a bound."""
    of_queries, of_keys, of_rest = grams
    planes = torch.maximum(of_queries.max(), of_keys.max()) / 2
    return torch.maximum(planes, chain.stiffness(of_rest, exact)) if of_rest else planes


def singular_values(factors: Sequence[Tensor]) -> Tensor:
    """The contributions of ``spectrum`` from sizes in float64, and the rest's from its QR."""
    queries, keys, *rest = (factor.double() for factor in factors)
    return _contributions(*_plane_sizes(queries, keys), chain.singular_values(rest) if rest else None)


def size(factors: Sequence[Tensor]) -> tuple[int, int]:
    """(query heads, features of a head, rotated or not)"""
    queries, _, *rest = factors
    *heads, chunks, planes, two, _ = queries.shape
    return math.prod(heads), chunks * planes * two + (rest[0].shape[-1] if rest else 0)


def balance(factors: Sequence[Tensor], rank: int | None = None) -> list[Tensor]:
    """The same scores with ‖Q_p‖ = ‖K_p‖ in every plane (over a group: Σ_h ‖Q_hp‖² = ‖K_p‖²), the rest balanced.

    Rotary heads keep their full rank: ``rank`` is there for the shared signature and does not apply.
    """
    queries, keys, *rest = factors
    of_queries, of_keys = _plane_sizes(queries, keys)
    both = (of_queries > 0) & (of_keys > 0)
    scale = torch.where(both, of_keys / of_queries, 1.0).pow(0.25)[..., None, None]
    balanced = [(queries * scale).to(queries.dtype), (keys / scale).to(keys.dtype)]
    return balanced + (list(chain.balance(rest)) if rest else [])


def leading(factors: Sequence[Tensor], rank: int) -> list[Tensor]:
    """The factors themselves, copied: rotary heads keep their full rank."""
    return [factor.clone() for factor in factors]


def carry(before: Sequence[Tensor], after: Sequence[Tensor], moments: Sequence[Tensor], power: int) -> list[Tensor]:
    """An optimizer's moments, carried to planes in another basis of the same scores, and the rest's as a chain's.

    Where Q_p becomes s R Q_p, with a scale s and a rotation R, its gradient becomes R ∂Q_p / s, since K_p took 1/s.
    """
    carried = []
    for old, new, moment in zip(before[:2], after[:2], moments[:2], strict=True):
        gauge = _inverse_gauge(old.double(), new.double()).pow(power)  # (*batch, chunks, planes, 2, 2)
        carried.append((gauge @ moment.double()).to(moment.dtype))
    return carried + (chain.carry(before[2:], after[2:], moments[2:], power) if len(before) > 2 else [])


def batched(factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The planes as they are, (*batch, chunks, planes, 2, d), and the rest after them."""
    return tuple(factors)


def change_basis(factors: Sequence[Tensor], generator: torch.Generator, sides: Collection[str] = SIDES) -> list[Tensor]:
    """A random rotation and scale per plane, of the queries (left) and of the keys (right); the rest as a chain."""
    check_sides(sides)
    queries, keys, *rest = factors
    shape, dtype, device = keys.shape[:-2], accumulating(keys).dtype, keys.device
    angle, log_scale = (torch.rand(shape, generator=generator, dtype=dtype).to(device) for _ in range(2))
    angle, scale = angle * 6.28, torch.exp(2 * log_scale - 1)[..., None, None]
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
    if "left" in sides:
        queries = ((scale * turn) @ accumulating(queries)).to(queries.dtype)
    if "right" in sides:
        keys = ((turn / scale) @ accumulating(keys)).to(keys.dtype)
    return [queries, keys, *(chain.change_basis(rest, generator, sides) if rest else [])]


# ----------------------------------------------------------------------------------------------------


def _plane_sizes(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """‖Q_p‖², summed over the query heads that share a key, and ‖K_p‖²: (*batch, chunks, planes), float32 or better."""
    of_queries, of_keys = (accumulating(planes).square().sum((-2, -1)) for planes in (queries, keys))
    return sum_to(of_queries, of_keys), of_keys


def _contributions(of_queries: Tensor, of_keys: Tensor, of_rest: Tensor | None) -> Tensor:
    """√(½ ‖Q_p‖² ‖K_p‖²) of every plane with the singular values of the rest, (*batch, planes + rest), descending."""
    of_planes = (of_queries * of_keys / 2).sqrt().flatten(-2)
    values = of_planes if of_rest is None else torch.cat([of_planes, of_rest], -1)
    return values.sort(-1, descending=True).values


def _inverse_gauge(old: Tensor, new: Tensor) -> Tensor:
    """R / s of every plane, (*batch, chunks, planes, 2, 2), where new = s R old; the identity where a plane is zero.

    As complex numbers, c = s exp(iθ) is ⟨old, new⟩ / ‖old‖², and what is asked c / |c|² = ⟨old, new⟩ / ‖new‖².
    """
    (old_x, old_y), (new_x, new_y) = old.unbind(-2), new.unbind(-2)
    real, imaginary = (old_x * new_x + old_y * new_y).sum(-1), (old_x * new_y - old_y * new_x).sum(-1)
    alive = (real.square() + imaginary.square()) > 0
    size_of_new = torch.where(alive, new.square().sum((-2, -1)), 1.0)
    real, imaginary = torch.where(alive, real, 1.0) / size_of_new, imaginary / size_of_new
    return torch.stack([real, -imaginary, imaginary, real], -1).unflatten(-1, (2, 2))
