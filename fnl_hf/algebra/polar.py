"""Polar factors by Newton-Schulz, and spectral norms by power iteration: what steps of bounded spectral norm take.

The polar factor of M = A Σ Bᵀ is A Bᵀ: of all matrices of spectral norm 1 the one with the largest inner product with
M, and so the steepest direction where steps are measured by their spectral norm (Jordan et al., *Muon*, 2024).
"""

import torch
from torch import Tensor

from .tensors import accumulating

# x ← a x + b x³ + c x⁵ of every singular value. Jordan et al. chose them for the steepest rise at 0, so that small
# values have grown within five steps; it does not converge, but leaves values between 0.7 and 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5
_TALL = 2  # times as many rows as columns: from there on iterating on the Gram matrix costs less
_SQUARINGS = 6  # of a Gram matrix: as many as 2⁶ power iterations


def orthogonalized(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """Approximate polar factors of matrices (B, m, n), of their shape and dtype.

    Singular values come out between about 0.7 and 1.2, those below a few hundredths of a percent of the largest one
    smaller. A matrix of zeros stays one. In bfloat16 on a GPU, else in float32 or better.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        return orthogonalized(matrices.mT, steps).mT
    work = matrices.bfloat16() if matrices.is_cuda and matrices.dtype != torch.float64 else accumulating(matrices)
    largest = matrices.abs().amax((-2, -1), keepdim=True)  # the Gram of large or tiny entries is not finite, or zero
    work = work / torch.where(largest > 0, largest, 1)
    gram = work.mT @ work
    # ‖MᵀM‖_F^½ bounds the spectral norm from above, and is closer to it than the usual ‖M‖_F
    size = accumulating(gram).flatten(1).norm(dim=1)[:, None, None]
    size = torch.where(size > 0, size, 1).to(work.dtype)
    work, gram = work / size.sqrt(), gram / size
    # rounded to bfloat16 a Gram must be taken anew in every step
    small = work.shape[-2] >= _TALL * work.shape[-1] and work.dtype != torch.bfloat16
    return (_through_gram if small else _directly)(work, gram, steps).to(matrices.dtype)


def _directly(work: Tensor, gram: Tensor, steps: int) -> Tensor:
    """X ← X (a + b G + c G²) with G = XᵀX."""
    a, b, c = QUINTIC
    for step in range(steps):
        gram = work.mT @ work if step else gram
        work = torch.baddbmm(work, work, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), beta=a)
    return work


def _through_gram(work: Tensor, gram: Tensor, steps: int) -> Tensor:
    """The same as X Q₁ Q₂ ⋯, Q_k = a + b G_k + c G_k² and G_{k+1} = Q_k G_k Q_k, all of them n x n."""
    a, b, c = QUINTIC
    product = None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else product @ factor
        if step + 1 < steps:
            gram = factor @ (gram @ factor)
    return work @ product


def spectral_norms(matrices: Tensor, vectors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(‖M‖₂ of every matrix (B, m, r), as (B, 1, 1); its right singular vector (B, r, 1)), by power iteration.

    Given the vectors of a call before, when the matrices were a little different: one more iteration. Without them: 64,
    by squarings of the Gram matrix. The norms are bounded by the exact ones, and close to them where one leads. A
    vector whose image is shorter than a column of the matrix is that of another one, or of zeros: then power iteration
    starts at that column.
    """
    work = accumulating(matrices)
    if vectors is None:
        gram = work.mT @ work
        for _ in range(_SQUARINGS):
            gram = gram / gram.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
            gram = gram @ gram
        vectors = _longest_column(gram)
    image, column = work @ _unit(vectors.to(work.dtype)), _longest_column(work)
    shorter = image.norm(dim=-2, keepdim=True) < column.norm(dim=-2, keepdim=True)
    vectors = work.mT @ _unit(torch.where(shorter, column, image))
    return vectors.norm(dim=-2, keepdim=True), _unit(vectors)


def _longest_column(matrices: Tensor) -> Tensor:
    """(B, m, 1) of matrices (B, m, n)."""
    place = matrices.norm(dim=-2).argmax(-1)[:, None, None]
    return matrices.gather(-1, place.expand(-1, matrices.shape[-2], 1))


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
