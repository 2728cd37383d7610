"""`FactorizedLinear`: a linear layer whose matrix is a product of factors, in place of ``nn.Linear`` or ``Conv1D``."""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .layer import FactorizedLayer


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
        left, middle, right = self.left, self.middle, self.right
        (rows, rank), columns = left.shape, right.shape[0]
        if rank * (rows + columns) >= 0.9 * rows * columns:  # else factor by factor, whatever the batch
            tokens = input.numel() // columns
            square = 0 if middle is None else rank * rank
            weight = self._dense_weight(
                tokens * (rank * (rows + columns) + square),
                tokens * rows * columns,
                rank * (rows * columns + square * rows // rank),
            )
            if weight is not None:
                return F.linear(input, weight.mT if self.transposed else weight, self.bias)
        hidden = F.linear(input, right.mT)
        if middle is not None:
            hidden = F.linear(hidden, middle)
        return F.linear(hidden, left, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"
