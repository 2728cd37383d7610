"""`FactorizedConv2d` and `FactorizedConv1d`: a convolution as two, one along each dimension of its kernel.

The matrix of a kernel (out, in, kh, kw) has a row for each output channel and place in the kernel's height, and a
column for each input channel and place in its width: W[o, i, a, b] = A[o·kh + a, i·kw + b]. A product of rank r is then
a convolution by (1, kw) to r channels and one by (kh, 1) from them (Khodak et al., ICLR 2021; their code reshapes
without the permutation, which changes the function of a trained kernel). In one dimension the second kernel has length
one.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layer import FactorizedLayer

# Of their multiplications' time: two thin convolutions run at a lower rate than the square one that they stand for
LOWER_RATE = 1.15


class _FactorizedConv(FactorizedLayer):
    kind = "conv"

    @property
    def _kernel(self) -> tuple[int, int]:
        return (1, *self.kernel_size)[-2:]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        height, width = self._kernel
        return self.out_channels * height, self.in_channels * width

    @staticmethod
    def patches(leaf: nn.Module, images: Tensor) -> Tensor:
        """What the matrix multiplies of images (N, in, …, w), row by row of them, as (N, places, in·kw)."""
        if unbatched := images.dim() == len(leaf.kernel_size) + 1:
            images = images[None]
        images = images if len(leaf.kernel_size) == 2 else images.unsqueeze(-2)
        mode = "constant" if leaf.padding_mode == "zeros" else leaf.padding_mode
        images = F.pad(images, [*leaf._reversed_padding_repeated_twice[:2], 0, 0], mode=mode)
        width, stride, dilation = (sizes[-1] for sizes in (leaf.kernel_size, leaf.stride, leaf.dilation))
        places = F.unfold(images, (1, width), (1, dilation), stride=(1, stride)).mT
        return places[0] if unbatched else places

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels, *self.kernel_size

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        if weight.dim() == 3:
            return weight.flatten(1)
        return weight.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        height, width = self._kernel
        if height > 1:
            matrix = matrix.view(self.out_channels, height, self.in_channels, width).transpose(1, 2)
        return matrix.reshape(self.dense_shape).contiguous()

    def forward(self, input: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(self.kernel_size)
        weight = self._composed_for(input, padding)
        if weight is not None:
            return self._convolve(input, weight, self.bias, self.stride, padding, self.dilation)
        down, up = self._kernels() if self._trains() else self._kept("_kernels")
        if len(self.kernel_size) == 1:
            hidden = F.conv1d(input, down, None, self.stride, padding, self.dilation)
            return F.conv1d(hidden, up, self.bias)
        (sh, sw), (ph, pw), (dh, dw) = self.stride, padding, self.dilation
        hidden = F.conv2d(input, down, None, (1, sw), (0, pw), (1, dw))
        return F.conv2d(hidden, up, self.bias, (sh, 1), (ph, 0), (dh, 1))

    def _kernels(self) -> tuple[Tensor, Tensor]:
        """Those of the two convolutions, as a convolution's own lie: other strides can change the output's layout."""
        (height, width), outer = self._kernel, (1,) * (len(self.kernel_size) - 1)
        left = self.left if self.middle is None else self.left @ self.middle
        if height > 1:
            left = left.view(self.out_channels, height, -1).mT.clone(memory_format=torch.contiguous_format)
        down = self.right.mT.clone(memory_format=torch.contiguous_format)
        return down.view(-1, self.in_channels, *outer, width), left.reshape(self.out_channels, -1, height, *outer)

    def _composed_for(self, input: Tensor, padding: tuple[int, ...]) -> Tensor | None:
        """The composed kernel where convolving by that is cheaper for an input of this size."""
        (rows, columns), rank = self.matrix_shape, self.rank
        if rank * (rows + columns) < 0.5 * rows * columns:
            return None
        sizes = input.shape[-len(self.kernel_size) :]
        spans = zip(sizes, padding, self.dilation, self.kernel_size, self.stride, strict=True)
        out = [(size + 2 * pad - dil * (kernel - 1) - 1) // step + 1 for size, pad, dil, kernel, step in spans]
        images = input.numel() // (self.in_channels * math.prod(sizes))
        outputs = images * math.prod(out)
        middles = outputs if len(sizes) == 1 else images * sizes[0] * out[1]
        compose = rank * rows * columns
        dense = outputs * self.out_channels * self.in_channels * math.prod(self.kernel_size)
        factored = LOWER_RATE * (middles * rank * columns + outputs * rank * rows)
        return self._dense_weight(factored, dense, compose)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class FactorizedConv2d(_FactorizedConv, nn.Conv2d):
    """A 2-D convolution by (1, kw) and then by (kh, 1): any stride, padding, padding mode and dilation, one group."""

    def _convolve(self, *args) -> Tensor:
        return F.conv2d(*args)


class FactorizedConv1d(_FactorizedConv, nn.Conv1d):
    """A 1-D convolution to ``rank`` channels, and then one of length one from them."""

    def _convolve(self, *args) -> Tensor:
        return F.conv1d(*args)
