"""The heads of softmax attention: the products QᵀK and OV of every head, the first family of targets.

In the order in which a product goes through them: `find` sees attention by structure, `target` is the product in a
plan, `slices` how its heads lie in the weights, `compact` whether they may be really narrower, `leaf` the layer that
stores narrow heads, `product` the declaration that training finds, `adaptive` which of them may change their
rank in training, `inference` which attention gets another form for inference.
"""

from .adaptive import FROZEN, heads_that_keep_their_rank
from .find import find_attention, find_heads
from .leaf import HeadLinear, HeadPadding
from .product import HeadProduct
from .slices import HeadSlice, RotaryLayout
from .target import HeadTarget

__all__ = [
    "FROZEN",
    "HeadLinear",
    "HeadPadding",
    "HeadProduct",
    "HeadSlice",
    "HeadTarget",
    "RotaryLayout",
    "find_attention",
    "find_heads",
    "heads_that_keep_their_rank",
]
