"""Spectra and ranks of factorizations, and what training does to them: for logs, `fnl-hf inspect` and the warm start.

Two roads to singular values: from Grams (``form.spectrum``), cheap and also right for sharded parameters, for what is
measured during training; from the factors themselves, to their own precision, for looking at a finished model.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .decay import decay_terms, grams
from .factorization import Factorization, factorizations


def effective_rank(sigma: Tensor) -> Tensor:
    """exp(entropy of the singular values' shares), (*batch,) from (*batch, rank): between 1 and rank.

    Roy & Vetterli, EUSIPCO 2007. Of a matrix that is zero: 1.
    """
    share = sigma / sigma.sum(-1, keepdim=True).clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.special.entr(share).sum(-1).exp()


def stable_rank(sigma: Tensor) -> Tensor:
    """‖W‖²_F / ‖W‖²₂ from singular values in any order, (*batch,) from (*batch, rank): between 1 and rank.

    Of a matrix that is zero: 0.
    """
    energy = sigma.square()
    return energy.sum(-1) / energy.amax(-1).clamp_min(torch.finfo(energy.dtype).tiny)


def mean_stable_rank(product: Factorization) -> float:
    """``stable_rank``, the mean over heads: from Grams, or of a weight by itself."""
    sigma, _, _ = _spectrum(product, *grams([product]))
    return float(stable_rank(sigma).mean())


@torch.no_grad()
def measurements(products: Sequence[Factorization]) -> dict[str, dict[str, float]]:
    """family -> name -> value ("qk" with its rotary form) and, under "", for all products together.

    frobenius_norm: of all products, √ Σ ‖W‖²_F.
    nuclear_norm: Σ ‖W‖_*.
    nuclear_bound: ½ Σ (‖U‖² + ‖V‖²), which weight decay on the factors would bound the nuclear norm by; the two are
        equal where factors are balanced.
    effective_rank: the mean over heads.
    imbalance: ‖UᵀU − VᵀV‖ / (‖UᵀU‖ + ‖VᵀV‖), the mean over heads: 0 is balanced.

    Rotary products have no single matrix: there each plane's share of the average norm takes the place of a singular
    value, √(½ ‖Q_p‖² ‖K_p‖²), since a score averaged over the phases of its rotation has ½ Σ_p ‖Q_p‖² ‖K_p‖².
    """
    parts: dict[str, list[Tensor]] = {"": []} if products else {}
    for product, of_product in zip(products, grams(products), strict=True):
        sigma, bound, imbalance = _spectrum(product, of_product)
        values = torch.stack(
            [
                sigma.square().sum(),
                sigma.sum(),
                bound,
                effective_rank(sigma).sum(),
                imbalance.sum(),
                torch.tensor(sigma[..., 0].numel(), dtype=torch.float64, device=sigma.device),
            ]
        )
        for family in (product.family, ""):
            parts.setdefault(family, []).append(values)
    measured = {}
    for family, rows in parts.items():
        energy, nuclear, bound, ranks, imbalance, heads = torch.stack(rows).sum(0).tolist()
        measured[family] = {
            "frobenius_norm": energy**0.5,
            "nuclear_norm": nuclear,
            "nuclear_bound": bound,
            "effective_rank": ranks / heads,
            "imbalance": imbalance / heads,
        }
    return measured


@torch.no_grad()
def gradient_norms(products: Sequence[Factorization], coefficient: float) -> dict[str, tuple[float, float]]:
    """family -> (norm of the decay gradient, norm of the loss gradient) over the parameters of its products.

    To be called between the last backward of a step and what changes its gradients.
    """
    norms = {}
    for family in dict.fromkeys(product.family for product in products):
        terms = decay_terms([product for product in products if product.family == family], coefficient)
        norms[family] = _norm(terms.values()), _norm(p.grad for p in terms if p.grad is not None)
    norms[""] = tuple(sum(pair[i] ** 2 for pair in norms.values()) ** 0.5 for i in (0, 1))
    return norms


@torch.no_grad()
def spectra(model: nn.Module, leading: int = 5) -> list[dict]:
    """Per product of a factorized model, what its singular values σ say; from its factors, never from the matrix.

    Returns:
        dicts with "name", "kind"; "nuclear_norm" Σσ over all heads; and means over the heads of "stable_rank",
        "effective_rank" and of the ``leading`` largest "singular_values". Products without a single matrix (rotary
        ones) have None there.
    """
    rows = []
    for product in factorizations(model):
        sigma = _singular_values(product)
        row = {"name": product.name, "kind": product.kind}
        row["nuclear_norm"] = None if sigma is None else sigma.sum().item()
        row["stable_rank"] = None if sigma is None else stable_rank(sigma).mean().item()
        row["effective_rank"] = None if sigma is None else effective_rank(sigma).mean().item()
        row["singular_values"] = None if sigma is None else sigma[:, :leading].mean(0).tolist()
        rows.append(row)
    return rows


def _spectrum(product: Factorization, of_product) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values (*batch, rank), the nuclear bound, and imbalance (*batch), in float64, from Grams.

    A weight by itself has no factors to be out of balance, and no Grams that say its singular values.
    """
    form = product.form
    if product.lone:
        sigma = form.singular_values(product.tensors()).double()
        return sigma, sigma.sum(), torch.zeros_like(sigma[..., 0])
    return form.spectrum(of_product), form.bound(of_product).double(), form.imbalance(of_product).double()


def _singular_values(product: Factorization) -> Tensor | None:
    """(heads, rank), descending, to the factors' precision; None where there is no single matrix."""
    if not product.form.has_matrix:
        return None
    try:
        sigma = product.form.singular_values(product.tensors()).double()
    except torch.linalg.LinAlgError:
        raise ValueError(f"{product.name} holds NaN or infinite weights, which have no spectrum") from None
    return sigma.reshape(-1, sigma.shape[-1])


def _norm(tensors: Iterable[Tensor | nn.Parameter]) -> float:
    """The norm of all of them together, over every process that holds a shard."""
    squares = []
    for tensor in tensors:
        square = tensor.float().square().sum()
        squares.append(square.full_tensor() if isinstance(square, DTensor) else square)
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
