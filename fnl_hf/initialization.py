"""Named initialisations of a factorization: (its form, its factors, a rank, sides) -> factors.

Factors come as ``Factorization.augmented`` gives them, biases appended, and go back through ``Factorization.write``.
``sides`` are second moments of what multiplies each factor, as ``calibration.moments`` gives them, or None for an
initialisation that does not look at data. An initialisation is one function; a new one is one more entry here and its
name in `config`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .algebra import Form
from .algebra import functional as of_functions
from .algebra.weighted import energies_of_product, energies_of_weight, of_product, of_weight, roots

Sides = Sequence[Tensor | None] | None
Initialization = Callable[..., Sequence[Tensor]]  # of a form, factors, a rank and sides; ``functional`` takes more


def spectral(form: Form, factors: Sequence[Tensor], rank: int, sides: Sides = None) -> Sequence[Tensor]:
    """Balanced factors of the best approximation of rank ``rank``: the same product at full rank.

    With W = A Σ Bᵀ they are A_r Σ_r^½ and Σ_r^½ B_rᵀ: spectral initialisation (Khodak et al., ICLR 2021).
    """
    return form.balance(factors, rank)


def activation(
    form: Form,
    factors: Sequence[Tensor],
    rank: int,
    sides: Sides = None,
    crosses: Sides = None,
    outputs: Sequence[Tensor] = (),
) -> Sequence[Tensor]:
    """Balanced factors of the best approximation on the data that ``sides`` are of, not of all inputs alike.

    Of a weight the least E‖(W − U Vᵀ) x‖², of queries and keys the least error of the scores, of outputs and values the
    least E‖(O − O' V') z‖² (``algebra.weighted``). Spectral at full rank, where nothing is lost, under rotation, and
    where there are no sides.

    Args:
        crosses: E[x x̃ᵀ] for each side that is of x̃, which the factors will be given in the place of x.
        outputs: curvatures G, how much errors of what the product puts out count: (*batch, m, m) of a weight, or a
            diagonal (1, m), several of layers that are tied; the same for all heads of outputs and values; of queries
            those of each head. All alike if there are none.
    """
    if not looks_at(form, factors, sides) or rank >= form.size(factors)[1]:
        return spectral(form, factors, rank)
    outputs = [curvature for curvature in outputs if bool(curvature.any())]  # of zeros, no factors would be best
    if len(factors) == 1:
        columns, rows, metric = _weighing(factors[0], sides, outputs)
        pair = of_weight(factors[0], rank, columns, rows, crosses and crosses[0], metric)
    else:
        left, right, weights = _metrics(factors[0], sides, outputs)
        of_others = (None, None) if crosses is None else (None, crosses[0]) if crosses[1] is None else crosses
        pair = of_product(*factors, rank, left, right, *of_others, weights)
    return [factor.to(factors[0].dtype) for factor in form.balance(pair, rank)]


def functional(
    form: Form, factors: Sequence[Tensor], rank: int, sides: Sides = None, followed_by: str | None = None
) -> Sequence[Tensor]:
    """Balanced factors with the least E‖σ(Wx) − σ(U Vᵀ x)‖² for a layer that the activation σ follows.

    For x of the second moment that ``sides`` hold, or standard normal ones; the bias is left out
    (``algebra.functional``; Vodrahalli et al., 2022). Spectral of all else, and at full rank, where nothing is lost.
    """
    if followed_by is None or len(factors) > 1 or rank >= form.size(factors)[1]:
        return spectral(form, factors, rank)
    columns = _weighing(factors[0], sides, ())[0] if looks_at(form, factors, sides) else None
    pair = of_functions.approximation(factors[0], rank, followed_by, columns)
    return [factor.to(factors[0].dtype) for factor in form.balance(pair, rank)]


def energies(form: Form, factors: Sequence[Tensor], sides: Sides = None, outputs: Sequence[Tensor] = ()) -> Tensor:
    """What each further rank of ``activation`` saves of the error, summed over heads, in descending order, float64.

    Without sides, or where it cannot use them, of ``spectral``: the squared singular values.
    """
    if not looks_at(form, factors, sides):
        each = form.singular_values(factors).double().square()
    elif len(factors) == 1:
        each = energies_of_weight(factors[0], *_weighing(factors[0], sides, outputs))
    else:
        each = energies_of_product(*factors, *_metrics(factors[0], sides, outputs))
    return each.reshape(-1, each.shape[-1]).sum(0).cpu()


def refuse_non_finite(name: str, factors: Sequence[Tensor]) -> None:
    """Raises a ValueError where weights of the product of that name are no numbers."""
    if not all(torch.linalg.vector_norm(factor, torch.inf).isfinite() for factor in factors):
        raise ValueError(f"{name} holds NaN or infinite weights; load a sound checkpoint before factorizing")


def _weighing(
    matrix: Tensor, sides: Sequence[Tensor | None], outputs: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Moments of what a weight multiplies, how much each of its rows counts, and the metric of what it puts out.

    An embedding gives counts, its metric is that of its columns. Where an output layer is tied to it, the diagonal of
    its curvature is about the chance of each token, which the counts are too: its sum weighs what that layer is given.
    """
    known = [side for side in sides if side is not None]
    columns, rows = ([s for s in known if (s.dim() == matrix.dim()) == square] for square in (True, False))
    columns, rows = sum(columns) if columns else None, sum(rows) if rows else None
    metrics, diagonals = ([g for g in outputs if (g.dim() == matrix.dim()) == square] for square in (True, False))
    if rows is not None and metrics:
        given = 0 if columns is None else sum(diagonal.sum() for diagonal in diagonals) * columns
        return sum(metrics) + given, rows, None
    if rows is None and diagonals and not metrics:
        return columns, sum(diagonals), None
    return columns, rows, sum(metrics) if metrics else None


def _metrics(
    left: Tensor, sides: Sequence[Tensor | None], outputs: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Of the left factor's features and of the right one's, and what the error of each head counts.

    Of outputs and values those between them, and what the left factor makes of them. The gradient by a query is
    Σ_j s_j k_j, with s_j that by its score with key j: if those are alike, the mean square of all its scores' is
    tr(G C_k⁻¹) over the width of a head.
    """
    if sides[1] is None:
        return (left.double().mT @ outputs[0] @ left.double() if outputs else None), sides[0], None
    if not outputs:
        return sides[0], sides[1], None
    inverse = roots(sides[1])[1]
    weights = (outputs[0] * (inverse @ inverse)).sum((-2, -1)) / inverse.shape[-1]
    return sides[0], sides[1], weights


def looks_at(form: Form, factors: Sequence[Tensor], sides: Sides) -> bool:
    """Whether an initialisation that looks at data can use what there is of it."""
    known = sides is not None and any(side is not None and bool(side.any()) for side in sides)
    return known and len(factors) <= 2 and form.has_matrix


def default(form: Form, factors: Sequence[Tensor], rank: int, sides: Sides = None) -> Sequence[Tensor]:
    """The factors that the model has; at lower rank the leading ones of each head.

    A weight by itself has none: they are drawn, normal and alike, so that the entries of their product have the
    variance of the weight's.
    """
    if len(factors) > 1:
        return form.leading(factors, rank)
    # An entry of U Vᵀ is a sum of `rank` products, each of variance s⁴ for factors of standard deviation s.
    deviation = float(factors[0].float().square().mean().div(rank)) ** 0.25
    deviation = deviation or factors[0].shape[-1] ** -0.5  # of a matrix of zeros: that of its right factor
    return _with_rows_of_zeros(
        [torch.randn_like(factor).mul_(deviation) for factor in _empty(factors[0], rank)], factors[0]
    )


def spectral_ones(form: Form, factors: Sequence[Tensor], rank: int, sides: Sides = None) -> Sequence[Tensor]:
    """The singular vectors without the values: A_r and B_rᵀ of W = A Σ Bᵀ (Kamalakara et al., 2022)."""
    if len(factors) > 1:
        return default(form, factors, rank)
    left, right = form.balance(factors, rank)
    return [torch.nn.functional.normalize(left, dim=-2), torch.nn.functional.normalize(right, dim=-1)]


def _drawn(draw: Callable[[Tensor], Tensor], name: str) -> Initialization:
    """Each factor by itself as ``torch.nn.init`` draws a weight: (m, rank), and (rank, n)."""

    def initialization(form: Form, factors: Sequence[Tensor], rank: int, sides: Sides = None) -> Sequence[Tensor]:
        if len(factors) > 1:
            return default(form, factors, rank)
        pair = _empty(factors[0].float(), rank)
        for factor in pair:
            for matrix in factor:
                draw(matrix)
        return _with_rows_of_zeros([factor.to(factors[0].dtype) for factor in pair], factors[0])

    initialization.__doc__ = f"{name} factors of a weight by itself; heads as under ``default``."
    return initialization


def _with_rows_of_zeros(pair: list[Tensor], matrix: Tensor) -> list[Tensor]:
    """Rows of zeros of the matrix stay that, as the one of an embedding's padding."""
    return [pair[0].masked_fill(matrix.eq(0).all(-1, keepdim=True), 0.0), pair[1]]


def _empty(matrix: Tensor, rank: int) -> list[Tensor]:
    """Of the shapes of two factors of (*batch, m, n) matrices."""
    *batch, rows, columns = matrix.shape
    return [matrix.new_empty(*batch, rows, rank), matrix.new_empty(*batch, rank, columns)]


INITIALIZATIONS: dict[str, Initialization] = {
    "spectral": spectral,
    "activation": activation,
    "functional": functional,
    "default": default,
    "spectral-ones": spectral_ones,
    "orthogonal": _drawn(torch.nn.init.orthogonal_, "Orthogonal"),
    "xavier": _drawn(torch.nn.init.xavier_uniform_, "Xavier-uniform"),
    "kaiming": _drawn(torch.nn.init.kaiming_normal_, "Kaiming-normal"),
}


def keeps_the_product(init: str, lone: bool) -> bool:
    """Whether an initialisation leaves a product as it is at full rank; ``lone``: of a weight by itself."""
    return init in ("spectral", "activation", "functional") or not lone


@torch.no_grad()
def initial_factors(
    form: Form, factors: Sequence[Tensor], rank: int, init: str, sides: Sides = None, **more: object
) -> Sequence[Tensor]:
    """New factors in the place of ``Factorization.augmented`` ones, by a named initialisation.

    Args:
        more: what else it looks at, None where that is not known: the ``crosses`` of "activation", the activation that
            the layer is ``followed_by`` for those of ``config.LOOK_AHEAD``.
    """
    known = {name: value for name, value in more.items() if value is not None}
    return INITIALIZATIONS[init](form, factors, rank, sides, **known)
