"""Linear layers, embeddings and convolutions made of factors: the second family of targets.

In the order in which a layer goes through them: `find` sees which layers a config asks for, `target` is the layer in
a plan, `layer` what all layers of factors have in common, `linear`, `embedding`, `convolution` what they compute,
`pivoted` a form for inference, `inference` which layers get one, `composed` what reads of their weight get,
`resizing` what happens to them when the vocabulary grows.
"""

from . import resizing
from .convolution import FactorizedConv1d, FactorizedConv2d
from .embedding import FactorizedEmbedding
from .find import find_layers, hidden_matrices
from .layer import FactorizedLayer
from .linear import FactorizedLinear
from .pivoted import PivotedLinear
from .target import LayerTarget

__all__ = [
    "FactorizedConv1d",
    "FactorizedConv2d",
    "FactorizedEmbedding",
    "FactorizedLayer",
    "FactorizedLinear",
    "LayerTarget",
    "PivotedLinear",
    "find_layers",
    "hidden_matrices",
    "resizing",
]
