"""`LayerTarget`: a layer of factors in a plan, and how it takes the place of the ordinary one."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..algebra import chain
from ..algebra.gaussian import ACTIVATIONS
from ..config import LOOK_AHEAD, FNLConfig
from ..factorization import Factorization, View, swap
from ..plan import Activation, Skip, Target
from ..proof import Evidence
from ..trial import Trial
from .activations import activations
from .convolution import FactorizedConv1d, FactorizedConv2d
from .embedding import FactorizedEmbedding
from .inference import quickened
from .layer import FactorizedLayer
from .linear import FactorizedLinear
from .pivoted import PivotedLinear

# The ordinary class -> the one that takes its place
LAYERS: dict[type[nn.Module], type[FactorizedLayer]] = {
    nn.Linear: FactorizedLinear,
    Conv1D: FactorizedLinear,
    nn.Embedding: FactorizedEmbedding,
    nn.Conv2d: FactorizedConv2d,
    nn.Conv1d: FactorizedConv1d,
}


def layer_class(leaf: nn.Module) -> type[FactorizedLayer] | None:
    """Which layer of factors may stand for a leaf; None for a leaf of another kind."""
    return next((factorized for ordinary, factorized in LAYERS.items() if isinstance(leaf, ordinary)), None)


@dataclass(frozen=True)
class LayerTarget(Target):
    """A linear layer, an embedding or a convolution by itself: its matrix becomes a product.

    Attributes:
        deep: U M Vᵀ in place of U Vᵀ.
        scale: what an embedding multiplies its rows by, where it keeps that in a buffer, which no checkpoint holds.
        tied: other layers of the model have the same weight, so a checkpoint may hold it under their names only.
        pivoted: a linear layer in the form of its own columns, for inference.
        followed_by: the activation that its output goes through, where the initialisation looks at that.
    """

    family: ClassVar[str] = "layers"

    deep: bool = False
    tied: bool = False
    scale: float | None = None
    pivoted: bool = False
    followed_by: str | None = None

    def found(self, model: nn.Module) -> Factorization:
        """The weight as it lies in the dense layer."""
        leaf = model.get_submodule(self.name)
        read = _reader(leaf)
        view = View(leaf.weight, lambda weight: read(weight)[None], -2)
        return Factorization(self.name, self.kind, chain, (view,), min(view().shape[-2:]))

    def parameters(self) -> tuple[str, ...]:
        return (f"{self.name}.weight",)

    def cost(self, model: nn.Module, rank: int) -> int:
        return super().cost(model, rank) + (rank * rank if self.deep else 0)

    def shaped(self, factors: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self.deep:
            return factors
        left, right = factors
        middle = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device)
        return left, middle.expand(*left.shape[:-2], -1, -1), right

    @classmethod
    def settle(
        cls, model: nn.Module, config: FNLConfig, targets: Sequence["LayerTarget"], evidence: Evidence
    ) -> Sequence["LayerTarget"]:
        """Adds which layers an activation follows, if the initialisation looks at it; tied ones must agree on it."""
        names = [t.name for t in targets if t.kind == "linear" and t.rank < t.found(model).full_rank]
        if config.init not in LOOK_AHEAD or not names:
            return targets
        recording = evidence.recording
        found = activations(model, names, recording and recording.inputs)
        of_weights = defaultdict(set)
        for target in targets:
            of_weights[target.found(model).weights].add(found.get(target.name))
        agreed = {weights: kinds.pop() for weights, kinds in of_weights.items() if len(kinds) == 1}
        return [replace(target, followed_by=agreed.get(target.found(model).weights)) for target in targets]

    @classmethod
    def with_tied(cls, model: nn.Module, targets: Sequence["LayerTarget"]) -> Sequence["LayerTarget"]:
        """Adds the output layer of a model with a head, where the plan is of one without."""
        by_name, more = {target.name: target for target in targets}, []
        for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            name, one = target.removesuffix(".weight"), by_name.get(source.removesuffix(".weight"))
            if one is not None and name not in by_name and (leaf := _layer_at(model, target)) is not None:
                kind = layer_class(leaf).kind
                more.append(
                    replace(one, name=name, kind=kind, tied=True, scale=one.scale if kind == one.kind else None)
                )
        return [*targets, *more]

    def layer(self, leaf: nn.Module) -> type[FactorizedLayer]:
        """The class that takes the place of a leaf."""
        return PivotedLinear if self.pivoted else layer_class(leaf)

    def is_tied(self) -> bool:
        return self.tied

    def inputs(self) -> tuple[Activation | None, ...]:
        """What a linear layer or a convolution multiplies; of an embedding how often each row is looked up."""
        if self.kind == "embedding":
            return (Activation(self.name, "input", None),)
        spread = FactorizedConv2d.patches if self.kind == "conv" else None
        return (Activation(self.name, "input", lambda x: x[None], spread),)

    def output(self) -> Activation | None:
        """What it puts out: of a layer whose weight is a table too each feature for itself, of a convolution, whose
        matrix has further rows, not known."""
        if self.kind == "conv":
            return None
        alone = self.kind == "linear" and self.tied
        return Activation(self.name, "output", None if alone else lambda x: x[None])

    def flaw(self, model: nn.Module | None = None) -> str | None:
        if (flaw := super().flaw(model)) or model is None:
            flags = {"deep": self.deep, "pivoted": self.pivoted, "tied": self.tied}
            if flaw is None and (wrong := next((key for key in flags if type(flags[key]) is not bool), None)):
                return f"{wrong} is {flags[wrong]!r}, expected true or false"
            if flaw is None and self.pivoted and (self.deep or self.kind != "linear"):
                return f"pivoted is true, expected only of a linear layer that is not deep, not of kind {self.kind!r}"
            is_scale = self.kind == "embedding" and type(self.scale) is float and math.isfinite(self.scale)
            if flaw is None and not (self.scale is None or is_scale):
                return f"scale is {self.scale!r}, expected a number, of an embedding, or null"
            known = {layer.kind for layer in LAYERS.values()}
            if flaw is None and not (self.followed_by is None or self.followed_by in ACTIVATIONS):
                return f"followed_by is {self.followed_by!r}, expected one of {sorted(ACTIVATIONS)}, or null"
            return flaw if flaw or self.kind in known else f"kind is {self.kind!r}, expected one of {sorted(known)}"
        leaf = model.get_submodule(self.name)
        layer = layer_class(leaf)
        if layer is None or layer.kind != self.kind:
            return f"has no {self.name} that is a layer of kind {self.kind!r}, but a {type(leaf).__name__}"
        if getattr(leaf, "groups", 1) != 1:
            return f"has no {self.name} with one group of channels"
        return None

    @classmethod
    def install(cls, model: nn.Module, targets: Sequence["LayerTarget"]) -> None:
        """Put the layers in place; leaves that share their weight become layers that share factors."""
        layers: dict[nn.Module, FactorizedLayer] = {}
        first: dict[int, FactorizedLayer] = {}
        for target in targets:
            leaf = model.get_submodule(target.name)
            if leaf in layers:  # one layer in two places
                continue
            layer = layers[leaf] = target.layer(leaf).replacing(leaf, target.rank, target.deep)
            if target.scale is not None:
                layer.scale = target.scale
            one = first.setdefault(id(leaf.weight), layer)
            if one is not layer:
                layer.tie(one)
        swap(model, layers)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                _tie_all_factors(part)

    @classmethod
    def quicken(cls, model: nn.Module, targets: Sequence["LayerTarget"], trial: Trial) -> list[Skip]:
        return quickened(model, targets, trial)

    @classmethod
    def told(cls, config: FNLConfig, targets: Sequence["LayerTarget"]) -> list[str]:
        """Which layers approximate which function."""
        by_kind = defaultdict(list)
        for target in targets:
            by_kind[target.followed_by].append(target.name)
        others = by_kind.pop(None, [])
        return [f"{config.init} for {kind}: {', '.join(_shortened(by_kind[kind], others))}" for kind in sorted(by_kind)]

    @classmethod
    def notes(cls, config: FNLConfig, products: Sequence[Factorization]) -> list[str]:
        """Which layers save neither parameters nor multiplications at their rank."""
        notes, larger = [], [product.name for product in products if _is_larger(product)]
        if larger:
            some = ", ".join(larger[:3]) + (f" and {len(larger) - 3} more" if len(larger) > 3 else "")
            notes.append(f"{len(larger)} layers save neither parameters nor FLOPs at their rank: {some}")
        if pivoted := sum(bool(entry.get("pivoted")) for entry in (config.plan or {}).get("targets", ())):
            notes.append(f"{pivoted} linear layers are pivoted for inference: C (x1 + Dᵀ x2), with no factors to decay")
        return notes


def _is_larger(product: Factorization) -> bool:
    first, *_, last = factors = product.factors()
    return sum(factor.numel() for factor in factors) >= first.shape[0] * first.shape[-2] * last.shape[-1]


def _shortened(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Names with one entry for all that differ in numbers only, unless some of ``others`` does too."""
    patterns = set(map(_numberless, names)).difference(map(_numberless, others))
    groups = defaultdict(list)
    for name in names:
        groups[_numberless(name) if _numberless(name) in patterns else name].append(name)
    return [group[0] if len(group) == 1 else f"{name} ({len(group)})" for name, group in groups.items()]


def _numberless(name: str) -> str:
    """A name with a star for the number of its layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _reader(leaf: nn.Module) -> Callable[[Tensor], Tensor]:
    """How the matrix (m, n) lies in the weight of an ordinary layer."""
    return Tensor.t if isinstance(leaf, Conv1D) else layer_class(leaf).as_matrix


def _tie_all_factors(model: PreTrainedModel) -> None:
    """Where transformers ties the weights of two layers of factors while loading, it ties their other factors too."""
    keys = getattr(model, "all_tied_weights_keys", None)
    for target, source in list((keys or {}).items()):
        layers = [_layer_at(model, name) for name in (target, source)]
        if all(isinstance(layer, FactorizedLayer) for layer in layers):
            for factor in layers[1].factors[1:]:
                if layers[1].stored(factor) is not None:
                    keys[f"{target.removesuffix('weight')}{factor}"] = f"{source.removesuffix('weight')}{factor}"


def _layer_at(model: nn.Module, weight: str) -> nn.Module | None:
    try:
        return model.get_submodule(weight.removesuffix(".weight")) if weight.endswith(".weight") else None
    except AttributeError:
        return None
