"""Chains: W = A_1 A_2 ⋯ A_n, batched over heads. One factor is a dense matrix, two are U Vᵀ, three U M Vᵀ.

A chain is a sequence of tensors, factor i of shape (*batch_i, r_{i-1}, r_i). Batch shapes broadcast: in grouped-query
attention the g query heads of a group share one key, so Q is (G, g, d, h) and K is (G, 1, h, d), and whatever
belongs to the shared factor sums over its group, exactly as autograd sums over a broadcast dimension. What a group
shares comes after what it does not. The inner width of a chain is the narrowest of r_1 … r_{n-1}: its rank at most.

Nothing here ever forms W (``product`` apart): norms and gradients go through the r x r Gram matrices, which cost
O((m + n) r²) instead of O(m n r). Grams are accumulated in float32 or better whatever the factors' dtype.

``Form`` says what each function means for every form; the words here are those of chains. Frobenius decay and spectral
factors: Khodak et al., *Initialization and Regularization of Factorized Neural Layers*, ICLR 2021.
"""

import math
from collections.abc import Collection, Sequence
from functools import reduce

import torch
from torch import Tensor

from . import spectral
from .tensors import SIDES, accumulating, check_sides, shared_axes, stack_groups, sum_to

Grams = Sequence[tuple[Tensor | None, Tensor | None]]

has_matrix = True


def product(factors: Sequence[Tensor]) -> Tensor:
    """The matrix itself, (*batch, m, n). For looking at, never on the way of a training step."""
    return reduce(torch.matmul, factors)


def squared_norm(factors: Sequence[Tensor]) -> Tensor:
    """Σ ‖A_1 ⋯ A_n‖²_F over the batch, a scalar (differentiable).

    From Grams: ‖B A_n‖²_F = tr(A_nᵀ BᵀB A_n) = ⟨BᵀB, A_n A_nᵀ⟩ with B = A_1 ⋯ A_{n-1}.
    """
    *first, last = working = [accumulating(factor) for factor in factors]
    if not first:
        return last.square().sum()
    return (sum_to(_left_grams(working)[-1], last) * (last @ last.mT)).sum()


def decay_gradients(factors: Sequence[Tensor], grams: Grams | None = None) -> list[Tensor]:
    """The gradients of ½ Σ ‖A_1 ⋯ A_n‖²_F, one per factor and of its shape and dtype.

    One rule for every length: ∂A_i = P_i A_i S_i with the left Gram P_i = (A_1⋯A_{i-1})ᵀ(A_1⋯A_{i-1}) and the right
    Gram S_i = (A_{i+1}⋯A_n)(A_{i+1}⋯A_n)ᵀ, each built from its neighbour in one small product. For U Vᵀ these are the
    paper's U VᵀV and V UᵀU; for one factor W it is W.
    """
    if len(factors) == 1:
        return [factors[0].clone()]
    grams = decay_grams(factors) if grams is None else grams
    return [_gradient(factor, *pair) for factor, pair in zip(factors, grams, strict=True)]


def add_decay_(
    factors: Sequence[Tensor], targets: Sequence[Tensor | None], scales: Sequence[float], grams: Grams
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
    working = [accumulating(factor) for factor in factors]
    pairs = zip(factors, _left_grams(working), _right_grams(working), strict=True)
    return [(_of_group(left, right, factor), _of_group(right, left, factor)) for factor, left, right in pairs]


def spectrum(grams: Grams) -> Tensor:
    """Singular values of the product in descending order, (*batch, inner width), float64, from its Grams.

    W = B C, split at the narrowest joint, has the σ² of WWᵀ = B CCᵀ Bᵀ: the eigenvalues of P S with P = BᵀB and
    S = CCᵀ. Right to about 1e-8 of the largest for float64 Grams, 1e-4 for float32: for measuring, where
    ``singular_values`` takes the QR of the factors. Over a group, those of its stacked matrix; batch as for ``bound``.

    Raises:
        ValueError: The Grams are those of one factor, which says nothing about its spectrum.
    """
    left, right = (gram.double() for gram in _at_joint(grams))
    values, vectors = torch.linalg.eigh(right)
    root = vectors * values.clamp_min(0).sqrt()[..., None, :]
    return torch.linalg.eigvalsh(root.mT @ left @ root).clamp_min(0).sqrt().flip(-1)


def bound(grams: Grams) -> Tensor:
    """½ (‖B‖² + ‖C‖²) summed over the batch, a scalar: at least the sum of ``spectrum``, tight at balance.

    W = B C, split at the narrowest joint. For two factors it is what weight decay on both bounds the nuclear norm by
    (Srebro & Shraibman, *Rank, trace-norm and max-norm*, COLT 2005).

    Raises:
        ValueError: One factor has no joint.
    """
    left, right = _at_joint(grams)
    return (_trace(left).sum() + _trace(right).sum()) / 2


def imbalance(grams: Grams) -> Tensor:
    """‖P − S‖_F / (‖P‖_F + ‖S‖_F) at the narrowest joint, (*batch): zero where balanced, at most 1.

    Raises:
        ValueError: One factor has no joint.
    """
    left, right = _at_joint(grams)
    norm = torch.linalg.matrix_norm
    return norm(left - right) / (norm(left) + norm(right)).clamp_min(torch.finfo(left.dtype).tiny)


def stiffness(grams: Grams, exact: bool = False, moving: Sequence[bool] | None = None) -> Tensor:
    """(n − 1) max ‖P_i‖₂ ‖S_i‖₂ over the n factors that move (1 of a single matrix), a scalar; unless exact, a bound.

    ‖P_i‖₂ ‖S_i‖₂ is how much larger than its factor a decay gradient can be. A decoupled step with rate · stiffness < 1
    does not raise the norm of the product. In a longer chain the steps of all factors compound: without n − 1 the
    squared norm of some chains of three grew sixfold in one step; with it, a search by gradient found none that grew.
    """
    if len(grams) == 1:  # the gradient is the factor
        return torch.ones(())
    norm = _largest_eigenvalue if exact else lambda gram: torch.minimum(_trace(gram), gram.abs().sum(-1).amax(-1))
    moved = [pair for pair, moves in zip(grams, moving or [True] * len(grams), strict=True) if moves]
    sizes = [reduce(torch.mul, [norm(gram).max() for gram in pair if gram is not None]) for pair in moved]
    return torch.stack(sizes).max() * max(1, len(moved) - 1)


def singular_values(factors: Sequence[Tensor]) -> Tensor:
    """Singular values of the product in descending order, (*batch, rank) with the rank of ``size``.

    One factor: its SVD. More: the r x r core of two QRs, filled up with zeros where r exceeds the matrix. Over a
    group, those of its stacked matrix, (*batch, 1, rank).
    """
    if len(factors) == 1:
        return torch.linalg.svdvals(accumulating(factors[0]))
    small, _, _ = spectral.core(*_halves(factors))
    values = torch.linalg.svdvals(small)
    values = torch.nn.functional.pad(values, (0, size(factors)[1] - values.shape[-1]))
    return values.reshape(*factors[-1].shape[:-2], values.shape[-1])


def non_orthogonality(factors: Sequence[Tensor]) -> Tensor:
    """‖G − diag G‖_F / ‖G‖_F of both sides' Grams, (2, *batch): zero for spectral factors.

    The paper's metric of how far factors are from orthogonal is the mean of the two. Beyond the ``Form``: for chains
    of two or more factors, split at the narrowest joint.
    """
    left, right = _halves(factors)
    grams = torch.stack([left.mT @ left, right @ right.mT])
    off_diagonal = grams - torch.diag_embed(grams.diagonal(dim1=-2, dim2=-1))
    return torch.linalg.matrix_norm(off_diagonal) / torch.linalg.matrix_norm(grams)


def size(factors: Sequence[Tensor]) -> tuple[int, int]:
    """(matrices, rank): the entries of the first factor's batch, and the inner width, or min(m, n) of one factor."""
    return math.prod(factors[0].shape[:-2]), min(_widths(factors) or factors[0].shape[-2:])


def balance(factors: Sequence[Tensor], rank: int | None = None) -> tuple[Tensor, ...]:
    """Balanced factors of the best approximation of rank ``rank`` of the product (spectral initialisation).

    Args:
        factors: One factor W gives two, A Σ^½ and Σ^½ Bᵀ of its SVD. Two give two. More give as many, of one width,
            with identities inside (the paper's deep factors: U Σ^½, I, Σ^½ Vᵀ). Over a group that shares what follows
            the first factor, those are stacked, which gives the best basis that the group can share.
        rank: At most the inner width, and that if not given: then the product does not change. Of one factor, any
            rank, min(m, n) if not given; above that the surplus columns are zero in the left factor only.

    Returns:
        Factors with A'ᵀA' = B'B'ᵀ = Σ, the leading singular values, for the outer two A' and B'.

    Raises:
        ValueError: A rank outside these bounds.
    """
    first, last, largest = factors[0], factors[-1], size(factors)[1]
    if len(factors) == 1:
        _check_rank(largest if rank is None else rank)
        return spectral.of_matrix(first, largest if rank is None else rank)
    rank = largest if rank is None else rank
    _check_rank(rank, largest)
    left, right = spectral.of_product(*_halves(factors), rank, first.dtype)
    inner = [_identities(rank, last) for _ in factors[1:-1]]
    return left.reshape(*first.shape[:-1], rank), *inner, right.reshape(*last.shape[:-2], rank, last.shape[-1])


def leading(factors: Sequence[Tensor], rank: int) -> list[Tensor]:
    """The first ``rank`` features of every joint, copied: columns of A, rows of B. One factor W is cut as W · I.

    Raises:
        ValueError: A rank below 1, or above the inner width of two or more factors.
    """
    if len(factors) == 1:
        _check_rank(rank)
        left, right = spectral.surplus(factors[0], _identities(factors[0].shape[-1], factors[0]), rank)
        return [left[..., :rank].clone(), right[..., :rank, :].clone()]
    _check_rank(rank, size(factors)[1])
    first, *inner, last = factors
    return [first[..., :rank].clone(), *(f[..., :rank, :rank].clone() for f in inner), last[..., :rank, :].clone()]


def carry(before: Sequence[Tensor], after: Sequence[Tensor], moments: Sequence[Tensor], power: int) -> list[Tensor]:
    """An optimizer's moments of a chain, carried to the factors that took its place.

    With P the gradient of the product, that of A_i is (A_1⋯A_{i-1})ᵀ P (A_{i+1}⋯A_n)ᵀ. From one factor W, whose own
    gradient is P, this gives that of every new one. From as many factors, new products before and after A_i are
    A_1'⋯A_{i-1}' = A_1⋯A_{i-1} G and A_{i+1}'⋯A_n' = H A_{i+1}⋯A_n, so its gradient becomes Gᵀ ∂A_i Hᵀ. Both hold
    exactly for anything linear in the gradient. Squares follow the squared entries of these maps, which is their
    expectation where the entries of a gradient are uncorrelated.

    Raises:
        ValueError: The numbers of factors differ, and there is more than one before.
    """
    if len(before) == 1:
        return _carry_dense(after, moments[0].double(), power, moments[0].dtype)
    if len(before) != len(after):
        raise ValueError(f"moments of {len(before)} factors do not determine those of {len(after)} others")
    carried = [moment.double() for moment in moments]
    for joint in range(1, len(before)):
        of_right, of_left = (gauge.mT.pow(power) for gauge in _gauges(before, after, joint))
        carried[joint - 1] = carried[joint - 1] @ of_left
        carried[joint] = of_right @ carried[joint]
    return [new.to(old.dtype) for new, old in zip(carried, moments, strict=True)]


def batched(factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The factors as (B, r_{i-1}, r_i), live: batch dimensions flattened, a group's first factors stacked."""
    first, *others = factors
    _check_batches(factors)
    if others:
        pairs = [stack_groups(first, factor) for factor in others]
        factors = [pairs[0][0], *(right for _, right in pairs)]
    return tuple(factor.reshape(-1, *factor.shape[-2:]) for factor in factors)


def change_basis(factors: Sequence[Tensor], generator: torch.Generator, sides: Collection[str] = SIDES) -> list[Tensor]:
    """A G and G⁻¹ B at every joint, with random G of condition at most e²; ``sides`` names which of them are applied.

    A factor between two joints takes both. One factor has no joint and comes back as it is.
    """
    check_sides(sides)
    changed = [accumulating(factor) for factor in factors]
    for i, (left, right) in enumerate(zip(factors[:-1], factors[1:], strict=True)):
        gauge, inverse = _random_gauge(left, right, generator)
        if "left" in sides:
            changed[i] = changed[i] @ gauge
        if "right" in sides:
            changed[i + 1] = inverse @ changed[i + 1]
    return [new.to(old.dtype) for new, old in zip(changed, factors, strict=True)]


# ----------------------------------------------------------------------------------------------------


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def _largest_eigenvalue(gram: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(gram.double())[..., -1]


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
    gradient = accumulating(factor)
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


def _of_group(gram: Tensor | None, other: Tensor | None, factor: Tensor) -> Tensor | None:
    """A factor's Gram, summed over a group that shares the factor; if its other Gram differs there too, P A S is."""
    if gram is None or (other is not None and shared_axes(other, factor)):
        return gram
    return sum_to(gram, factor)


def _at_joint(grams: Grams) -> tuple[Tensor, Tensor]:
    """P and S of what lies on the two sides of the narrowest joint (the last of them), one per group."""
    if len(grams) < 2:
        raise ValueError("a chain of one factor is a dense matrix, whose Grams say nothing: take its singular_values")
    joint = _narrowest([left.shape[-1] for left, _ in grams[1:]])
    left, right = grams[joint][0], grams[joint - 1][1]
    return sum_to(left, right), right


def _widths(factors: Sequence[Tensor]) -> list[int]:
    """r_1 … r_{n-1}"""
    return [factor.shape[-1] for factor in factors[:-1]]


def _narrowest(widths: Sequence[int]) -> int:
    """How many factors are to the left of the narrowest joint, the last of equals."""
    return max(i for i, width in enumerate(widths, start=1) if width == min(widths))


def _halves(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A chain of two or more as two factors (*batch, m, r), (*batch, r, n), split at its narrowest joint.

    A shared group is stacked, so that batches agree. Products inside a longer chain are taken in float64.
    """
    if len(factors) == 1:
        raise ValueError("a chain of one factor is a dense matrix and has no two sides")
    if len(factors) == 2:
        return stack_groups(*map(accumulating, factors))
    _check_batches(factors)
    joint, doubles = _narrowest(_widths(factors)), [factor.double() for factor in factors]
    return stack_groups(product(doubles[:joint]), product(doubles[joint:]))


def _gauges(before: Sequence[Tensor], after: Sequence[Tensor], joint: int) -> tuple[Tensor, Tensor]:
    """G and H at a joint: the new product before it is the old one times G, and after it H times the old one."""
    sides = []
    for factors in (before, after):
        _check_batches(factors)
        doubles = [factor.double() for factor in factors]
        sides.append(stack_groups(product(doubles[:joint]), product(doubles[joint:])))
    (left, right), (new_left, new_right) = sides
    gauges = torch.linalg.pinv(left) @ new_left, new_right @ torch.linalg.pinv(right)
    grouped = before[0].shape[:-2] != before[-1].shape[:-2]  # the first factors of a group were stacked
    return tuple(gauge.unsqueeze(-3) for gauge in gauges) if grouped else gauges


def _carry_dense(after: Sequence[Tensor], moment: Tensor, power: int, dtype: torch.dtype) -> list[Tensor]:
    """The moments of every factor from those of the matrix they make, in float64."""
    factors, carried = [factor.double() for factor in after], []
    for i, factor in enumerate(factors):
        of_factor = moment.clone()
        if i > 0:
            of_factor = product(factors[:i]).mT.pow(power) @ of_factor
        if i + 1 < len(factors):
            of_factor = of_factor @ product(factors[i + 1 :]).mT.pow(power)
        carried.append(of_factor.sum_to_size(factor.shape).to(dtype))
    return carried


def _random_gauge(left: Tensor, right: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """G and G⁻¹ for a joint, orthogonal times diagonal: one per batch entry of what is shared."""
    batch = [min(sizes) for sizes in zip(left.shape[:-2], right.shape[:-2], strict=True)]
    shape, dtype, device = (*batch, right.shape[-2], right.shape[-2]), accumulating(right).dtype, right.device
    orthogonal, _ = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=dtype).to(device))
    scale = torch.exp(2 * torch.rand(shape[:-1], generator=generator, dtype=dtype).to(device) - 1)
    return orthogonal * scale[..., None, :], orthogonal.mT / scale[..., :, None]


def _identities(width: int, like: Tensor) -> Tensor:
    """(*batch, width, width) with the batch, dtype and device of another factor."""
    identity = torch.eye(width, dtype=like.dtype, device=like.device)
    return identity.expand(*like.shape[:-2], width, width).clone()


def _check_rank(rank: int, largest: int | None = None) -> None:
    if rank < 1 or (largest is not None and rank > largest):
        bounds = "less than 1" if largest is None else f"outside 1..{largest}, the width of the factors"
        raise ValueError(f"rank {rank} is {bounds}")


def _check_batches(factors: Sequence[Tensor]) -> None:
    """A group shares every factor after the first, or nothing: only then is it one stacked matrix."""
    batches = {tuple(factor.shape[:-2]) for factor in factors[1:]}
    if len(batches) > 1:
        raise ValueError(f"the factors after the first have batches {sorted(batches)}, where they must have one")
