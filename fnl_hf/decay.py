"""Frobenius decay: the gradient of λ/2 Σ ‖product‖²_F in place of λ/2 Σ ‖factor‖² (Khodak et al., ICLR 2021).

Of ½ ‖U Vᵀ‖² the gradients are U (VᵀV) and V (UᵀU). Two ways in, on any optimizer:

- coupled, the paper's: the decay gradient joins the loss gradient once per step, before clipping;
- decoupled, as AdamW does with weight decay: factors shrink by lr · λ · gradient beside the optimizer's own step. An
  adaptive optimizer would divide a coupled gradient by its running size, so that λ means little there.

Both go through the Grams of the factors, in float32 or better whatever autocast is in force. Products of sharded
parameters (DTensors) take the same way by ``sharding``.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import sharding
from .factorization import Declares, Factorization, factorizations


def _in_full_precision(function: Callable) -> Callable:
    """Without gradients, and without autocast, which would take the matrix products of Grams in half precision."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.no_grad(), torch.autocast(device, enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return wrapped


def decayed(model: nn.Module, kinds: Sequence[str] | None = None) -> list[Factorization]:
    """The factorizations that decay falls on: of the given kinds (None: all), with a factor that trains.

    Raises:
        ValueError: A kind that the model does not have.
    """
    return [product for product in of_kinds(model, kinds) if any(p.requires_grad for p in product.parameters())]


def of_kinds(model: nn.Module, kinds: Sequence[str] | None = None) -> list[Factorization]:
    """The factorizations of the given kinds (None: all), frozen ones too.

    Raises:
        ValueError: A kind that the model does not have; a layer of it is in its inference form.
    """
    for name, module in model.named_modules():
        if isinstance(module, Declares) and module.for_inference:
            raise ValueError(
                f"{name} is in the form that fnl_hf.for_inference gave it, whose product has no factors to decay: "
                "train the model as it was before, or call fnl_hf.to_dense(model) and factorize it again"
            )
    products = factorizations(model)
    if kinds is None:
        return products
    present = {product.family for product in products}
    if unknown := [kind for kind in kinds if kind not in present]:
        raise ValueError(
            f"Frobenius decay is asked for kind {unknown[0]!r}; the model has {sorted(present) or 'none'}: name some "
            "of those in frobenius_decay_kinds, or leave it out for all"
        )
    return [product for product in products if product.family in kinds]


def frobenius_decay_(model: nn.Module, coefficient: float, kinds: Sequence[str] | None = None) -> None:
    """Add ``coefficient`` · gradient of ½ Σ squared_norm to the ``.grad`` of every covered parameter (coupled decay).

    Call it once per optimizer step, after the last backward and before clipping. A missing ``.grad`` counts as zero.

    Raises:
        ValueError: A negative or non-finite coefficient; a kind that the model does not have.
    """
    check_coefficient(coefficient)
    add_decay_gradients(decayed(model, kinds), coefficient)


@_in_full_precision
def add_decay_gradients(products: Sequence[Factorization], coefficient: float) -> None:
    """The body of ``frobenius_decay_``, for products at hand."""
    whole, sharded = _split(products)
    for product in whole:
        targets = []
        for view in product.views:
            parameter = view.parameter
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            targets.append(view.read(parameter.grad) if parameter.requires_grad else None)
        tensors = product.tensors()
        product.form.add_decay_(tensors, targets, [coefficient] * len(tensors), product.form.decay_grams(tensors))
    for parameter, gradient in _sharded_gradients(sharded).items():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.to_local().add_(gradient.to_local(), alpha=coefficient)


@_in_full_precision
def decay_terms(products: Sequence[Factorization], coefficient: float) -> dict[nn.Parameter, Tensor]:
    """parameter -> ``coefficient`` · gradient of ½ Σ squared_norm, every term of the factors as they are now."""
    whole, sharded = _split(products)
    terms: dict[nn.Parameter, Tensor] = {}
    for product in whole:
        for view, gradient in product.decay_gradients():
            if view.parameter not in terms:
                terms[view.parameter] = torch.zeros_like(view.parameter)
            view.read(terms[view.parameter]).add_(gradient, alpha=coefficient)
    return terms | {p: gradient.mul_(coefficient) for p, gradient in _sharded_gradients(sharded).items()}


@_in_full_precision
def decay_step(products: Sequence[Factorization], optimizer: torch.optim.Optimizer, coefficient: float) -> None:
    """Decoupled decay: factor ← factor − lr · coefficient · gradient, every factor from the old ones.

    lr is that of the factor's parameter group; a factor that the optimizer does not hold stays. A step that fp16
    scaling is about to skip decays nothing.

    Raises:
        FloatingPointError: The step would not shrink a product: lr · coefficient · ‖factor‖₂² reaches 1. Nothing has
            moved then.
    """
    found_inf = getattr(optimizer, "found_inf", None)  # set by GradScaler around a fused optimizer's step
    if found_inf is not None and bool(found_inf):
        return
    rates = {p: float(group["lr"]) * coefficient for group in optimizer.param_groups for p in group["params"]}

    def rate_of(parameter: nn.Parameter) -> float:
        return rates.get(parameter, 0.0) if parameter.requires_grad else 0.0

    products = [product for product in products if any(rate_of(view.parameter) for view in product.views)]
    of_products = grams(products)  # these and `old`: of the factors before the first one moves
    _check_stable(products, of_products, [[rate_of(view.parameter) for view in p.views] for p in products])
    sharded = [pair for pair in zip(products, of_products, strict=True) if sharding.is_sharded(pair[0])]
    whole = [pair for pair in zip(products, of_products, strict=True) if not sharding.is_sharded(pair[0])]
    uses = Counter((view.parameter, view.offset) for product, _ in whole for view in product.views)
    old = [
        [view() if uses[view.parameter, view.offset] == 1 else view().clone() for view in product.views]
        for product, _ in whole
    ]
    for (product, of_product), tensors in zip(whole, old, strict=True):
        scales = [-rate_of(view.parameter) for view in product.views]
        targets = [view() if scale else None for view, scale in zip(product.views, scales, strict=True)]
        product.form.add_decay_(tensors, targets, scales, of_product)
    for parameter, gradient in sharding.decay_gradients(*zip(*sharded, strict=True)).items() if sharded else ():
        if rate_of(parameter):
            parameter.to_local().sub_(gradient.to_local(), alpha=rate_of(parameter))


@_in_full_precision
def grams(products: Sequence[Factorization]) -> list:
    """``form.decay_grams`` of every product; where parameters are sharded, those of the whole factors."""
    _, sharded = _split(products)
    of_sharded = iter(sharding.grams(sharded) if sharded else ())
    return [
        next(of_sharded) if sharding.is_sharded(product) else product.form.decay_grams(product.tensors())
        for product in products
    ]


def check_coefficient(coefficient: float, name: str = "coefficient") -> None:
    """Raise a ValueError for a decay coefficient that is negative or not finite."""
    if not (math.isfinite(coefficient) and coefficient >= 0):
        raise ValueError(f"{name} is {coefficient}, expected a finite number of at least 0")


# ----------------------------------------------------------------------------------------------------


def _split(products: Sequence[Factorization]) -> tuple[list[Factorization], list[Factorization]]:
    """Products of whole parameters, and of sharded ones."""
    whole, sharded = [], []
    for product in products:
        (sharded if sharding.is_sharded(product) else whole).append(product)
    return whole, sharded


def _sharded_gradients(products: Sequence[Factorization]) -> dict[nn.Parameter, Tensor]:
    return sharding.decay_gradients(products, sharding.grams(products)) if products else {}


def _check_stable(products: Sequence[Factorization], of_products: Sequence, rates: Sequence[Sequence[float]]) -> None:
    """With balanced factors a step takes σ to σ(1 − rate·σ)²: past rate·σ = 1 it overshoots.

    (U − rate·U VᵀV at UᵀU = VᵀV = Σ is U (1 − rate·Σ), V likewise.)
    """
    if not products:
        return
    moving, rates = [list(map(bool, some)) for some in rates], list(map(max, rates))
    every = list(zip(products, of_products, moving, rates, strict=True))
    bounds = [product.form.stiffness(g, moving=moves) * rate for product, g, moves, rate in every]
    bounds = [bound.to(products[0].views[0].parameter.device) for bound in bounds]
    if float(torch.stack(bounds).max()) < 1:  # a bound by traces, nearly for free; one look per step at the device
        return
    for product, of_product, moves, rate in every:
        stiffness = float(product.form.stiffness(of_product, True, moves))
        if rate * stiffness >= 1:
            raise FloatingPointError(
                f"decoupled Frobenius decay is unstable at {product.name}: learning rate x coefficient = {rate:.3g} "
                f"and a factor's squared spectral norm is {stiffness:.3g}, but their product must be below 1; lower "
                "frobenius_decay or learning_rate (of Spectron factor_learning_rate)"
            )
