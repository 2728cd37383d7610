"""`PivotedLinear`: a linear layer of low rank in the form of its own columns, for inference."""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..algebra.columns import own_columns
from ..factorization import Factorization
from .layer import FactorizedLayer
from .linear import FactorizedLinear


class PivotedLinear(FactorizedLinear):
    """y = C (x₁ + Dᵀ x₂) + b, with x₁ and x₂ the features that ``order`` puts first, and the others.

    Parameters: ``weight`` is C, (m, rank), columns of the matrix itself; ``rest`` is D, (n − rank, rank). Both together
    are smaller than the matrix at every rank below m and n, and by rank² than U and V. Not for training: no gradient
    or decay of the product is one of U and V here, so it declares no factorization.
    """

    factors = ("weight", "rest")
    for_inference = True

    @classmethod
    def of(cls, layer: FactorizedLinear) -> Self:
        """The same function as a layer U Vᵀ of a rank below both of its sides."""
        pivoted = cls.replacing(layer.dense(), layer.rank)
        columns, rest, order = own_columns(layer.left, layer.right)
        pivoted.stored("weight").data, pivoted.rest.data, pivoted.order = columns, rest, order
        return pivoted

    def _make_factors(self, like: Tensor, rank: int, deep: bool) -> None:
        (rows, columns), options = self.matrix_shape, {"dtype": like.dtype, "device": like.device}
        self._parameters["weight"] = nn.Parameter(torch.empty(rows, rank, **options))
        self.rest = nn.Parameter(torch.empty(columns - rank, rank, **options))
        self.register_buffer("order", torch.empty(columns, dtype=torch.long, device=like.device))

    @property
    def rank(self) -> int:
        return self._parameters["weight"].shape[-1]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        weight, rest = self._parameters.get("weight"), self._parameters.get("rest")
        if weight is None or rest is None:  # not built yet
            return self.out_features, self.in_features
        return weight.shape[0], sum(rest.shape)

    @property
    def right(self) -> Tensor:
        """V of the same product, (n, rank), of which ``weight`` is U: a unit matrix and D, in the matrix's order."""
        unit = torch.eye(self.rank, dtype=self.rest.dtype, device=self.rest.device)
        return torch.cat([unit, self.rest])[self.order.argsort()]

    middle = None

    def composed(self) -> Tensor:
        return self.as_weight(self.left @ self.right.mT)

    def tie(self, other: FactorizedLayer) -> None:
        super().tie(other)
        self.order = other.order

    def factorization(self, name: str, parent: nn.Module) -> Factorization:
        raise ValueError(f"{name} is in its inference form, which has no factors to decay: call fnl_hf.to_dense(model)")

    def forward(self, input: Tensor) -> Tensor:
        parameters, order = self._parameters, self._buffers["order"]
        rest, weight = parameters["rest"], parameters["weight"]
        flat, rank = input.reshape(-1, input.shape[-1]), weight.shape[1]
        # Gathering features of the input costs one pass over it; picked rows would have the output put together
        hidden = torch.addmm(flat.index_select(1, order[:rank]), flat.index_select(1, order[rank:]), rest)
        return F.linear(hidden, weight, parameters["bias"]).view(*input.shape[:-1], weight.shape[0])
