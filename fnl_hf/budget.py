"""Ranks that follow from a budget of parameters, or from the energy that is to be kept."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

import torch
from torch import Tensor, nn

from .calibration import Calibration
from .config import FNLConfig
from .factorization import Factorization
from .initialization import Sides, energies, refuse_non_finite
from .messages import progress
from .plan import Skip, Target
from .proof import Evidence

BAR = "errors by rank"  # where energies are made
FLOOR = 0.1  # of the rank at which a layer saves nothing: the least that "error" and "loss" leave it


@dataclass(frozen=True)
class Share:
    """What is to get one rank: a target, or several of one weight.

    Attributes:
        cost: parameters at a rank.
        dense: parameters of the weight as it is.
        full: the rank up to which components count.
        lone: a weight by itself, which stays dense where a product would be no smaller.
        sides, outputs: what calibration says of it.
    """

    targets: tuple[Target, ...]
    product: Factorization
    cost: Callable[[int], int]
    dense: int
    full: int
    lone: bool
    sides: Sides = None
    outputs: Sequence[Tensor] = ()

    def size(self, rank: int) -> int:
        """Parameters at a rank; of one that saves nothing, those of the dense weight."""
        return min(self.cost(rank), self.dense)

    def stays_dense(self, rank: int) -> bool:
        return self.lone and self.cost(rank) >= self.dense

    @cached_property
    def energies(self) -> Tensor:
        """What each further rank saves of the error, in descending order, summed over heads, float64."""
        return energies(self.product.form, self.product.augmented(), self.sides, self.outputs)


@torch.no_grad()
def with_ranks(
    model: nn.Module,
    config: FNLConfig,
    targets: Sequence[Target],
    evidence: Evidence,
    calibration: Calibration | None = None,
) -> tuple[list[Target], list[Skip]]:
    """The targets with the ranks that ``target_ratio`` or energy give them, and those that stay dense.

    Energies are those of the weights, or with calibration of what they make of its inputs.

    Raises:
        ValueError: The ratio is below what the least ranks give.
    """
    if config.target_ratio is None and config.energy is None:
        return list(targets), []
    shares = _shares(model, config, targets, evidence)
    budget = None if config.target_ratio is None else _budget(model, config, targets, shares, evidence)
    if calibration is not None:
        sides = calibration.of(targets)
        outputs = calibration.curvatures(targets) if config.outputs_by_loss() else {}
        keys = [share.product.weights for share in shares]
        shares = [
            replace(s, sides=sides[key], outputs=outputs.get(key, ())) for s, key in zip(shares, keys, strict=True)
        ]
    if config.energy is not None:
        ranks = [energy_rank(share.energies, config.energy) for share in progress(shares, BAR)]
    else:
        ranks = _within(budget, config, shares)
    pairs = zip(shares, ranks, strict=True)
    decided = {target.name: (share, rank) for share, rank in pairs for target in share.targets}
    kept, skipped = [], []
    for target in targets:
        share, rank = decided.get(target.name, (None, target.rank))
        if share is not None and share.stays_dense(rank):
            why = f"of rank {rank} it would not be smaller" if rank < share.full else "keeps its full rank"
            skipped.append(Skip(target.name, target.kind, f"dense: {why}"))
        else:
            kept.append(replace(target, rank=rank))
    return kept, skipped


def energy_rank(energies: Tensor, share: float) -> int:
    """The least rank that keeps a share of the squared singular values, given in descending order; at least 1."""
    sums = energies.double().cumsum(0)
    return min(int((sums < share * sums[-1] * (1 - 1e-12)).sum()) + 1, len(energies))


def largest_below(budget: float, size: Callable[[float], float], low: float, high: float) -> float:
    """The largest argument in (low, high] whose ``size``, which must not fall, is within the budget, by bisection."""
    if size(high) <= budget:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    return low


def reference_rank(kind: str, rows: int, columns: int, scale: float) -> int:
    """The rank that the released code of Khodak et al. gives a (rows, columns) matrix.

    Of a convolution a share of out·kh, which may exceed the matrix's own; of a linear layer possibly 0. ``rank`` of an
    `FNLConfig` is a share of min(rows, columns) in both cases.
    """
    return max(int(round(scale * rows)), 1) if kind == "conv" else int(round(scale * min(rows, columns)))


def nearest_scale(target: float, ratio: Callable[[float], float], tolerance: float = 1e-6) -> tuple[float, float]:
    """(scale, ratio) nearest to a target ratio of those that a bisection of [0, 1] visits, the first of equals.

    The released code's search for the scale of its ranks.
    """
    low, high, best = 0.0, 1.0, (0.0, math.inf)
    while high - low >= tolerance and abs(best[1] - target) >= tolerance:
        scale = (low + high) / 2
        reached = ratio(scale)
        if abs(reached - target) < abs(best[1] - target):
            best = scale, reached
        low, high = (scale, high) if reached < target else (low, scale)
    return best


# ----------------------------------------------------------------------------------------------------


def _shares(model: nn.Module, config: FNLConfig, targets: Sequence[Target], evidence: Evidence) -> list[Share]:
    """What shares a budget: of energy layers only, of a ratio heads too; without those that ``rank_pattern`` fixes."""
    groups: dict[tuple, list[Target]] = {}
    fixed = set()
    for target in targets:
        product = target.found(model)
        key = product.weights
        if config.is_fixed((target.name, target.name.rpartition(".")[0])[: 1 if product.lone else 2]):
            fixed.add(key)  # and whatever is tied to it
        if product.lone or (config.target_ratio is not None and target.is_reducible(model, evidence)):
            groups.setdefault(key, []).append(target)
    shares = []
    for group in (group for key, group in groups.items() if key not in fixed):
        product = group[0].found(model)
        refuse_non_finite(product.name, product.augmented())
        dense = sum(view.augmented().numel() for view in product.views)
        cost = cache(partial(group[0].cost, model))  # a bisection asks for few ranks many times
        shares.append(Share(tuple(group), product, cost, dense, product.full_rank or product.size()[1], product.lone))
    return shares


def _saved(model: nn.Module, targets: Sequence[Target]) -> int:
    """How many parameters targets of given ranks save (tied ones once)."""
    sizes = {}
    for target in targets:
        product = target.found(model)
        dense = sum(view.augmented().numel() for view in product.views)
        sizes[product.weights] = dense - target.cost(model, target.rank)
    return sum(sizes.values())


def _budget(
    model: nn.Module, config: FNLConfig, targets: Sequence[Target], shares: Sequence[Share], evidence: Evidence
) -> float:
    """Parameters for what shares a ratio, beside what targets of given ranks save.

    Heads that cannot be narrowed keep their width and save nothing, whatever rank they are given.

    Raises:
        ValueError: The least ranks take more.
    """
    shared = {target.name for share in shares for target in share.targets}
    fixed = [target for target in targets if target.name not in shared and target.is_reducible(model, evidence)]
    total = sum(parameter.numel() for parameter in model.parameters())
    rest = total - sum(share.dense for share in shares) - _saved(model, fixed)
    budget = config.target_ratio * total - rest
    ranks = _by_fraction(shares, 0.0) if config.rank_allocation == "uniform" else map(_least, shares)
    least = sum(share.size(rank) for share, rank in zip(shares, ranks, strict=True))
    if least > budget:
        raise ValueError(
            f"target_ratio is {config.target_ratio}, but with all that is selected at its least rank the model keeps "
            f"{(rest + least) / total:.3f} of its parameters: give a larger ratio, or select more (target_modules, "
            "attention)"
        )
    return budget


def _within(budget: float, config: FNLConfig, shares: Sequence[Share]) -> list[int]:
    """The largest ranks, by one fraction, by error or by loss, with no more parameters than a budget."""
    if config.rank_allocation == "uniform":
        ranks_at = _by_fraction
    elif config.rank_allocation == "error":
        ranks_at = _by_worth(shares, [1 / share.energies.sum().clamp_min(1e-300) for share in progress(shares, BAR)])
    else:
        ranks_at = _by_worth(shares, _losses_per_energy(shares))

    def size(level: float) -> int:
        return sum(share.size(rank) for share, rank in zip(shares, ranks_at(shares, level), strict=True))

    return ranks_at(shares, largest_below(budget, size, 0.0, 1.0))


def _by_fraction(shares: Sequence[Share], fraction: float) -> list[int]:
    return [max(1, round(fraction * share.full) if share.lone else int(fraction * share.full)) for share in shares]


def _least(share: Share) -> int:
    """The rank that is left whatever it is worth."""
    return min(share.full, max(1, math.ceil(FLOOR * share.dense / share.cost(1))))


def _by_worth(shares: Sequence[Share], weights: Sequence[float]) -> Callable[[Sequence[Share], float], list[int]]:
    """Component i of a layer is kept if w σ²_i exceeds λ times the parameters that it takes.

    Exact for a sum of errors, each weighted. The level in [0, 1] runs through log λ.
    """
    worth = [weight * share.energies / share.cost(1) for share, weight in zip(shares, weights, strict=True)]
    values = torch.cat([w[w > 0] for w in worth]).log()
    low, high = (float(values.min()) - 1, float(values.max()) + 1) if len(values) else (0.0, 1.0)  # nothing counts
    floors = list(map(_least, shares))

    def ranks_at(_: Sequence[Share], level: float) -> list[int]:
        threshold = math.exp(high - level * (high - low))
        return [max(floor, int((w > threshold).sum())) for w, floor in zip(worth, floors, strict=True)]

    return ranks_at


def _losses_per_energy(shares: Sequence[Share]) -> list[float]:
    """Energies weighted by curvature are losses; those of a share without one count as much as others do."""
    known = sorted(float(share.energies.sum()) for share in progress(shares, BAR) if share.outputs)
    usual = known[len(known) // 2] if known else 1.0
    return [1.0 if s.outputs else usual / float(s.energies.sum().clamp_min(1e-300)) for s in shares]
