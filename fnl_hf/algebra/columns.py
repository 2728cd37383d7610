"""A matrix of low rank by its own columns: W = C [1 | Dᵀ] up to the order of the columns, with C a part of W.

That takes r(m + n) − r² numbers, where U Vᵀ takes r(m + n): fewer than W itself for every r below both of its sides
(a pivoted factorization, known as PIFA; of Wᵀ, whose rows it would pick).
"""

import torch
from torch import Tensor

LARGEST = 2.0  # |D| entries: what makes a column of others, none of which then cancel


@torch.no_grad()
def own_columns(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r) and V (n, r) with r < n as C (m, r), D (n − r, r) and an order (n,): (U Vᵀ)[:, order] = C [1 | Dᵀ].

    The columns are those of a submatrix of large volume (Goreinov & Tyrtyshnikov, 2001): chosen by Gaussian
    elimination, then exchanged while an entry of D is above `LARGEST`. Each exchange at least doubles the volume, so it
    ends, and D stays small however ill-conditioned U and V are.
    """
    basis = torch.linalg.qr(right.double()).Q  # of orthonormal columns, also where V has dependent ones
    chosen = _eliminated(basis)
    coefficients = _by(basis, chosen)
    while True:  # (n, r), with the unit matrix in the rows that are chosen
        largest = coefficients.abs().argmax().item()
        row, column = divmod(largest, coefficients.shape[1])
        entry = coefficients[row, column].item()
        if not abs(entry) > LARGEST:
            break
        change = coefficients[row] / entry
        change[column] -= 1 / entry
        coefficients = torch.addr(coefficients, coefficients[:, column].clone(), change, alpha=-1)
        chosen[column] = row
    is_chosen = torch.zeros(len(basis), dtype=torch.bool, device=basis.device)
    is_chosen[chosen] = True
    chosen, others = is_chosen.nonzero().squeeze(1), (~is_chosen).nonzero().squeeze(1)
    columns = left.double() @ right.double()[chosen].mT
    return columns.to(left.dtype), _by(basis, chosen)[others].to(left.dtype), torch.cat([chosen, others])


def _eliminated(basis: Tensor) -> Tensor:
    """The rows that partial pivoting brings to the top."""
    order = list(range(len(basis)))
    for place, other in enumerate(torch.linalg.lu_factor(basis).pivots.tolist()):  # which count from one
        order[place], order[other - 1] = order[other - 1], order[place]
    return torch.tensor(order[: basis.shape[1]], device=basis.device)


def _by(basis: Tensor, chosen: Tensor) -> Tensor:
    """Every row of (n, r) as a combination of the chosen ones."""
    return torch.linalg.solve(basis[chosen], basis, left=False)
