"""Spectral factors: a matrix, or a product of two factors, as balanced factors of its best low-rank approximation.

What ``chain.balance`` is made of. W = A Σ Bᵀ gives A_r Σ_r^½ and Σ_r^½ B_rᵀ (spectral initialisation: Khodak et al.,
ICLR 2021), here of a product whose m x n matrix is never formed, and with every direction left able to learn.
"""

import torch
from torch import Tensor

from .tensors import accumulating

TALL = 2  # times as many rows as columns: from there on the Gram matrix costs less than the matrix's own SVD


def of_matrix(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors (*batch, m, rank), (*batch, rank, n) of a dense matrix, whose dtype they take.

    ``rank`` may exceed min(m, n): see ``surplus``.
    """
    rows, columns = matrix.shape[-2:]
    if rows >= TALL * columns and matrix.dtype != torch.float64:
        left, sigma, right = _tall_svd(matrix)
    elif columns >= TALL * rows and matrix.dtype != torch.float64:
        right, sigma, left = _tall_svd(matrix.mT)
        left, right = left.mT, right.mT
    else:
        left, sigma, right = torch.linalg.svd(accumulating(matrix), full_matrices=False)
    left, right = _split(left, sigma, right, rank, scale=None, dtype=matrix.dtype)
    # A row of zeros (padding) is one of zeros, not of rounding: some models normalise what they look up.
    return left.masked_fill(matrix.eq(0).all(-1, keepdim=True), 0.0), right


def of_product(left: Tensor, right: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Balanced factors (*batch, m, rank), (*batch, rank, n), in ``dtype``, of left @ right, in float32 or better.

    With Grams AᵀA = L_a L_aᵀ and BBᵀ = L_b L_bᵀ (Cholesky) the product is (A L_a^{-T}) (L_aᵀ L_b) (L_b^{-1} B): two
    orthonormal factors around a small matrix L_aᵀ L_b = P Σ Qᵀ, which therefore holds the product's spectrum. So
    A' = A L_a^{-T} P Σ^½ and B' = Σ^½ Qᵀ L_b^{-1} B, two thin matrix products in place of two QRs. Where the factors
    are too ill-conditioned for that, QRs and the SVD of R_a R_bᵀ do the same.
    """
    gauges = _gauges_from_grams(left, right, rank)
    if gauges is None:
        return _by_qr(left.double(), right.double(), rank, dtype)
    return (left @ gauges[0]).to(dtype), (gauges[1] @ right).to(dtype)


def core(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """left @ right = Q_l (R_l R_rᵀ) Q_rᵀ: the small core, whose singular values are the product's, Q_l and Q_rᵀ."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    return r_left @ r_right.mT, q_left, q_right.mT


def surplus(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A pair widened to ``rank`` without changing its product: zero columns on the left, unit rows on the right.

    Zero in one factor only: the gradient of either factor of a column goes through the other one, so a direction that
    is zero in both could never learn.
    """
    missing, columns = rank - left.shape[-1], right.shape[-1]
    if missing <= 0:
        return left, right
    units = _units(columns, missing, right)
    widened = torch.cat([right, units.expand(*right.shape[:-2], *units.shape)], dim=-2)
    return torch.nn.functional.pad(left, (0, missing)), widened


# ----------------------------------------------------------------------------------------------------


def _units(width: int, count: int, like: Tensor) -> Tensor:
    """(count, width): unit vectors in turn, of the dtype and device of a tensor."""
    return torch.nn.functional.one_hot(torch.arange(count, device=like.device) % width, width).to(like)


def _tall_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of a (*batch, m, n) matrix with m > n, by the eigenvectors B of its float64 Gram: A Σ = W B.

    Right to the precision of float32 for σ above 1e-7 of the largest: what is smaller counts as zero in ``_split``.
    """
    gram = sum(part.mT @ part for part in map(Tensor.double, matrix.split(2048, dim=-2)))
    _, vectors = torch.linalg.eigh(gram)
    vectors = vectors.flip(-1).to(accumulating(matrix).dtype)  # (*batch, n, n), the largest first
    left = accumulating(matrix) @ vectors
    sigma = torch.linalg.vector_norm(left, dim=-2)
    order = sigma.argsort(-1, descending=True)  # of nearly equal ones, rounding may have changed it
    left, sigma = left.gather(-1, order[..., None, :].expand_as(left)), sigma.gather(-1, order)
    vectors = vectors.gather(-1, order[..., None, :].expand_as(vectors))
    left = left / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)[..., None, :]
    if not bool(sigma.all()):  # there any vector is a singular one, but none of zeros
        left = torch.where(sigma[..., None, :] > 0, left, _units(*left.shape[-2:], left).mT)
    return left, sigma, vectors.mT


def _by_qr(left: Tensor, right: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``of_product`` for any two float64 factors, however ill-conditioned."""
    small, left_basis, right_basis = core(left, right)
    p, sigma, qt = torch.linalg.svd(small, full_matrices=False)
    # A direction that the product lacks stays alive in the right factor, at that factor's typical size.
    scale = torch.ones_like(sigma[..., 0])
    for size in (torch.linalg.matrix_norm(left), torch.linalg.matrix_norm(right)):
        scale = torch.where(size > 0, size / left.shape[-1] ** 0.5, scale)
    return _split(left_basis @ p, sigma, qt @ right_basis, rank, scale, dtype)


def _gauges_from_grams(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """The r x rank and rank x r changes of basis that balance a product, or None where Grams lose too many digits."""
    grams = _gram(left), _gram(right.mT)
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


def _gram(matrix: Tensor) -> Tensor:
    """AᵀA in float64, of some matrices of a batch at a time: converted all at once, they no longer fit in the cache."""
    parts = matrix.split(4) if matrix.dim() > 2 else [matrix]
    return torch.cat([part.mT @ part for part in map(Tensor.double, parts)])


def _split(left: Tensor, sigma: Tensor, right: Tensor, rank: int, scale: Tensor | None, dtype: torch.dtype):
    """A_r Σ_r^½ and Σ_r^½ B_rᵀ; where σ = 0, only the left is zero: with both, the direction could never learn.

    There the right one is of a size like that of the others, of unit size in a matrix of zeros. Zero is what float32
    takes for it: half precision keeps small directions to as many digits as large ones.
    """
    sigma = torch.nn.functional.pad(sigma, (0, max(0, rank - sigma.shape[-1])))
    left, right = surplus(left, right, rank)
    left, sigma, right = left[..., :rank], sigma[..., :rank], right[..., :rank, :]
    root = sigma.sqrt()
    if scale is None:
        scale = root.square().mean(-1).sqrt()
        scale = torch.where(scale > 0, scale, 1)
    eps = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    alive = sigma > sigma[..., :1] * sigma.shape[-1] * eps
    left_root = torch.where(alive, root, 0.0)
    right_root = torch.where(alive, root, scale[..., None])
    return (left * left_root[..., None, :]).to(dtype), (right_root[..., :, None] * right).to(dtype)
