"""Best low-rank approximations where inputs say which errors count: closed forms from second moments, in float64.

A plain truncation W ≈ M takes every direction of the input for equally likely. With C = E[x xᵀ] the error that counts,
E‖(W − M) x‖² = ‖(W − M) C^½‖²_F, has a closed form as well, here of a weight by itself and of a product of two factors
(a head), whose features are weighted in the rank-wide space between them alone.
"""

import torch
from torch import Tensor


def of_weight(
    matrix: Tensor,
    rank: int,
    columns: Tensor | None = None,
    rows: Tensor | None = None,
    cross: Tensor | None = None,
    outputs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """U (*batch, m, rank), Vᵀ (*batch, rank, n) that minimise ‖D^½ (W − U Vᵀ) C^½‖_F. Not balanced, float64.

    With ``outputs`` ‖D^½ G^½ (W − U Vᵀ) C^½‖_F, or of rows that are looked up ‖D^½ (W − U Vᵀ) G^½‖_F.

    With ``cross`` E‖W x − U Vᵀ x̃‖², where the layer will be given x̃ in the place of x: the best approximation of
    W E[x x̃ᵀ] C⁻¹, with C = E[x̃ x̃ᵀ].

    Args:
        matrix: W, (*batch, m, n).
        columns: C, (*batch, n, n) positive semidefinite: second moments of what W multiplies. The identity if None.
        rows: the diagonal of D, (*batch, m), nonnegative: how often each row is looked up. Ones if None.
        cross: E[x x̃ᵀ], (*batch, n, n), where C is that of x̃; takes no rows.
        outputs: G, how much errors of what is put out count, (*batch, m, m), or (*batch, n, n) of what is looked up.
    """
    matrix = matrix.double()
    if outputs is not None and columns is None:
        columns, outputs = outputs, None
    if cross is not None:
        inverse = roots(columns)[1]
        matrix = matrix @ cross.double() @ inverse @ inverse
    if outputs is not None:
        root, inverse = roots(outputs)
        left, right = of_weight(root @ matrix, rank, columns, rows)
        return inverse @ left, right
    if rows is None and columns is not None and matrix.shape[-2] <= matrix.shape[-1]:
        basis = _leading(matrix @ columns @ matrix.mT, rank)  # of what comes out: needs no inverse of C
        return basis, basis.mT @ matrix
    gram, root, inverse = _gram_of_weight(matrix, columns, rows)
    basis = _leading(gram, rank)
    if columns is None:
        return matrix @ basis, basis.mT
    return matrix @ (root @ basis), basis.mT @ inverse


def energies_of_weight(
    matrix: Tensor, columns: Tensor | None = None, rows: Tensor | None = None, outputs: Tensor | None = None
) -> Tensor:
    """Squared singular values of D^½ W C^½ in descending order, (*batch, min(m, n)): what each further rank saves."""
    size = min(matrix.shape[-2:])
    if outputs is not None and columns is None:
        columns = outputs
    elif outputs is not None:
        matrix = roots(outputs)[0] @ matrix.double()
    return _energies(_gram_of_weight(matrix.double(), columns, rows)[0])[..., :size]


def of_product(
    left: Tensor,
    right: Tensor,
    rank: int,
    left_metric: Tensor | None,
    right_metric: Tensor,
    left_cross: Tensor | None = None,
    right_cross: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A' (*batch, m, rank), B' (*batch, rank, n) for the product A B of a head. Not balanced, float64.

    Of queries and keys, whose scores are qᵀk, the metrics are C_q = E[q qᵀ] and C_k: the best scores of this rank over
    all pairs of positions. Of outputs and values, O z with z the averaged values, they are OᵀO and C_z.

    With P the leading eigenvectors of C_r^½ (Σ C_l) C_r^½, summed over a group that shares the right factor,
    B' = Pᵀ C_r^{-½} B, and A' is the best one for that: A C_r^½ P where the group has one C_r.

    With crosses the features that are to be approximated are others, q and k, than those that the factors will be
    given, q̃ and k̃, of which the metrics are then: A' and B' approximate A M_l M_r B, where M_l = C_l⁻¹ E[q̃ qᵀ] and
    M_r = E[k k̃ᵀ] C_r⁻¹ make the best q and k of those.

    Args:
        left: A, (*batch, m, r).
        right: B, (*batch, r, n); of size 1 where a group of heads shares it.
        left_metric: (*batch of left, r, r); AᵀA if None.
        right_metric: (*batch, r, r), of either factor's batch.
        left_cross, right_cross: E[q q̃ᵀ] and E[k k̃ᵀ], shaped as the metrics.
        weights: how much the error of each head counts, (*batch of left).
    """
    left, right, metric = left.double(), right.double(), right_metric.double()
    gram, inverse, to_left = _gram_of_product(left, right, left_metric, metric, left_cross, right_cross, weights)
    down = inverse @ _leading(gram, rank)  # (*batch, r, rank)
    up = (metric if right_cross is None else right_cross.double()) @ down
    up = torch.linalg.solve(down.mT @ metric @ down, up, left=False)
    return left @ (up if to_left is None else to_left @ up), down.mT @ right


def energies_of_product(
    left: Tensor, right: Tensor, left_metric: Tensor | None, right_metric: Tensor, weights: Tensor | None = None
) -> Tensor:
    """What each further rank of ``of_product`` saves, (*batch of right, r), in descending order."""
    left, right, metric = left.double(), right.double(), right_metric.double()
    return _energies(_gram_of_product(left, right, left_metric, metric, weights=weights)[0])


def shrunk(moment: Tensor, count: int, cross: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """A second moment estimated from few samples, drawn to a multiple of the identity: oracle approximating shrinkage.

    (1 − ρ) C + ρ tr(C)/p I with ρ = ((1 − 2/p) tr C² + tr² C) / ((N + 1 − 2/p) (tr C² − tr² C / p)), at most 1 (Chen
    et al., *Shrinkage Algorithms for MMSE Covariance Estimation*, 2010). Never singular, but for a moment of zeros.

    Args:
        moment: C, (*batch, p, p).
        count: N, of samples.
        cross: E[x x̃ᵀ], (*batch, p, p), where C is that of x̃; drawn as far, to the same multiple.
    """
    size = moment.shape[-1]
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
    squares = moment.square().sum((-2, -1))
    above = (1 - 2 / size) * squares + trace.square()
    below = (count + 1 - 2 / size) * (squares - trace.square() / size)
    share = torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 1).clamp(max=1)
    share = share[..., None, None]
    end = torch.eye(size, dtype=moment.dtype, device=moment.device) * (trace / size)[..., None, None]
    return torch.lerp(moment, end, share), None if cross is None else torch.lerp(cross, end, share)


def _gram_of_weight(matrix: Tensor, columns: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """C^½ WᵀD W C^½, C^½ and C^{-½}; the last two None without C."""
    root, inverse = (None, None) if columns is None else roots(columns)
    scaled = matrix if rows is None else matrix * rows.double().sqrt()[..., None]
    scaled = scaled if root is None else scaled @ root
    return scaled.mT @ scaled, root, inverse


def _gram_of_product(
    left: Tensor,
    right: Tensor,
    left_metric: Tensor | None,
    right_metric: Tensor,
    left_cross: Tensor | None = None,
    right_cross: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """C_r^½ (Σ C_l) C_r^½ of the group that shares the right factor, its C_r^{-½}, and M_l."""
    left_metric = left.mT @ left if left_metric is None else left_metric.double()
    shared = [i for i, (a, b) in enumerate(zip(left.shape[:-2], right.shape[:-2], strict=True)) if b == 1 < a]
    mean = right_metric.mean(shared, keepdim=True) if shared else right_metric
    root, inverse = roots(mean)
    to_left = None
    if left_cross is not None:
        to_left = torch.linalg.matrix_power(roots(left_metric)[1], 2) @ left_cross.double().mT
        left_metric = to_left.mT @ left_metric @ to_left
    between = root if right_cross is None else right_cross.double() @ inverse
    total = between.mT @ left_metric @ between
    total = total if weights is None else weights[..., None, None] * total
    return (total.sum(shared, keepdim=True) if shared else total), inverse, to_left


def _energies(gram: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0)


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues of a symmetric matrix, (*batch, n, rank)."""
    return torch.linalg.eigh(gram).eigenvectors[..., -rank:].flip(-1)


def roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """C^½ and C^{-½}, the second on the space where C has more than rounding: zero outside it."""
    values, vectors = torch.linalg.eigh(metric.double())
    floor = values[..., -1:].clamp_min(0) * values.shape[-1] * torch.finfo(values.dtype).eps
    kept = values > floor
    root = torch.where(kept, values, 0).sqrt()
    inverse = torch.where(kept, root, 1).reciprocal() * kept
    return (vectors * root[..., None, :]) @ vectors.mT, (vectors * inverse[..., None, :]) @ vectors.mT
