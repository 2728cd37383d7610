"""Layers whose rank adapts: U S Vᵀ with orthonormal U and V, as `rank_adaptation` trains them, and ordinary again.

In the model such a layer is a deep one, U its ``weight``, S its ``middle`` and V its ``right``. What is done to it goes
through `Adaptive`, one for all layers that are tied.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .algebra import chain, dlrt
from .attachment import attached
from .factorization import Declares, is_factorized
from .layers import FactorizedLayer
from .plan import Target

# ‖UᵀU − 1‖ (largest entry) up to which columns count as orthonormal: rounding of float32, and nothing that was trained
_ORTHONORMAL = 1e-4


@dataclass(frozen=True)
class Adaptive:
    """One matrix (m, n) that is or becomes U S Vᵀ.

    Attributes:
        names: of the layers that hold it, more than one where they are tied.
        layers: these layers.
    """

    names: tuple[str, ...]
    layers: tuple[FactorizedLayer, ...]

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def rank(self) -> int:
        return self.layers[0].rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.layers[0].matrix_shape

    @property
    def left(self) -> nn.Parameter:
        """The parameter that holds U, (m, rank) or (m, rank, 1)."""
        return self.layers[0].stored("weight")

    @property
    def core(self) -> nn.Parameter | None:
        """S, (rank, rank)."""
        return self.layers[0].stored("middle")

    @property
    def right(self) -> nn.Parameter:
        """V, (n, rank)."""
        return self.layers[0].stored("right")

    @property
    def bases(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.left, self.right

    def factors(self) -> dlrt.Factors:
        """U (m, rank), S, V, detached."""
        return self.layers[0].left.detach(), self.core.detach(), self.right.detach()

    def gradients(self) -> dlrt.Factors:
        """Of U, S and V as they lie in ``.grad``; zeros where there is none."""
        found = (torch.zeros_like(p) if p.grad is None else p.grad for p in (self.left, self.core, self.right))
        return tuple(gradient.reshape(gradient.shape[:2]) for gradient in found)

    def write(self, left: Tensor, core: Tensor | None, right: Tensor) -> None:
        """Give all layers these factors; the parameters stay the same objects."""
        first, *others = self.layers
        first.set_factors(left, core, right)
        for layer in others:
            layer.tie(first)

    def make_orthonormal(self) -> None:
        """U Σ Vᵀ of the same matrix, and frozen U and V; nothing changes where they are orthonormal already."""
        if self.core is None or not (_are_orthonormal(self.left) and _are_orthonormal(self.right)):
            first = self.layers[0]
            core = None if first.middle is None else first.middle.detach()
            self.write(*dlrt.orthonormal(first.left.detach(), self.right.detach(), core))
        self.freeze()

    def freeze(self, frozen: bool = True) -> None:
        """Whether U and V get gradients."""
        for basis in self.bases:
            basis.grad = None
            basis.requires_grad_(not frozen)

    def is_spectral(self) -> bool:
        """Whether S is diagonal, as it is after a truncation."""
        core = self.core.detach()
        return bool(torch.equal(core, torch.diag(core.diagonal())))


def adaptive(model: nn.Module) -> list[Adaptive]:
    """Everything in a model whose rank can adapt: layers of factors that train.

    Raises:
        ValueError: There is nothing, or something factorized whose rank cannot adapt.
    """
    others, tied = [], defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLayer):
            tied[id(module.stored("weight"))].append((name, module))
        elif isinstance(module, Declares):
            others.append(name)
    if others:
        raise ValueError(
            f"rank_adaptation is of linear layers, embeddings and convolutions, but {others[0]}"
            f"{f' and {len(others) - 1} more are' if len(others) > 1 else ' is'} no such layer (products of attention "
            "heads have no core to adapt): factorize with FNLConfig(attention=(), target_modules=...), which makes the "
            "projections themselves low-rank"
        )
    found = [Adaptive(*zip(*places, strict=True)) for places in tied.values()]
    found = [each for each in found if any(p.requires_grad for p in each.layers[0].factor_parameters())]
    if not found:
        missing = "all its factors are frozen" if is_factorized(model) else "nothing in it is factorized"
        raise ValueError(
            f"rank_adaptation needs layers of factors that train, but {missing}: call "
            'fnl_hf.factorize(model, FNLConfig(attention=(), target_modules="all-linear", rank=0.5)) before making '
            "the trainer"
        )
    halves = (torch.float16, torch.bfloat16)
    if coarse := next((each for each in found if each.right.dtype in halves), None):
        raise ValueError(
            f"{coarse.name} is of {coarse.right.dtype}, in which no basis stays orthonormal: keep the weights in "
            "float32 and train in mixed precision (bf16=True)"
        )
    return found


def take_ranks(model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Give adaptive layers the ranks of a checkpoint that is about to be read into them; values are left open.

    Raises:
        ValueError: The checkpoint was not written by a run with ``rank_adaptation``.
    """
    for each in adaptive(model):
        target = next((targets[name] for name in each.names if name in targets), None)
        if target is None or not getattr(target, "deep", False):
            raise ValueError(
                f"the checkpoint does not hold {each.name} as U S Vᵀ, so it is not of a run with rank_adaptation: load "
                "it by from_pretrained and train it in a new run, or resume without rank_adaptation"
            )
        if target.rank != each.rank:
            (rows, columns), rank, like = each.shape, target.rank, each.right
            each.write(like.new_zeros(rows, rank), like.new_zeros(rank, rank), like.new_zeros(columns, rank))


def fix_ranks(model: nn.Module) -> nn.Module:
    """Ordinary factorized layers in the place of those whose rank adapts: U S Vᵀ becomes a balanced U Vᵀ, in place.

    The function and the ranks stay as they are, also those of a run that ended between augmenting and truncating. A
    layer that was factorized as a deep one becomes an ordinary one too; others are left alone.

    Returns:
        The model.

    Raises:
        ValueError: Nothing in the model is factorized.
    """
    if not is_factorized(model):
        raise ValueError(f"{type(model).__name__} is not factorized: there are no ranks to fix")
    tied = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLayer) and module.middle is not None:
            tied[id(module.stored("weight"))].append((name, module))
    for places in tied.values():
        each = Adaptive(*zip(*places, strict=True))
        trains = any(parameter.requires_grad for parameter in each.layers[0].factor_parameters())
        left, core, right = (factor.double() for factor in each.factors())
        left, right = chain.balance((left @ core, right.mT))
        dtype = each.right.dtype
        each.write(left.to(dtype), None, right.mT.to(dtype))
        each.freeze(not trains)
    if (stored := attached(model)) is not None and hasattr(model, "config"):
        model.config.quantization_config = stored
    return model


def _are_orthonormal(basis: Tensor) -> bool:
    columns = basis.detach().reshape(basis.shape[:2]).double()
    identity = torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
    return bool((columns.mT @ columns - identity).abs().max() < _ORTHONORMAL)
