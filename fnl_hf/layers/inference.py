"""Which layers of factors get another form for inference: their own columns, or the composed weight."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from ..factorization import swap
from ..plan import Skip
from ..trial import DENSE, Trial
from .embedding import FactorizedEmbedding
from .layer import WORTH_TWO_CALLS, FactorizedLayer
from .linear import FactorizedLinear
from .pivoted import PivotedLinear

if TYPE_CHECKING:
    from .target import LayerTarget

COMPOSED = "composed for inference: nothing is faster than the ordinary layer"


def quickened(model: nn.Module, targets: Sequence["LayerTarget"], trial: Trial) -> list[Skip]:
    """Merge the middles of deep layers, and put each layer that is tied to no other into its fastest form."""
    layers: dict[FactorizedLayer, LayerTarget] = {}
    for target in targets:
        layers.setdefault(model.get_submodule(target.name), target)  # one layer may stand in several places
    merge_middles(model, list(layers))
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    free = {
        layer: target.name
        for layer, target in layers.items()
        if uses[id(layer.stored("weight"))] == 1 and not (isinstance(layer, FactorizedEmbedding) or layer.for_inference)
    }
    calls, replaced, skipped = trial.calls(free.values()), {}, []
    for layer, name in free.items():
        forms = _forms(layer)
        form = trial.fastest(name, forms, calls[name])
        if form is None or (new := forms[form]()) is layer:
            continue
        replaced[layer] = new
        if form == DENSE:
            skipped.append(Skip(name, layer.kind, COMPOSED))
        else:
            new.planned, new.settings = replace(layer.planned, pivoted=True), layer.settings
    swap(model, replaced)
    return skipped


def _forms(layer: FactorizedLayer) -> dict[str, Callable[[], nn.Module]]:
    """What can stand for a layer, what holds the fewest numbers first where times are the same."""
    kept, dense = {"kept": lambda: layer}, {DENSE: layer.dense}
    if not isinstance(layer, FactorizedLinear):
        return kept | dense
    (rows, columns), rank = layer.matrix_shape, layer.rank
    if (
        rank * (rows + columns) >= WORTH_TWO_CALLS * rows * columns
    ):  # it would keep a composed weight beside its factors
        kept = {}
    pivoted = {"pivoted": lambda: PivotedLinear.of(layer)} if rank < min(rows, columns) else {}
    return kept | pivoted | dense


@torch.no_grad()
def merge_middles(model: nn.Module, layers: Sequence[FactorizedLayer]) -> None:
    """U M Vᵀ as (U M) Vᵀ; layers that are tied stay so."""
    merged: dict[nn.Parameter, nn.Parameter] = {}
    for layer in layers:
        if layer.middle is None:
            continue
        left = layer.stored("weight")
        if left not in merged:
            product = (layer.left @ layer.middle).view(left.shape)
            merged[left] = nn.Parameter(product, requires_grad=left.requires_grad)
        layer._parameters["weight"], layer._parameters["middle"] = merged[left], None
        layer.planned = replace(layer.planned, deep=False)
    for part in model.modules():
        keys = getattr(part, "all_tied_weights_keys", None) if isinstance(part, PreTrainedModel) else None
        for key in [key for key in keys or () if key.endswith(".middle")]:  # of ties that there were
            layer = part.get_submodule(key.removesuffix(".middle"))
            if layer in layers:
                del keys[key]
