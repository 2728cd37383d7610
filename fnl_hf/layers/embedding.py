"""`FactorizedEmbedding`: a table of embeddings whose rows are made of thinner ones."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layer import FactorizedLayer


class FactorizedEmbedding(FactorizedLayer, nn.Embedding):
    """Row i of U Vᵀ (or U M Vᵀ): looks up rows of U, (vocabulary, rank), then multiplies.

    As in ``nn.Embedding`` no gradient comes from lookups of ``padding_idx``, here to neither factor. An
    ``embed_scale``, which some models of transformers keep on their embeddings, multiplies the output.
    """

    kind = "embedding"

    @property
    def matrix_shape(self) -> tuple[int, int]:
        left, right = self._parameters.get("weight"), self._parameters.get("right")
        if left is None or right is None:  # not built yet
            return self.num_embeddings, self.embedding_dim
        return left.shape[0], right.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        parameters, padding = self._parameters, self.padding_idx  # see `FactorizedLinear.forward`
        left, middle, right = self.left, parameters.get("middle"), parameters["right"]
        (rows, rank), columns = left.shape, right.shape[0]
        tokens, square = input.numel(), 0 if middle is None else rank * rank
        weight = None
        if tokens > rows:  # as many products as composing all rows takes
            weight = self._dense_weight(tokens * (rank * columns + square), 0, rows * (rank * columns + square))
        if weight is not None:
            output = F.embedding(input, weight, padding)
        else:
            thin = F.embedding(input, left, padding)
            if middle is not None:
                thin = F.linear(thin, middle.mT)
            output = F.linear(thin, right)
            if padding is not None and torch.is_grad_enabled() and right.requires_grad:
                output = torch.where((input == padding).unsqueeze(-1), output.detach(), output)
        scale = getattr(self, "embed_scale", None)
        if scale is None:
            return output
        return output * (scale.to(output.dtype) if isinstance(scale, Tensor) else scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"
