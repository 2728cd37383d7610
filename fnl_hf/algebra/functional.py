"""Low-rank weights that approximate a *function*: the least E‖σ(Wx) − σ(U Vᵀ x)‖² under Gaussian inputs x.

The objective of Vodrahalli et al., *Nonlinear Initialization Methods for Low-Rank Neural Networks*, 2022. For ReLU it
is a sum over rows w of W and y of U Vᵀ of ½‖w‖² + ½‖y‖² − ‖w‖‖y‖ h(ρ) (`gaussian`), for smooth activations a
two-dimensional quadrature per row. Neither needs more of the product than ‖y‖² and ⟨w, y⟩, so that value and gradient
take 4mnr multiplications and U Vᵀ is never formed.

Inputs of second moment C are those of W C^½ and U Vᵀ C^½. A bias has no closed form; these functions know none.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import spectral
from .gaussian import ACTIVATIONS, Activation, Terms, activation_named, correlation
from .tensors import accumulating
from .weighted import roots

STEPS = 20  # of L-BFGS
HISTORY = 6
NO_DIRECTION = 1e-10  # of a row: the share of its length in a space from which on it has a direction there

__all__ = ["ACTIVATIONS", "approximation", "gradient", "optimise", "rescale", "risk", "risks"]


def approximation(
    matrix: Tensor, rank: int, activation: str, columns: Tensor | None = None, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """U (*batch, m, rank) and Vᵀ (*batch, rank, n), not balanced, float64: σ(U Vᵀ x) is near σ(W x).

    The spectral row space, in it the best row lengths, then L-BFGS on both factors. Each step is kept only if it is
    better, so that none of it is worse than spectral factors.

    Args:
        matrix: W, (*batch, m, n), of any floating dtype.
        rank: below min(m, n).
        activation: σ, one of ``ACTIVATIONS``.
        columns: C, (*batch, n, n) positive semidefinite: second moments of x. The identity if None.
        steps: of L-BFGS at most; 0 for none.

    Raises:
        ValueError: The activation is not known, or the rank is outside 1..min(m, n) − 1.
    """
    function = activation_named(activation)
    if not 1 <= rank < min(matrix.shape[-2:]):
        raise ValueError(
            f"rank is {rank}, expected 1..{min(matrix.shape[-2:]) - 1}, below that of the {tuple(matrix.shape[-2:])} "
            "matrix: at full rank nothing is approximated"
        )
    matrix = accumulating(matrix)
    if columns is None:
        weight, spaces = matrix.double(), [_row_space(matrix, rank)]
    else:
        root, inverse = roots(columns)
        weight = matrix.double() @ root
        spaces = [_row_space(weight.to(matrix.dtype), rank), _orthonormal(_row_space(matrix, rank) @ root)]
    starts = [rescale(weight, space, activation) for space in spaces]
    left, right = min(starts, key=lambda pair: float(_sum_of_risks(weight, *pair, function)))
    left, right = optimise(weight, left, right, activation, steps)
    return left, right if columns is None else right @ inverse


def risk(matrix: Tensor, left: Tensor, right: Tensor, activation: str) -> Tensor:
    """E‖σ(Wx) − σ(U Vᵀ x)‖² for x ~ N(0, I), a float64 scalar, summed over the batch.

    Args:
        matrix: W, (*batch, m, n).
        left, right: U (*batch, m, r) and Vᵀ (*batch, r, n).
        activation: σ, one of ``ACTIVATIONS``.
    """
    return risks(matrix, left, right, activation).sum()


def risks(matrix: Tensor, left: Tensor, right: Tensor, activation: str) -> Tensor:
    """What each row adds to ``risk``, (*batch, m)."""
    matrix, left, right = (each.double() for each in (matrix, left, right))
    return _evaluated(matrix, left, right, activation_named(activation))[0].risk


def gradient(matrix: Tensor, left: Tensor, right: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of ``risk`` by U and by Vᵀ, of their shapes, float64. Analytic: finite where rows are parallel."""
    matrix, left, right = (each.double() for each in (matrix, left, right))
    return _gradient(matrix, left, right, *_evaluated(matrix, left, right, activation_named(activation)))


def rescale(matrix: Tensor, space: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """U and Vᵀ = Qᵀ with the least ``risk`` of all U Qᵀ.

    Row i is QQᵀw_i, made longer: for ReLU by h(ρ_i)/ρ_i with ρ_i = ‖Qᵀw_i‖/‖w_i‖. A row that is orthogonal to the space
    becomes zero.

    Args:
        matrix: W, (*batch, m, n).
        space: Qᵀ, (*batch, r, n) with orthonormal rows.
    """
    matrix, space = matrix.double(), space.double()
    inside = matrix @ space.mT  # (*batch, m, r)
    length, share = (torch.linalg.vector_norm(each, dim=-1) for each in (matrix, inside))
    has_direction = share > NO_DIRECTION * length
    best = activation_named(activation).length(length, correlation(length, share))
    scale = torch.where(has_direction, best / torch.where(has_direction, share, 1), 0)
    return inside * scale[..., None], space


def optimise(matrix: Tensor, left: Tensor, right: Tensor, activation: str, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """U and Vᵀ of lower ``risk``, by L-BFGS with a strong Wolfe line search; those given if there are none. Float64.

    Args:
        matrix: W, (*batch, m, n).
        left, right: U and Vᵀ, best balanced.
        steps: at most.
    """
    function = activation_named(activation)
    matrix, left, right = (each.double() for each in (matrix, left, right))
    scale = float(matrix.square().sum()) / 2
    if steps < 1 or scale == 0:
        return left, right
    balanced = spectral.of_product(left, right, left.shape[-1], torch.float64)
    factors = [factor.contiguous().requires_grad_() for factor in balanced]
    optimizer = torch.optim.LBFGS(
        factors,
        max_iter=steps,
        history_size=HISTORY,
        tolerance_grad=1e-12,
        tolerance_change=1e-10,  # of the share of ½‖W‖² that is lost
        line_search_fn="strong_wolfe",
    )
    optimizer.step(_closure(matrix, factors, function, scale))
    found = [factor.detach() for factor in factors]
    before, after = (_sum_of_risks(matrix, *pair, function) for pair in ((left, right), found))
    return (found[0], found[1]) if bool(after < before) else (left, right)


# ----------------------------------------------------------------------------------------------------


def _closure(matrix: Tensor, factors: list[Tensor], function: Activation, scale: float) -> Callable[[], Tensor]:
    """What L-BFGS evaluates: the risk as a share of ½‖W‖², with its gradients written to the factors."""

    @torch.no_grad()
    def closure() -> Tensor:
        left, right = (factor.detach() for factor in factors)
        terms, products, through_gram = _evaluated(matrix, left, right, function)
        gradients = _gradient(matrix, left, right, terms, products, through_gram)
        for factor, each in zip(factors, gradients, strict=True):
            factor.grad = each / scale
        return terms.risk.sum() / scale

    return closure


def _evaluated(matrix: Tensor, left: Tensor, right: Tensor, function: Activation) -> tuple[Terms, Tensor, Tensor]:
    """The terms of every row, W V and U VᵀV, both (*batch, m, r)."""
    products = matrix @ right.mT
    through_gram = left @ (right @ right.mT)
    squares = (through_gram * left).sum(-1)
    inner = (products * left).sum(-1)
    return function.terms(torch.linalg.vector_norm(matrix, dim=-1), squares, inner), products, through_gram


def _sum_of_risks(matrix: Tensor, left: Tensor, right: Tensor, function: Activation) -> Tensor:
    return _evaluated(matrix, left, right, function)[0].risk.sum()


def _gradient(
    matrix: Tensor, left: Tensor, right: Tensor, terms: Terms, products: Tensor, through_gram: Tensor
) -> tuple[Tensor, Tensor]:
    """∂U = 2 s'∘(U VᵀV) + c'∘(W V), ∂Vᵀ = 2 Uᵀ(s'∘U) Vᵀ + (c'∘U)ᵀ W, row by row with s' = ∂R/∂‖y‖², c' = ∂R/∂⟨w, y⟩."""
    by_square, by_product = 2 * terms.by_square[..., None], terms.by_product[..., None]
    of_left = by_square * through_gram + by_product * products
    of_right = (left.mT @ (by_square * left)) @ right + (by_product * left).mT @ matrix
    return of_left, of_right


def _row_space(matrix: Tensor, rank: int) -> Tensor:
    """Qᵀ, (*batch, rank, n): orthonormal rows that span the leading right singular vectors."""
    return _orthonormal(spectral.of_matrix(matrix, rank)[1].double())


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.mT)[0].mT
