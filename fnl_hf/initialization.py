"""Named initialisations of a factorization: (its form, its factors, a rank) -> factors.

Factors come as ``Factorization.augmented`` gives them, biases appended, and go back through ``Factorization.write``.
An initialisation is one function; a new one is one more entry here.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .factorization import Factorization


def spectral(form: ModuleType, factors: Sequence[Tensor], rank: int) -> Sequence[Tensor]:
    """Balanced factors of the best approximation of rank ``rank``: the same product at full rank (METHODS 1.1)."""
    return form.balance(factors, rank)


def default(form: ModuleType, factors: Sequence[Tensor], rank: int) -> Sequence[Tensor]:
    """The factors that the model has; at lower rank the leading ones of each head."""
    return form.leading(factors, rank)


INITIALIZATIONS = {"spectral": spectral, "default": default}


@torch.no_grad()
def initial_factors(product: Factorization, rank: int, init: str) -> Sequence[Tensor]:
    """New factors of a factorization by a named initialisation, biases appended."""
    return INITIALIZATIONS[init](product.form, product.augmented(), rank)
