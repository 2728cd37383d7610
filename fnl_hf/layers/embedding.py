"""`FactorizedEmbedding`: a table of embeddings whose rows are made of thinner ones."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layer import FactorizedLayer, is_exported


class FactorizedEmbedding(FactorizedLayer, nn.Embedding):
    """Row i of U Vᵀ (or U M Vᵀ): looks up rows of U, (vocabulary, rank), then multiplies.

    As in ``nn.Embedding`` no gradient comes from lookups of ``padding_idx``, here to neither factor. An
    ``embed_scale``, which some models of transformers keep on their embeddings, multiplies the output.
    """

    kind = "embedding"
    scale: float | None = None  # in place of an ``embed_scale`` that the ordinary layer keeps as a buffer

    def _dimensions(self, leaf: nn.Module) -> None:
        self._buffers.pop("embed_scale", None)  # not in checkpoints, and filled again only in classes that are known

    @property
    def embed_scale(self) -> Tensor | float:
        """What the output is multiplied by, as models and PEFT read it of the ordinary layer; missing if it is."""
        if self.scale is not None:
            return torch.tensor(self.scale, dtype=self.right.dtype, device=self.right.device)
        try:
            return vars(self)["embed_scale"]
        except KeyError:
            raise AttributeError("embed_scale") from None

    @embed_scale.setter
    def embed_scale(self, value: float) -> None:
        vars(self)["embed_scale"] = value

    def dense(self) -> nn.Module:
        dense = super().dense()
        if self.scale is not None:
            kept = self._ordinary[0].embed_scale
            dense._buffers["embed_scale"] = torch.tensor(self.scale, dtype=kept.dtype, device=dense.weight.device)
        return dense

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
        if not is_exported() and tokens > rows:  # as many products as composing all rows takes
            weight = self._dense_weight(tokens * (rank * columns + square), 0, rows * (rank * columns + square))
        if weight is not None:
            output = F.embedding(input, weight, padding)
        else:
            thin = F.embedding(input, left, padding)
            with torch.autocast(thin.device.type, enabled=False):  # a table of embeddings gives its own precision
                if middle is not None:
                    thin = F.linear(thin, middle.mT)
                output = F.linear(thin, right)
            learns = torch.is_grad_enabled() or torch.jit.is_tracing()  # which is checked without gradients
            learns = learns and any(factor is not None and factor.requires_grad for factor in (middle, right))
            if padding is not None and learns:
                output = torch.where((input == padding).unsqueeze(-1), output.detach(), output)
        if self.scale is not None:
            return output * output.new_tensor(self.scale)  # rounded to the precision of the output, as a buffer is
        return output * self.embed_scale if "embed_scale" in self.__dict__ else output

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"
