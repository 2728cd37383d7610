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

Sides = Sequence[Tensor | None] | None
Initialization = Callable[[Form, Sequence[Tensor], int, Sides], Sequence[Tensor]]


def spectral(form: Form, factors: Sequence[Tensor], rank: int, sides: Sides = None) -> Sequence[Tensor]:
    """Balanced factors of the best approximation of rank ``rank``: the same product at full rank.

    With W = A Σ Bᵀ they are A_r Σ_r^½ and Σ_r^½ B_rᵀ: spectral initialisation (Khodak et al., ICLR 2021).
    """
    return form.balance(factors, rank)


def default(form: Form, factors: Sequence[Tensor], rank: int, sides: Sides = None) -> Sequence[Tensor]:
    """The factors that the model has; at lower rank the leading ones of each head."""
    return form.leading(factors, rank)


INITIALIZATIONS: dict[str, Initialization] = {"spectral": spectral, "default": default}


@torch.no_grad()
def initial_factors(
    form: Form, factors: Sequence[Tensor], rank: int, init: str, sides: Sides = None
) -> Sequence[Tensor]:
    """New factors in the place of ``Factorization.augmented`` ones, by a named initialisation."""
    return INITIALIZATIONS[init](form, factors, rank, sides)
