"""What training does to factorizations: norms, effective rank and balance, from their Grams."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .decay import decay_terms, family, grams
from .factorization import Factorization


@torch.no_grad()
def measurements(products: Sequence[Factorization]) -> dict[str, dict[str, float]]:
    """kind -> name -> value, for every kind ("qk" with its rotary form) and, under "", for all products together.

    frobenius_norm: of all products, √ Σ ‖W‖²_F.
    nuclear_norm: Σ ‖W‖_*.
    nuclear_bound: ½ Σ (‖U‖² + ‖V‖²), which weight decay on the factors would bound the nuclear norm by; the two are
        equal where factors are balanced.
    effective_rank: exp(entropy of the singular values' shares), the mean over heads (Roy & Vetterli, 2007).
    imbalance: ‖UᵀU − VᵀV‖ / (‖UᵀU‖ + ‖VᵀV‖), the mean over heads: 0 is balanced.

    Rotary products have no single matrix: there each plane's share of the average norm takes the place of a singular
    value (METHODS 1.12).
    """
    parts: dict[str, list[Tensor]] = {"": []} if products else {}
    for product, of_product in zip(products, grams(products), strict=True):
        sigma = product.form.spectrum(of_product)  # (*batch, rank)
        values = torch.stack(
            [
                sigma.square().sum(),
                sigma.sum(),
                product.form.bound(of_product).double(),
                _effective_rank(sigma).sum(),
                product.form.imbalance(of_product).double().sum(),
                torch.tensor(sigma[..., 0].numel(), dtype=torch.float64, device=sigma.device),
            ]
        )
        for kind in (family(product.kind), ""):
            parts.setdefault(kind, []).append(values)
    measured = {}
    for kind, rows in parts.items():
        energy, nuclear, bound, ranks, imbalance, heads = torch.stack(rows).sum(0).tolist()
        measured[kind] = {
            "frobenius_norm": energy**0.5,
            "nuclear_norm": nuclear,
            "nuclear_bound": bound,
            "effective_rank": ranks / heads,
            "imbalance": imbalance / heads,
        }
    return measured


@torch.no_grad()
def gradient_norms(products: Sequence[Factorization], coefficient: float) -> dict[str, tuple[float, float]]:
    """kind -> (norm of the decay gradient, norm of the loss gradient) over the parameters of its products.

    To be called between the last backward of a step and what changes its gradients.
    """
    kinds = dict.fromkeys(family(product.kind) for product in products)
    norms = {}
    for kind in kinds:
        terms = decay_terms([product for product in products if family(product.kind) == kind], coefficient)
        norms[kind] = _norm(terms.values()), _norm(p.grad for p in terms if p.grad is not None)
    norms[""] = tuple(sum(pair[i] ** 2 for pair in norms.values()) ** 0.5 for i in (0, 1))
    return norms


def _norm(tensors: Iterable[Tensor | nn.Parameter]) -> float:
    """The norm of all of them together, over every process that holds a shard."""
    squares = []
    for tensor in tensors:
        square = tensor.float().square().sum()
        squares.append(square.full_tensor() if isinstance(square, DTensor) else square)
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _effective_rank(sigma: Tensor) -> Tensor:
    """(*batch,) from (*batch, rank)."""
    share = sigma / sigma.sum(-1, keepdim=True).clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.special.entr(share).sum(-1).exp()
