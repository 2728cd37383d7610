"""Forms: how a matrix that a model uses but never stores follows from its factors.

A form is a module of pure functions of tensors, and ``Form`` says which and what they mean. ``chain`` is a product of
matrices, of one (a dense matrix), two, three or more; ``rotary`` is queries and keys that turn with their positions.
"""

from . import chain, rotary
from .form import Form

__all__ = ["Form", "chain", "rotary"]
