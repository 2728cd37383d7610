"""The ``weight`` of a layer that stores factors: what reads it gets the product, what only looks at it pays nothing.

Over a hundred modeling files read ``proj.weight`` somewhere, most of them its dtype or device (T5's feed-forward).
`ComposedWeight` knows those without a product, and becomes the product, with its gradient, in any other operation.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layer import FactorizedLayer

# What is answered without a product: torch.Tensor's own answers for a tensor of this shape, dtype and device
_DESCRIBES = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_meta", "is_cuda", "is_sparse", "is_quantized")
    ),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.element_size, Tensor.__len__,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.get_device, Tensor.ndimension,
}  # fmt: skip
_DATA = Tensor.data.__get__
# What gives a part of a weight, or the weight otherwise laid out, that is written into in its place
_PARTS = {
    Tensor.__getitem__, Tensor.detach, Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.unflatten, Tensor.narrow,
    Tensor.select, Tensor.t, Tensor.transpose, Tensor.permute, Tensor.squeeze, Tensor.unsqueeze, Tensor.T.__get__,
    Tensor.mT.__get__, Tensor.data.__get__,
}  # fmt: skip
_HOOKS = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}


_IS_A_PRODUCT = "the weight of a factorized layer is the product of its factors, and"
_LOST = (
    f"{_IS_A_PRODUCT} what is written into it would be lost: write the factors (fnl_hf.factorizations), call "
    "fnl_hf.to_dense(model), or leave the layer dense by exclude_modules"
)


class ComposedWeight(Tensor):
    """The weight that a layer's factors make, composed when it is first needed.

    Writing into it, its ``data`` or a part of it raises, since that would be lost. Given to another factorized layer as
    its ``weight``, which is how transformers ties, it gives that layer the factors.
    """

    _is_param = True  # an nn.Parameter to isinstance: `tie_weights` looks for one
    _is_hf_initialized = True
    layer: "FactorizedLayer"
    detached = False  # whether no gradient goes through it: ``data``

    @staticmethod
    def __new__(cls, layer: "FactorizedLayer") -> "ComposedWeight":
        like = layer.stored("weight")
        weight = Tensor._make_wrapper_subclass(cls, layer.dense_shape, dtype=like.dtype, device=like.device)
        weight.layer = layer
        return weight

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in _DESCRIBES:
                return function(*args, **kwargs)
            if function == _DATA:
                return args[0]._without_gradient()
            if function in _HOOKS:
                raise ValueError(f"{_IS_A_PRODUCT} gets no gradient: register the hook on factors")
            if function == Tensor.grad_fn.__get__:  # torch's question to what becomes a parameter
                raise ValueError(f"{_IS_A_PRODUCT} cannot be that of an ordinary layer, too: factorize both")
            if isinstance(_written(function, args, kwargs), cls):
                raise ValueError(_LOST)
            output = function(*map(_product, args), **{key: _product(value) for key, value in kwargs.items()})
            return output.as_subclass(_Part) if function in _PARTS else output

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise TypeError(
            f"{function} was given the weight of a factorized layer behind torch's back, where no gradient would reach "
            "its factors: give it weight.clone()"
        )

    @property
    def requires_grad(self) -> bool:
        return not self.detached and any(parameter.requires_grad for parameter in self.layer.factor_parameters())

    def _without_gradient(self) -> "ComposedWeight":
        data = ComposedWeight(self.layer)
        data.detached, data._is_param = True, False
        return data

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        self.requires_grad_(requires_grad)

    def __deepcopy__(self, memo) -> torch.nn.Parameter:
        """A weight by itself, of these values."""
        return torch.nn.Parameter(self.layer.composed().detach().clone(), requires_grad=self.requires_grad)

    def requires_grad_(self, requires_grad: bool = True) -> "ComposedWeight":
        """Freeze or train the factors."""
        for parameter in self.layer.factor_parameters():
            parameter.requires_grad_(requires_grad)
        return self


class _Part(Tensor):
    """A part of a composed weight, or all of it: what is written into it raises, since it would be lost."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if isinstance(_written(function, args, kwargs), cls):
                raise ValueError(_LOST)
            output = function(*map(_plain, args), **{key: _plain(value) for key, value in kwargs.items()})
            return output.as_subclass(cls) if function in _PARTS else output

    def __reduce_ex__(self, protocol):
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _plain(value):
    if type(value) in (tuple, list):
        return type(value)(map(_plain, value))
    return value.as_subclass(Tensor) if isinstance(value, _Part) else value


def _written(function, args: tuple, kwargs: dict):
    """What a function writes into, None where it only reads."""
    name = getattr(function, "__name__", "")
    if "out" in kwargs:
        return kwargs["out"]
    in_place = name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
    in_place |= name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    # ``torch.nn.init`` gives all by keyword
    return next(iter((*args, *kwargs.values())), None) if in_place else None


def _product(value):
    if isinstance(value, ComposedWeight):
        return value.layer.composed().detach() if value.detached else value.layer.composed()
    if type(value) in (tuple, list):
        return type(value)(map(_product, value))
    return value
