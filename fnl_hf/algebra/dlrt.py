"""Rank-adaptive steps on W = U S Vᵀ with orthonormal U and V: augment, step the core, truncate.

Gradient descent on factors slows down with the smallest singular value, and the flow of U and V by themselves divides
by it. Here the bases grow by the directions in which the gradient leaves them, only the core S then moves, and a
truncated SVD of it settles the rank: no singular value is divided by, and no step gets smaller where one is small.

Schotthöfer et al., *Low-rank lottery tickets: finding efficient low-rank neural networks via matrix differential
equations*, NeurIPS 2022 (DLRT: one pass, `step`); Schotthöfer et al., arXiv 2505.08022, equations 6 to 8 and
algorithm 1 (the two-step scheme: `augment`, many steps of S, `truncate`).

Shapes: U (*batch, m, r), S (*batch, r, r), V (*batch, n, r). A batch (the heads of a layer) shares one rank. With G the
gradient of W, that of K = U S is ∇K = G V (*batch, m, r), and that of L = V Sᵀ is ∇L = Gᵀ U (*batch, n, r).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

Factors = tuple[Tensor, Tensor, Tensor]


def orthonormal(left: Tensor, right: Tensor, core: Tensor | None = None) -> Factors:
    """U, Σ, V of left · core · rightᵀ: the same matrix, Σ diagonal and descending, in float64 on the way.

    Args:
        left: (*batch, m, r)
        right: (*batch, n, r)
        core: (*batch, r, r), the identity if not given.

    Returns:
        (*batch, m, k), (*batch, k, k), (*batch, n, k) with k = min(r, m, n).
    """
    (basis, upper), (other, lower) = torch.linalg.qr(left.double()), torch.linalg.qr(right.double())
    inner = upper @ lower.mT if core is None else upper @ core.double() @ lower.mT
    turned, sigma, back = torch.linalg.svd(inner, full_matrices=False)
    return _as(left, basis @ turned, torch.diag_embed(sigma), other @ back.mT)


def side_gradients(factors: Factors, gradients: Factors) -> tuple[Tensor, Tensor]:
    """∇K and ∇L from the gradients of U, S and V, where S is diagonal, as `orthonormal` and `truncate` leave it.

    Column j of ∂U = G V Sᵀ is σ_j times that of ∇K, with all its digits however small σ_j is: multiplying by a diagonal
    matrix mixes nothing. A column is lost only where σ_j is zero (or ∂U underflows); there what lies in the span of U
    is still known from ∂S = Uᵀ G V, and the rest is left out.

    Args:
        factors: U, S, V.
        gradients: ∂U, ∂S, ∂V.
    """
    (left, core, right), (of_left, of_core, of_right) = factors, gradients
    sigma = core.diagonal(dim1=-2, dim2=-1)[..., None, :]
    sides = []
    for basis, of_basis, inside in ((left, of_left, of_core), (right, of_right, of_core.mT)):
        divided = torch.where(sigma == 0, 0.0, of_basis / torch.where(sigma == 0, 1.0, sigma))
        sides.append(basis @ inside + _outside(basis, divided))
    return sides[0], sides[1]


def augment(
    left: Tensor, core: Tensor, right: Tensor, grad_k: Tensor, grad_l: Tensor, widest: int | None = None
) -> Factors:
    """Û, Ŝ, V̂ of the same matrix in bases that hold the gradient's directions too: orth [U | ∇K], orth [V | ∇L].

    The first r columns of Û are U, made orthonormal again, and those of V̂ are V. What is added where gradients are
    dependent or zero is arbitrary, but orthonormal. Where 2 r exceeds m, n or ``widest``, the leading directions of the
    gradient outside that basis are added, up to that. A basis that is complete before the other one, which then still
    has to turn, gets columns of zeros beside: the core stays square, and its rows or columns there stay zero.

    Args:
        widest: What the rank may be at most; of heads their width. At least r.

    Returns:
        (*batch, m, k), (*batch, k, k), (*batch, n, k) with k = min(2 r, max(m, n), widest).
    """
    rank = left.shape[-1]
    room = rank if widest is None else min(rank, widest - rank)
    more = [min(room, basis.shape[-2] - rank) for basis in (left, right)]
    new_left, new_right = _extended(left, grad_k, more[0]), _extended(right, grad_l, more[1])
    new_left, new_right = F.pad(new_left, (0, max(more) - more[0])), F.pad(new_right, (0, max(more) - more[1]))
    new_core = (new_left.mT @ left.double()) @ core.double() @ (right.double().mT @ new_right)
    return _as(left, new_left, new_core, new_right)


def tangent_gradient(old: Factors, new: Factors, grad_k: Tensor, grad_l: Tensor, grad_core: Tensor) -> Tensor:
    """The gradient of the augmented core from the one pass that gave ∇K, ∇L and ∂S, (*batch, k, k).

    It is Ûᵀ P(G) V̂ with the projection of G onto the tangent space of matrices of rank r,
    P(G) = U Uᵀ G + G V Vᵀ − U Uᵀ G V Vᵀ: all of Ûᵀ G V̂ but what couples new columns with new rows, which no gradient
    at the old factors knows. So a step is not lost to augmenting, whatever the optimizer.

    Args:
        old: U, S, V.
        new: What `augment` made of them.
    """
    (left, _, right), (new_left, _, new_right) = old, new
    rows, columns = new_left.mT @ left, right.mT @ new_right  # (k, r), (r, k)
    return rows @ (grad_l.mT @ new_right) + (new_left.mT @ grad_k) @ columns - rows @ grad_core @ columns


def kept_rank(sigma: Tensor, tolerance: float, rank_min: int = 2, rank_max: int | None = None) -> int:
    """The smallest r with (Σ_{j>r} σ_j²)^½ ≤ tolerance · ‖σ‖, within rank_min and rank_max, over a batch together.

    Args:
        sigma: (*batch, k), descending.
    """
    energies = sigma.double().square().reshape(-1, sigma.shape[-1]).sum(0)
    tails = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])  # tails[r]: from the (r+1)-th on
    rank = int((tails > tolerance**2 * tails[0]).sum())
    largest = sigma.shape[-1] if rank_max is None else min(rank_max, sigma.shape[-1])
    return min(max(rank, rank_min), largest)


def truncate(
    left: Tensor, core: Tensor, right: Tensor, tolerance: float, rank_min: int = 2, rank_max: int | None = None
) -> Factors:
    """U P, Σ, V Q of the SVD S = P Σ Qᵀ, cut at the rank of `kept_rank`: the best approximation of that rank.

    Columns of zeros that `augment` gave to a complete basis go first.

    Returns:
        (*batch, m, r), (*batch, r, r) diagonal and descending, (*batch, n, r).
    """
    left, right = left[..., : left.shape[-2]], right[..., : right.shape[-2]]
    core = core[..., : left.shape[-1], : right.shape[-1]]
    turned, sigma, back = torch.linalg.svd(core.double(), full_matrices=False)
    rank = kept_rank(sigma, tolerance, rank_min, rank_max)
    first, last = turned[..., :rank], back.mT[..., :rank]
    return _as(left, left.double() @ first, torch.diag_embed(sigma[..., :rank]), right.double() @ last)


def step(
    left: Tensor,
    core: Tensor,
    right: Tensor,
    gradient: Tensor,
    rate: float,
    tolerance: float = 0.0,
    rank_min: int = 2,
    rank_max: int | None = None,
) -> Factors:
    """One whole step of gradient descent: augment, S ← Ŝ − rate · Ûᵀ G V̂, truncate.

    Augmenting does not move W, so G is the gradient there too, and W becomes W − rate · Û Ûᵀ G V̂ V̂ᵀ before it is cut.

    Args:
        gradient: G, (*batch, m, n).
    """
    left, core, right = augment(left, core, right, gradient @ right, gradient.mT @ left)
    return truncate(left, core - rate * (left.mT @ gradient @ right), right, tolerance, rank_min, rank_max)


def transported(moment: Tensor, rows: Tensor, columns: Tensor, power: int) -> Tensor:
    """An optimizer's moment of S, in new bases: rows · m · columns, of squares (power 2) with squared entries.

    Gradients transform so exactly, since ∂Ŝ = (Ûᵀ U) ∂S (Vᵀ V̂) inside the old spans. For squares it is the expectation
    where entries are uncorrelated. (Squaring rows · √v · columns instead, as in the authors' later code, lets terms of
    different signs cancel: a v near zero beside an m that is not makes one entry of the next step enormous.)

    Args:
        rows: Ûᵀ U, (*batch, k, r).
        columns: Vᵀ V̂, (*batch, r, k).
    """
    return (rows.double().pow(power) @ moment.double() @ columns.double().pow(power)).to(moment.dtype)


# ----------------------------------------------------------------------------------------------------


def _outside(basis: Tensor, directions: Tensor) -> Tensor:
    """What of directions is orthogonal to an orthonormal basis."""
    return directions - basis @ (basis.mT @ directions)


def _extended(basis: Tensor, gradient: Tensor, extra: int) -> Tensor:
    """The basis and ``extra`` further columns out of a gradient's, orthonormal, in float64.

    Householder's QR stays orthonormal however dependent the columns are; each is brought to length one before, since
    a gradient may be so small that its squares are zero.
    """
    basis, gradient = basis.double(), gradient.double()
    new = _outside(basis, gradient / gradient.abs().amax((-2, -1), keepdim=True).clamp_min(_tiny(gradient)))
    if extra < new.shape[-1]:
        *_, back = torch.linalg.svd(new, full_matrices=False)
        new = (new @ back.mT)[..., :extra]
    largest = new.abs().amax(-2, keepdim=True).clamp_min(_tiny(new))
    orthonormal, upper = torch.linalg.qr(torch.cat([basis, new / largest], -1))
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(basis.dtype)
    return orthonormal * signs[..., None, :]


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny


def _as(like: Tensor, *tensors: Tensor) -> Factors:
    return tuple(tensor.to(like.dtype) for tensor in tensors)
