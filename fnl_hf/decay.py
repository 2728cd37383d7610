"""Frobenius decay: the gradient of λ/2 Σ ‖product‖²_F in place of λ/2 Σ ‖factor‖² (METHODS 1.2, 1.9).

Two ways in, on any optimizer:

- coupled, the paper's: the decay gradient joins the loss gradient once per step, before clipping;
- decoupled, as AdamW does with weight decay: factors shrink by lr · λ · gradient beside the optimizer's own step. An
  adaptive optimizer would divide a coupled gradient by its running size, so that λ means little there.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .factorization import Factorization, factorizations


def decayed(model: nn.Module, kinds: Sequence[str] | None = None) -> list[Factorization]:
    """The factorizations that decay falls on: of the given kinds (None: all), with a factor that trains.

    Raises:
        ValueError: A kind that the model does not have.
    """
    products = factorizations(model)
    if kinds is not None:
        present = {family(product.kind) for product in products}
        if unknown := [kind for kind in kinds if kind not in present]:
            raise ValueError(
                f"Frobenius decay is asked for kind {unknown[0]!r}; the model has {sorted(present) or 'none'}"
            )
        products = [product for product in products if family(product.kind) in kinds]
    return [product for product in products if any(p.requires_grad for p in product.parameters())]


def family(kind: str) -> str:
    """The kind as users select it: "qk" includes its rotary form."""
    return kind.removeprefix("rotary-")


@torch.no_grad()
def frobenius_decay_(model: nn.Module, coefficient: float, kinds: Sequence[str] | None = None) -> None:
    """Add ``coefficient`` · gradient of ½ Σ squared_norm to the ``.grad`` of every covered parameter (coupled decay).

    Call it once per optimizer step, after the last backward and before clipping. A missing ``.grad`` counts as zero.

    Raises:
        ValueError: A negative or non-finite coefficient; a kind that the model does not have.
    """
    check_coefficient(coefficient)
    add_decay_gradients(decayed(model, kinds), coefficient)


@torch.no_grad()
def add_decay_gradients(products: Iterable[Factorization], coefficient: float) -> None:
    """The body of ``frobenius_decay_``, for products at hand."""
    for product in products:
        targets = []
        for view in product.views:
            parameter = view.parameter
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            targets.append(view.read(parameter.grad) if parameter.requires_grad else None)
        product.form.add_decay_(product.tensors(), targets, coefficient)


@torch.no_grad()
def decay_terms(products: Iterable[Factorization], coefficient: float) -> dict[torch.Tensor, torch.Tensor]:
    """parameter -> ``coefficient`` · gradient of ½ Σ squared_norm, every term of the factors as they are now."""
    terms: dict[torch.Tensor, torch.Tensor] = {}
    for product in products:
        for view, gradient in product.decay_gradients():
            if view.parameter not in terms:
                terms[view.parameter] = torch.zeros_like(view.parameter)
            view.read(terms[view.parameter]).add_(gradient, alpha=coefficient)
    return terms


@torch.no_grad()
def decay_step(products: Iterable[Factorization], optimizer: torch.optim.Optimizer, coefficient: float) -> None:
    """Decoupled decay: factor ← factor − lr · coefficient · gradient, every factor from the old ones.

    lr is that of the factor's parameter group; a factor that the optimizer does not hold stays. A step that fp16
    scaling is about to skip decays nothing.

    Raises:
        FloatingPointError: The step would not shrink the product: lr · coefficient · ‖factor‖₂² reaches 1.
    """
    learning_rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    found_inf = getattr(optimizer, "found_inf", None)  # set by GradScaler around a fused optimizer's step
    for product in products:
        rates = [learning_rates.get(view.parameter) for view in product.views]
        moving = [
            rate for view, rate in zip(product.views, rates, strict=True) if rate and view.parameter.requires_grad
        ]
        if not moving:
            continue
        tensors = product.tensors()
        grams = product.form.decay_grams(tensors)
        _check_stable(product, grams, max(map(float, moving)) * coefficient)
        gradients = product.form.decay_gradients(tensors, grams)  # all of the old factors, before the first one moves
        for view, rate, gradient in zip(product.views, rates, gradients, strict=True):
            if not rate or not view.parameter.requires_grad:
                continue
            if found_inf is not None:
                gradient = gradient * (1 - found_inf.to(gradient))
            view().sub_(gradient, alpha=float(rate) * coefficient)


def check_coefficient(coefficient: float, name: str = "coefficient") -> None:
    """Raise a ValueError for a decay coefficient that is negative or not finite."""
    if not (math.isfinite(coefficient) and coefficient >= 0):
        raise ValueError(f"{name} is {coefficient}, expected a finite number of at least 0")


def _check_stable(product: Factorization, grams, rate: float) -> None:
    """With balanced factors a step takes σ to σ(1 − rate·σ)²: past rate·σ = 1 it overshoots (METHODS 1.2)."""
    if rate * float(product.form.stiffness(grams)) < 1:  # a bound, nearly for free
        return
    spectral = max(float(torch.linalg.matrix_norm(factor.float(), 2).max()) for factor in product.tensors())
    if rate * spectral**2 >= 1:
        raise FloatingPointError(
            f"decoupled Frobenius decay is unstable at {product.name}: learning rate x coefficient = {rate:.3g} "
            f"and a factor's spectral norm is {spectral:.3g}, but {rate:.3g} * {spectral:.3g}^2 must be below 1; "
            "lower frobenius_decay or learning_rate"
        )
