"""Products whose rank adapts: U S Vᵀ with orthonormal U and V, as `rank_adaptation` trains them, and ordinary again.

Of a layer U is its ``weight``, S its ``middle`` and V its ``right``. Of the heads of attention U and V lie in the
projections of both sides, where biases are one more row of them, and S beside the right one. What is done to either
goes through `Adaptive`, which reads and writes what `factorizations` sees.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .algebra import chain, dlrt
from .attachment import attached
from .factorization import Declares, Factorization, FactorLeaf, Resizable, is_factorized
from .heads import FROZEN, heads_that_keep_their_rank
from .plan import Target

# ‖UᵀU − 1‖ (largest entry) up to which columns count as orthonormal: rounding of float32, and nothing that was trained
_ORTHONORMAL = 1e-4


@dataclass(frozen=True)
class Adaptive:
    """One matrix (m, n), or one for every head of a layer (or group of heads), that is or becomes U S Vᵀ.

    In a group of heads that share their keys or values the matrices of its heads are one, stacked. A bias of heads is
    one more row of theirs in U or V.

    Attributes:
        names: of what declares it, more than one where layers are tied.
        declarations: of these names.
        parents: the modules that hold these declarations.
    """

    names: tuple[str, ...]
    declarations: tuple[Resizable, ...]
    parents: tuple[nn.Module, ...]

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def product(self) -> Factorization:
        """Its factors as they are now."""
        return self.declarations[0].factorization(self.name, self.parents[0])

    # -- sizes ----------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """One for all heads."""
        return self.product.size()[1]

    @property
    def full_rank(self) -> int:
        """All that its matrix can have, or its heads are wide."""
        *_, (rows, columns) = self._shapes()
        return min(rows, columns, self.product.full_rank)

    @property
    def widest(self) -> int | None:
        """How many columns its bases can be given: of heads as many as these are wide, of a layer any number."""
        return None if self._is_layer else self.full_rank

    @property
    def highest(self) -> int:
        """The rank that it can keep after a cut. Heads of their full width could not turn any more: one is left."""
        return self.full_rank if self._is_layer else max(1, self.full_rank - 1)

    @property
    def dense_size(self) -> int:
        """Parameters of what the dense model has in its place: the matrix of a layer, both projections of heads."""
        batch, (rows, columns) = self._shapes()
        return rows * columns if self._is_layer else batch * self.product.full_rank * (rows + columns)

    def size(self, rank: int) -> int:
        """Parameters of U and V at a rank, without biases."""
        batch, (rows, columns) = self._shapes()
        return batch * rank * (rows + columns)

    def _shapes(self) -> tuple[int, tuple[int, int]]:
        first, *_, last = self.product.factors()
        return first.shape[0], (first.shape[-2], last.shape[-1])

    @property
    def _is_layer(self) -> bool:
        return isinstance(self.declarations[0], FactorLeaf)

    # -- factors --------------------------------------------------------------------------------------

    @property
    def bases(self) -> list[nn.Parameter]:
        """The parameters that hold U and V, and biases in them; heads in one weight have them in common."""
        first, *_, last = self.product.views
        return list(dict.fromkeys(p for view in (first, last) for p in (view.parameter, view.bias) if p is not None))

    @property
    def core(self) -> nn.Parameter | None:
        """The parameter that holds S, (rank, rank), or (heads, rank, rank)."""
        return self.product.views[1].parameter if self.declarations[0].deep else None

    def factors(self) -> dlrt.Factors:
        """U (heads, m, rank), S (heads, rank, rank) or None, V (heads, n, rank), detached; of a layer heads is 1."""
        return self._read(lambda parameter: parameter.detach())

    def gradients(self) -> dlrt.Factors:
        """Of U, S and V as they lie in ``.grad``; zeros where there is none."""
        return self._read(lambda parameter: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)

    def _read(self, of: Callable[[nn.Parameter], Tensor]) -> dlrt.Factors:
        left, *core, right = chain.batched([view.augmented(of) for view in self.product.views])
        return left, core[0] if core else None, right.mT

    @torch.no_grad()
    def write(self, left: Tensor, core: Tensor | None, right: Tensor) -> None:
        """Other factors in the place of those that there are, as `factors` gives them, of any rank."""
        first, *others = self.declarations
        first.resize(self.parents[0], left.shape[-1], core is not None)
        product, values = self.product, (left, right.mT) if core is None else (left, core, right.mT)
        product.write([new.reshape(old.shape) for new, old in zip(values, product.augmented(), strict=True)])
        for layer in others:
            layer.tie(first)

    def make_orthonormal(self) -> None:
        """U Σ Vᵀ of the same matrix, and frozen U and V; nothing changes where they are orthonormal already."""
        left, core, right = self.factors()
        if core is None or not (_are_orthonormal(left) and _are_orthonormal(right)):
            self.write(*dlrt.orthonormal(left, right, core))
        self.freeze()

    def freeze(self, frozen: bool = True) -> None:
        """Whether U and V get gradients."""
        for basis in self.bases:
            basis.grad = None
            basis.requires_grad_(not frozen)

    def is_spectral(self) -> bool:
        """Whether S is diagonal, as it is after a truncation."""
        core = self.core.detach()
        return bool(torch.equal(core, torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))))


def adaptive(model: nn.Module) -> list[Adaptive]:
    """Everything in a model whose rank can adapt: layers of factors, and products of narrow heads, that train.

    Raises:
        ValueError: There is nothing, or heads are compact, or something is in half precision.
    """
    kept = keeping_their_rank(model)
    found = _grouped(model, lambda name, declaration: name not in kept)
    if not found:
        missing = "; ".join(told(kept)) or "nothing in it is factorized"
        advice = (
            "call fnl_hf.factorize(model, FNLConfig(head_rank=0.25)), or FNLConfig(attention=(), "
            'target_modules="all-linear", rank=0.25), before making the trainer'
        )
        if FROZEN in kept.values():
            advice = "unfreeze what adapters or you have frozen (parameter.requires_grad_(True)), or train without it"
        raise ValueError(
            f"rank_adaptation needs layers of factors or products of narrow heads that train, but {missing}: {advice}"
        )
    halves = (torch.float16, torch.bfloat16)
    if coarse := next((each for each in found if each.bases[0].dtype in halves), None):
        raise ValueError(
            f"{coarse.name} is of {coarse.bases[0].dtype}, in which no basis stays orthonormal: keep the weights in "
            "float32 and train in mixed precision (bf16=True)"
        )
    return found


def keeping_their_rank(model: nn.Module) -> dict[str, str]:
    """name of what is factorized -> why its rank cannot adapt; it is trained as usual.

    Raises:
        ValueError: Heads are compact.
    """
    reasons = heads_that_keep_their_rank(model)
    for name, module in model.named_modules():
        if not isinstance(module, Declares) or name in reasons:
            continue
        if module.for_inference or not isinstance(module, Resizable):
            reasons[name] = "there are no factors that could be given another rank"
        elif isinstance(module, FactorLeaf) and not _trains(module):
            reasons[name] = FROZEN
    return reasons


def told(kept: Mapping[str, str]) -> list[str]:
    """What `keeping_their_rank` found in words, one line for every reason."""
    lines = []
    for reason in dict.fromkeys(kept.values()):
        first, *more = (name for name in kept if kept[name] == reason)
        lines.append(f"{first} {f'and {len(more)} more keep their' if more else 'keeps its'} rank, since {reason}")
    return lines


def take_ranks(model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Give what adapts the ranks of a checkpoint that is about to be read into it; values are left open.

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
            left, core, right = each.factors()
            wider = [factor.new_zeros(*factor.shape[:-1], target.rank) for factor in (left, right)]
            each.write(wider[0], core.new_zeros(len(core), target.rank, target.rank), wider[1])


def fix_ranks(model: nn.Module, rank_tolerance: float = 0.0, rank_max: int | None = None) -> nn.Module:
    """Ordinary factors in the place of those whose rank adapts: U S Vᵀ becomes a balanced U Vᵀ, in place.

    The function and the ranks stay as they are, also those of a run that ended between augmenting and truncating. A
    layer that was factorized as a deep one becomes an ordinary one too; others are left alone. Projections whose heads
    have their full width become the ordinary layers that they are at full rank.

    Args:
        rank_tolerance, rank_max: Cut before, as the end of a cycle does: for a run that was stopped within one.

    Returns:
        The model.

    Raises:
        ValueError: Nothing in the model is factorized; or a bound is none.
    """
    if not is_factorized(model):
        raise ValueError(f"{type(model).__name__} is not factorized: there are no ranks to fix")
    if not 0 <= rank_tolerance < 1:
        raise ValueError(f"rank_tolerance is {rank_tolerance!r}, expected at least 0 and below 1: a share of a norm")
    if rank_max is not None and (type(rank_max) is not int or rank_max < 1):
        raise ValueError(f"rank_max is {rank_max!r}, expected an int of at least 1")
    deep = _grouped(model, lambda name, declaration: declaration.deep)
    trains = [any(p.requires_grad for p in (each.core, *each.bases)) for each in deep]
    for each in deep:
        left, core, right = (factor.double() for factor in each.factors())
        left, core, right = dlrt.orthonormal(left, right, core)
        if rank_tolerance or rank_max is not None:
            left, core, right = dlrt.truncate(left, core, right, rank_tolerance, 1, rank_max)
        root, dtype = core.diagonal(dim1=-2, dim2=-1).sqrt()[..., None, :], each.core.dtype
        each.write((left * root).to(dtype), None, (right * root).to(dtype))
    for each, trained in zip(deep, trains, strict=True):
        each.freeze(not trained)
    if (stored := attached(model)) is not None and hasattr(model, "config"):
        model.config.quantization_config = stored
    return model


def _grouped(model: nn.Module, wanted: Callable[[str, Resizable], bool]) -> list[Adaptive]:
    """What the declarations that are wanted declare, those of layers that are tied together."""
    named, tied = dict(model.named_modules()), defaultdict(list)
    for name, module in named.items():
        if isinstance(module, Resizable) and not module.for_inference and wanted(name, module):
            parent = named[name.rpartition(".")[0]]
            tied[module.factorization(name, parent).weights[0]].append((name, module, parent))
    return [Adaptive(*zip(*places, strict=True)) for places in tied.values()]


def _trains(layer: FactorLeaf) -> bool:
    """Whether all its factors do, or the core, beside which bases are frozen."""
    core = layer.stored("middle")
    return all(p.requires_grad for p in ([core] if core is not None else layer.factor_parameters()))


def _are_orthonormal(basis: Tensor) -> bool:
    """Columns of zeros beside a complete basis too, which `dlrt.augment` makes."""
    columns = basis.double()
    lengths = torch.arange(columns.shape[-1], device=columns.device) < columns.shape[-2]
    return bool((columns.mT @ columns - torch.diag(lengths.to(columns))).abs().max() < _ORTHONORMAL)
