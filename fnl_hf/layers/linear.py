"""`FactorizedLinear`: a linear layer whose matrix is a product of factors, in place of ``nn.Linear`` or ``Conv1D``."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .layer import WORTH_TWO_CALLS, FactorizedLayer, _is_recorded


class FactorizedLinear(FactorizedLayer, nn.Linear):
    """y = U Vᵀ x + b, or U M Vᵀ x + b: by two or three thin products, or by the composed matrix.

    ``in_features`` and ``out_features`` are those of the ordinary layer; a ``Conv1D`` says (in, out) of its weight.
    """

    kind = "linear"

    def _dimensions(self, leaf: nn.Module) -> None:
        if isinstance(leaf, Conv1D):
            self.in_features, self.out_features = leaf.weight.shape

    @property
    def transposed(self) -> bool:
        """Whether the ordinary layer is a ``Conv1D``, which stores (in, out)."""
        return isinstance(self._ordinary[0], Conv1D)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        left, right = self._parameters.get("weight"), self._parameters.get("right")
        if left is None or right is None:  # not built yet
            return self.out_features, self.in_features
        return left.shape[0], right.shape[0]

    @property
    def dense_shape(self) -> tuple[int, int]:
        return self.matrix_shape[::-1] if self.transposed else self.matrix_shape

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.transposed else matrix

    def forward(self, input: Tensor) -> Tensor:
        parameters = self._parameters  # an attribute of a module takes as long to read as a small product to compute
        if not torch.is_grad_enabled() and not _is_recorded():
            weight = self._kept_still("composed")  # and a decision as long as a small one
            if weight is not None:
                return F.linear(input, weight.mT if self.transposed else weight, parameters["bias"])
        left, middle, right = parameters["weight"], parameters.get("middle"), parameters["right"]
        rows, (columns, rank) = left.shape[0], right.shape
        if rank * (rows + columns) >= WORTH_TWO_CALLS * rows * columns:  # else factor by factor, whatever the batch
            tokens, square = input.numel() // columns, 0 if middle is None else rank * rank
            factored = tokens * (rank * (rows + columns) + square)
            weight = self._dense_weight(factored, tokens * rows * columns, rank * rows * columns + square * rows)
            if weight is not None:
                return F.linear(input, weight.mT if self.transposed else weight, parameters["bias"])
        hidden = input @ right
        if middle is not None:
            hidden = F.linear(hidden, middle)
        return F.linear(hidden, left if left.dim() == 2 else left.squeeze(-1), parameters["bias"])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"
