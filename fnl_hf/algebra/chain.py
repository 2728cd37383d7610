"""Chains: W = A_1 A_2 ⋯ A_n, batched over heads.

A chain is a sequence of tensors, factor i of shape (*batch_i, r_{i-1}, r_i). Batch shapes broadcast: in grouped-query
attention the g query heads of a group share one key, so Q is (G, g, d, h) and K is (G, 1, h, d), and whatever
belongs to the shared factor sums over its group, exactly as autograd sums over a broadcast dimension.

Nothing here ever forms W (``product`` apart): norms and gradients go through the r x r Gram matrices, which cost
O((m + n) r²) instead of O(m n r). Grams are accumulated in float32 or better whatever the factors' dtype.

Sources: Khodak et al., ICLR 2021 (METHODS 1.1-1.3, 1.13, 1.14).
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def product(factors: Sequence[Tensor]) -> Tensor:
    """The matrix itself, (*batch, m, n). For looking at, never on the way of a training step."""
    return reduce(torch.matmul, factors)


def squared_norm(factors: Sequence[Tensor]) -> Tensor:
    """Σ ‖A_1 ⋯ A_n‖²_F over the batch, a scalar (differentiable), from Grams: ⟨P, A_n A_nᵀ⟩ (METHODS 1.2)."""
    *first, last = map(_accumulating, factors)
    left = _left_grams([*first, last])[-1]
    right = last @ last.mT
    if left is None:  # a chain of one factor
        return right.diagonal(dim1=-2, dim2=-1).sum()
    return (_sum_to(left, right) * right).sum()


def decay_gradients(factors: Sequence[Tensor], grams: list | None = None) -> list[Tensor]:
    """The gradients of ½ Σ ‖A_1 ⋯ A_n‖²_F, one per factor and of its shape.

    One rule for every length: ∂A_i = P_i A_i S_i with the left Gram P_i = (A_1⋯A_{i-1})ᵀ(A_1⋯A_{i-1}) and the right
    Gram S_i = (A_{i+1}⋯A_n)(A_{i+1}⋯A_n)ᵀ, each built from its neighbour in one small product.

    Args:
        grams: what ``decay_grams(factors)`` returned, where the caller has it.
    """
    grams = decay_grams(factors) if grams is None else grams
    return [_gradient(factor, *pair) for factor, pair in zip(factors, grams, strict=True)]


def add_decay_(
    factors: Sequence[Tensor],
    targets: Sequence[Tensor | None],
    scales: Sequence[float],
    grams: Sequence[tuple[Tensor | None, Tensor | None]],
) -> None:
    """targets_i += scales_i · ∂A_i in place, None targets left out: ``decay_gradients`` with few temporaries.

    The targets may be the factors themselves: the Grams hold what a gradient takes from the others, as they were.
    """
    for factor, target, scale, (left, right) in zip(factors, targets, scales, grams, strict=True):
        if target is None:
            continue
        one_gram = (left is None) != (right is None)
        if one_gram and factor.dim() == 3 and factor.dtype == (left if right is None else right).dtype:
            _add_product_(target, (factor, right) if left is None else (left, factor), scale)
        else:
            target.add_(_gradient(factor, left, right), alpha=scale)


def decay_grams(factors: Sequence[Tensor]) -> list[tuple[Tensor | None, Tensor | None]]:
    """(P_i, S_i) of every factor, None for an identity; summed over a group wherever its factor is shared."""
    working = [_accumulating(factor) for factor in factors]
    pairs = zip(_left_grams(working), _right_grams(working), strict=True)
    if len(factors) > 2:  # inside a longer chain P and S both depend on the group: their product is summed instead
        return list(pairs)
    return [
        tuple(None if gram is None else _sum_to(gram, factor) for gram in pair)
        for factor, pair in zip(factors, pairs, strict=True)
    ]


def spectrum(grams: Sequence[tuple[Tensor | None, Tensor | None]]) -> Tensor:
    """Singular values of the product in descending order, (*batch, r), from its Grams.

    σ² are the eigenvalues of P S. Right to about 1e-8 of the largest for float64 Grams, 1e-4 for float32: for
    measuring, where ``singular_values`` takes the QR of the factors.
    """
    left, right = grams[-1][0].double(), grams[-2][1].double()
    values, vectors = torch.linalg.eigh(right)
    root = vectors * values.clamp_min(0).sqrt()[..., None, :]
    return torch.linalg.eigvalsh(root.mT @ left @ root).clamp_min(0).sqrt().flip(-1)


def bound(grams: Sequence[tuple[Tensor | None, Tensor | None]]) -> Tensor:
    """``nuclear_bound`` from Grams, a scalar: ½ (tr P + tr S). At least the sum of ``spectrum``, tight at balance."""
    return (_trace(grams[-1][0]).sum() + _trace(grams[-2][1]).sum()) / 2


def imbalance(grams: Sequence[tuple[Tensor | None, Tensor | None]]) -> Tensor:
    """‖P − S‖_F / (‖P‖_F + ‖S‖_F) of the outer factors' Grams, (*batch): zero where they are balanced, at most 1."""
    left, right = grams[-1][0], grams[-2][1]
    norm = torch.linalg.matrix_norm
    return norm(left - right) / (norm(left) + norm(right)).clamp_min(torch.finfo(left.dtype).tiny)


def stiffness(grams: Sequence[tuple[Tensor | None, Tensor | None]], exact: bool = False) -> Tensor:
    """How much larger than its factor a decay gradient can be, max ‖P_i‖₂ ‖S_i‖₂, a scalar; unless exact, a bound."""
    size = _largest_eigenvalue if exact else _trace
    return torch.stack([reduce(torch.mul, [size(g).max() for g in pair if g is not None]) for pair in grams]).max()


def singular_values(factors: Sequence[Tensor]) -> Tensor:
    """Singular values of the product, (*batch, k) in descending order, from the r x r core of two QRs."""
    left, right = _two(factors)
    core, _, _ = _core(left, right)
    return torch.linalg.svdvals(core)


def nuclear_norm(factors: Sequence[Tensor]) -> Tensor:
    """Σ ‖A_1 ⋯ A_n‖_* over the batch, a scalar."""
    return singular_values(factors).sum()


def nuclear_bound(factors: Sequence[Tensor]) -> Tensor:
    """½ (‖A_1‖² + ‖A_n‖²), a scalar: what weight decay on two factors bounds the nuclear norm by (Srebro & Shraibman).

    Tight exactly where the factors are balanced. Only chains of two factors have this bound.
    """
    if len(factors) != 2:
        raise ValueError(f"the nuclear bound is defined for two factors, got a chain of {len(factors)}")
    return sum(_accumulating(factor).square().sum() for factor in factors) / 2


def non_orthogonality(factors: Sequence[Tensor]) -> Tensor:
    """‖G − diag G‖_F / ‖G‖_F for G = A_1ᵀA_1 and G = A_nA_nᵀ, (2, *batch): zero for spectral factors."""
    left, right = _two(factors)
    grams = torch.stack([left.mT @ left, right @ right.mT])
    off_diagonal = grams - torch.diag_embed(grams.diagonal(dim1=-2, dim2=-1))
    return torch.linalg.matrix_norm(off_diagonal) / torch.linalg.matrix_norm(grams)


def factorize(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors (*batch, m, rank), (*batch, rank, n) of the best rank-``rank`` approximation of a dense matrix.

    W = A Σ Bᵀ gives A_r Σ_r^½ and Σ_r^½ B_rᵀ (spectral initialisation). ``rank`` may exceed min(m, n): the surplus
    columns are zero in one factor only, or they could never learn (METHODS 1.11 O2).
    """
    left, sigma, right = torch.linalg.svd(_accumulating(matrix), full_matrices=False)
    return _split_spectrum(left, sigma, right, rank, scale=None, dtype=matrix.dtype)


def balance(factors: Sequence[Tensor], rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Balanced factors of the product of two factors, truncated to the best rank ``rank`` where that is smaller.

    Args:
        factors: ``(A, B)`` of shapes (*batch, m, r) and (*batch, r, n). Over a group that shares B, all its A are
            stacked, which gives the best basis that the group can share.
        rank: at most r; r if not given, and then the product does not change.

    Returns:
        ``(A', B')`` of shapes (*batch, m, rank), (*batch, rank, n) with A'ᵀA' = B'B'ᵀ = Σ, the leading singular values.

    The m x n product is never formed. With Grams AᵀA = L_a L_aᵀ and BBᵀ = L_b L_bᵀ the small matrix L_aᵀ L_b = P Σ Qᵀ
    holds the product's spectrum, and A' = A L_a^{-T} P Σ^½, B' = Σ^½ Qᵀ L_b^{-1} B (METHODS 1.14). Where the factors
    are too ill-conditioned for that, two QRs and the SVD of R_a R_bᵀ do the same (METHODS 1.1).
    """
    dtype = factors[0].dtype
    left, right = stack_groups(*map(_accumulating, factors))
    rank = left.shape[-1] if rank is None else rank
    if not 1 <= rank <= left.shape[-1]:
        raise ValueError(f"rank {rank} is outside 1..{left.shape[-1]}, the width of the factors")
    gauges = _gauges_from_grams(left, right, rank)
    balanced = (
        (left @ gauges[0], gauges[1] @ right) if gauges else _balance_by_qr(left.double(), right.double(), rank, dtype)
    )
    shapes = (*factors[0].shape[:-1], rank), (*factors[1].shape[:-2], rank, factors[1].shape[-1])
    return tuple(factor.to(dtype).reshape(shape) for factor, shape in zip(balanced, shapes, strict=True))


def carry(before: Sequence[Tensor], after: Sequence[Tensor], moments: Sequence[Tensor], power: int) -> list[Tensor]:
    """An optimizer's moments of two factors, carried to the factors that took their place.

    Args:
        before, after: The factors (A, B), and (A G, H B) of equal or lower rank.
        moments: One per factor of ``before``, of its shape.
        power: 1 for sums of gradients, 2 for sums of their squares.

    With P the gradient of the product, that of A is P Bᵀ and that of A G is P (H B)ᵀ = (P Bᵀ) Hᵀ: the gradient of one
    factor changes by the gauge of the other, exactly so for anything linear in it. Squares follow the squared gauge,
    which is their expectation where the entries of a gradient are uncorrelated.
    """
    (left, right), (new_left, new_right) = ([f.double() for f in stack_groups(*pair)] for pair in (before, after))
    gauges = torch.linalg.pinv(left) @ new_left, new_right @ torch.linalg.pinv(right)  # G, H
    if before[0].shape[:-2] != before[1].shape[:-2]:  # of a group, whose left factors were stacked
        gauges = [gauge.unsqueeze(-3) for gauge in gauges]
    of_left, of_right = (gauge.mT.pow(power) for gauge in gauges)
    carried = moments[0].double() @ of_right, of_left @ moments[1].double()
    return [new.to(old.dtype) for new, old in zip(carried, moments, strict=True)]


def leading(factors: Sequence[Tensor], rank: int) -> list[Tensor]:
    """The first ``rank`` columns of A and rows of B, copied."""
    left, right = factors
    return [left[..., :rank].clone(), right[..., :rank, :].clone()]


def batched(factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The factors as (B, r_{i-1}, r_i): batch dimensions flattened, a group's left factors stacked."""
    *inner, last = factors
    stacked = [stack_groups(inner[0], last)[0], *(stack_groups(inner[0], factor)[1] for factor in (*inner[1:], last))]
    return tuple(factor.reshape(-1, *factor.shape[-2:]) for factor in stacked)


def change_basis(factors: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """The same product of two factors in a random, well-conditioned basis: A G and G⁻¹ B."""
    left, right = factors
    shape = (*right.shape[:-1], right.shape[-2])  # one G per batch entry of the shared side
    orthogonal, _ = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=right.dtype).to(right.device))
    scale = torch.exp(2 * torch.rand(shape[:-1], generator=generator, dtype=right.dtype).to(right.device) - 1)
    return [left @ (orthogonal * scale[..., None, :]), (orthogonal.mT / scale[..., :, None]) @ right]


# ----------------------------------------------------------------------------------------------------


def _accumulating(tensor: Tensor) -> Tensor:
    """float32 or better: half-precision Grams are wrong in the third digit (METHODS 1.9)."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def _largest_eigenvalue(gram: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(gram.double())[..., -1]


def _sum_to(gram: Tensor, like: Tensor) -> Tensor:
    """Sum a Gram over the batch dimensions along which ``like`` is shared."""
    shared = [i for i, (n, size) in enumerate(zip(gram.shape[:-2], like.shape[:-2], strict=True)) if size == 1 < n]
    return gram.sum(shared, keepdim=True) if shared else gram


def _add_product_(target: Tensor, pair: tuple[Tensor, Tensor], scale: float) -> None:
    """target += scale · pair[0] @ pair[1], in the direction in which the target's entries lie."""
    if target.stride(-1) != 1:
        target, pair = target.mT, (pair[1].mT, pair[0].mT)
    rows_follow_rows = target.stride(-2) == target.shape[-1]
    if rows_follow_rows and all(target.data_ptr() != operand.data_ptr() for operand in pair):
        target.baddbmm_(*pair, alpha=scale)  # no temporary
    else:  # where heads are columns, writing a product into strided rows takes longer than adding it
        target.add_(torch.bmm(*pair), alpha=scale)


def _gradient(factor: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """P A S, of the factor's shape and dtype."""
    gradient = _accumulating(factor)
    gradient = gradient if left is None else left @ gradient
    gradient = gradient if right is None else gradient @ right
    return gradient.sum_to_size(factor.shape).to(factor.dtype)


def _left_grams(factors: Sequence[Tensor]) -> list[Tensor | None]:
    """P_1 … P_n; P_1 is the identity, given as None. P_{i+1} = A_iᵀ P_i A_i."""
    grams: list[Tensor | None] = [None]
    for factor in factors[:-1]:
        grams.append(factor.mT @ (factor if grams[-1] is None else grams[-1] @ factor))
    return grams


def _right_grams(factors: Sequence[Tensor]) -> list[Tensor | None]:
    """S_1 … S_n; S_n is the identity, given as None. S_{i-1} = A_i S_i A_iᵀ."""
    return _left_grams([factor.mT for factor in reversed(factors)])[::-1]


def _two(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Any chain as two factors (*batch, m, r), (*batch, r, n); a shared group is stacked, so that batches agree."""
    *first, last = map(_accumulating, factors)
    left = product(first)
    return stack_groups(left, last)


def stack_groups(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """(…, G, g, m, r) and (…, G, 1, r, n) as (…, G, g·m, r) and (…, G, r, n): one matrix per group (METHODS 1.13)."""
    if left.shape[:-2] == right.shape[:-2]:
        return left, right
    return left.flatten(-3, -2), right.squeeze(-3)


def _core(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """left @ right = Q_l (R_l R_rᵀ) Q_rᵀ: the small core, Q_l and Q_rᵀ."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    return r_left @ r_right.mT, q_left, q_right.mT


def _balance_by_qr(left: Tensor, right: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``balance`` for any two float64 factors, however ill-conditioned."""
    core, left_basis, right_basis = _core(left, right)
    p, sigma, qt = torch.linalg.svd(core, full_matrices=False)
    # A direction that the product lacks stays alive in the right factor, at that factor's typical size.
    scale = torch.ones_like(sigma[..., 0])
    for size in (torch.linalg.matrix_norm(left), torch.linalg.matrix_norm(right)):
        scale = torch.where(size > 0, size / left.shape[-1] ** 0.5, scale)
    return _split_spectrum(left_basis @ p, sigma, qt @ right_basis, rank, scale, dtype)


def _gauges_from_grams(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """The r x rank and rank x r changes of basis that balance a product, or None where Grams lose too many digits."""
    double = left.double(), right.double()
    grams = double[0].mT @ double[0], double[1] @ double[1].mT
    (chol_left, chol_right), infos = zip(*(torch.linalg.cholesky_ex(gram) for gram in grams), strict=True)
    if any(info.any() for info in infos):
        return None
    identity = torch.eye(left.shape[-1], dtype=torch.float64, device=left.device).expand_as(chol_left)
    inverses = [torch.linalg.solve_triangular(chol, identity, upper=False) for chol in (chol_left, chol_right)]
    # ‖L‖‖L⁻¹‖ is r for orthogonal columns. The gauges are applied in the factors' own precision, where an error of
    # that size times the rounding unit appears: ten times r is invisible, more goes through QR in float64.
    for chol, inverse in zip((chol_left, chol_right), inverses, strict=True):
        condition = torch.linalg.matrix_norm(chol) * torch.linalg.matrix_norm(inverse)
        if not bool((condition <= 10 * left.shape[-1]).all()):
            return None
    p, sigma, qt = torch.linalg.svd(chol_left.mT @ chol_right)
    root = sigma[..., :rank].sqrt()
    left_gauge = inverses[0].mT @ (p[..., :rank] * root[..., None, :])  # (*batch, r, rank)
    right_gauge = (root[..., :, None] * qt[..., :rank, :]) @ inverses[1]  # (*batch, rank, r)
    return left_gauge.to(left.dtype), right_gauge.to(right.dtype)


def _split_spectrum(left: Tensor, sigma: Tensor, right: Tensor, rank: int, scale: Tensor | None, dtype: torch.dtype):
    """A_r Σ_r^½ and Σ_r^½ B_rᵀ; where σ = 0, only the left is zero: with both, the direction could never learn."""
    missing = rank - sigma.shape[-1]
    if missing > 0:  # a rank above min(m, n): continue both bases by unit vectors, with singular value zero
        sigma = torch.nn.functional.pad(sigma, (0, missing))
        left = torch.nn.functional.pad(left, (0, missing))
        cycle = torch.arange(missing, device=right.device) % right.shape[-1]
        surplus = torch.nn.functional.one_hot(cycle, right.shape[-1]).to(right)
        right = torch.cat([right, surplus.expand(*right.shape[:-2], *surplus.shape)], dim=-2)
    left, sigma, right = left[..., :rank], sigma[..., :rank], right[..., :rank, :]
    root = sigma.sqrt()
    if scale is None:
        scale = root.square().mean(-1).sqrt()
    alive = sigma > sigma[..., :1] * sigma.shape[-1] * torch.finfo(dtype).eps
    left_root = torch.where(alive, root, 0.0)
    right_root = torch.where(alive, root, scale[..., None])
    return (left * left_root[..., None, :]).to(dtype), (right_root[..., :, None] * right).to(dtype)
