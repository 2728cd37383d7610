"""Forms: how a matrix that a model uses but never stores follows from its factors.

A form is a module of pure functions of tensors with these names:

    product, squared_norm, decay_gradients, add_decay_, decay_grams, spectrum, bound, imbalance, stiffness, balance,
    carry, leading, batched, change_basis

A new form (Tucker, tensor train) is one more module here; nothing above this floor asks which form it holds.
"""

from . import chain, rotary

__all__ = ["chain", "rotary"]
