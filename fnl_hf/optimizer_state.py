"""What an optimizer keeps of its parameters, carried over when the factors of a product are replaced by others.

A factor's gradient follows exactly from the gradient of the factors that it came from (``form.carry``), so moments go
along; a reset would throw away the direction and, with bias correction long over, make the first steps several times
too large. A state that carries no meaning there (Adafactor's rows and columns, 8-bit blocks) starts anew, as for a
parameter never seen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .algebra import dlrt
from .factorization import Factorization, View

# Names of what optimizers keep per parameter, by its power of the gradient
MOMENTS = {
    "exp_avg": 1, "momentum_buffer": 1, "velocity": 1, "grad_avg": 1,
    "exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2, "sum": 2,
}  # fmt: skip

# Steps that the moments of a core count for at most once it has grown: about the memory of Adam's first moment
_REMEMBERED = 10

State = Mapping[nn.Parameter, Mapping[str, object]]  # as ``optimizer.state``


@dataclass(frozen=True)
class Before:
    """A factorization as it was: how to read its parameters' shapes, and a copy of its factors, biases appended."""

    views: tuple[View, ...]
    factors: list[Tensor]

    @classmethod
    def of(cls, product: Factorization) -> "Before":
        """To be taken before anything changes."""
        return cls(product.views, [factor.detach().clone() for factor in product.augmented()])


@torch.no_grad()
def carry_state(moves: Sequence[tuple[Before, Factorization]], state: State) -> dict[nn.Parameter, dict]:
    """The optimizer's state of new parameters, from that of the old ones.

    Args:
        moves: What each factorization was and what it is now; they may differ in rank and in the number of factors.
        state: old parameter -> what the optimizer keeps of it; it is left as it is. A parameter may be old and new
            (at full rank a weight is rewritten in place).

    Returns:
        new parameter -> what the optimizer is to keep of it, biases included. Missing are parameters that start anew:
        where the state is unknown or not made of moments, or where rows that no product reads have no place in a
        weight of another shape. Parameters of no product are not the matter of this function.
    """
    known = {parameter: kept for parameter, kept in state.items() if kept and _has_only_moments(kept, parameter)}
    covered = _covered(moves)
    carried: dict[nn.Parameter, dict] = {}
    for new, old in _sources(moves).items():
        # Of the same shape, what no product reads is the same as before; else products must make up the whole.
        keeps_shape = [parameter.shape for parameter in old] == [new.shape]
        if old and all(parameter in known for parameter in old) and (keeps_shape or covered[new] == new.numel()):
            carried[new] = {
                key: _own(value, new.shape if key in MOMENTS else None) for key, value in known[old[0]].items()
            }
    for key, power in MOMENTS.items():
        moments = {parameter: kept[key] for parameter, kept in known.items() if kept.get(key) is not None}
        targets = {parameter: kept[key] for parameter, kept in carried.items() if kept.get(key) is not None}
        for before, product in moves:
            if not any(parameter in moments for view in before.views for parameter in (view.parameter, view.bias)):
                continue
            # Beside what is carried, factors without a moment count as zero and those that start anew are not written.
            of_factors = [view.augmented(_or_zeros(moments)) for view in before.views]
            new = product.form.carry(before.factors, product.augmented(), of_factors, power)
            for view, moment in zip(product.views, new, strict=True):
                view.write(moment, _or_zeros(targets))
    return carried


@torch.no_grad()
def change_bases(optimizer: Optimizer, core: nn.Parameter, rows: Tensor, columns: Tensor) -> None:
    """Carry what an optimizer keeps of the core S of U S Vᵀ to new bases, in place.

    Beside `dlrt.transported` two things keep the steps of optimizers that divide by √v at their size. A mean of squares
    is at least the square of the mean, and is made so where terms that add up in the new bases broke it. Entries of a
    core that grows have no past: old ones then count as those of ten steps at most, with the same means, since squares
    that start from zero late in a run would make steps six times too large.

    Args:
        core: The parameter; its data may have the new shape already.
        rows: Ûᵀ U, (k, r), or (heads, k, r) where there is a core for every head.
        columns: Vᵀ V̂, (r, k) or (heads, r, k).
    """
    kept = optimizer.state.get(core)
    if not kept:
        return
    batch, (new, old) = core.shape[:-2], rows.shape[-2:]
    rows, columns = rows.reshape(*batch, new, old), columns.reshape(*batch, old, new)
    if not _has_only_moments(kept, rows.new_empty(*batch, old, old)):
        del optimizer.state[core]  # no meaning in other bases: it starts anew
        return
    moments = [key for key in kept if key in MOMENTS and torch.is_tensor(kept[key])]
    for key in moments:
        kept[key] = dlrt.transported(kept[key], rows, columns, MOMENTS[key])
    group = next(group for group in optimizer.param_groups if any(p is core for p in group["params"]))
    if not {"step", "exp_avg"} <= kept.keys() or "betas" not in group:
        return
    count, betas = int(kept["step"]), group["betas"]
    if not count:  # its first step was skipped, as fp16 does: all moments are zero
        return
    fewer = min(count, _REMEMBERED) if new > old else count
    for key in moments:
        beta = betas[MOMENTS[key] - 1]
        kept[key].mul_((1 - beta**fewer) / (1 - beta**count))
    kept["step"] = torch.full_like(kept["step"], fewer) if torch.is_tensor(kept["step"]) else fewer
    means = kept["exp_avg"].square() / (1 - betas[0] ** fewer) ** 2
    for key in (key for key in moments if MOMENTS[key] == 2):
        torch.maximum(kept[key], means * (1 - betas[1] ** fewer), out=kept[key])


def _sources(moves: Sequence[tuple[Before, Factorization]]) -> dict[nn.Parameter, list[nn.Parameter]]:
    """new parameter -> the old ones that its moments come from.

    Factor by factor where there are as many as before; where a dense matrix became two factors, both come from it.
    """
    sources: dict[nn.Parameter, dict] = {}
    for before, product in moves:
        paired = len(before.views) == len(product.views)
        for i, new in enumerate(product.views):
            old = before.views[i : i + 1] if paired else before.views
            sources.setdefault(new.parameter, {}).update(dict.fromkeys(view.parameter for view in old))
            if new.bias is not None:
                biases = dict.fromkeys(view.bias for view in old if view.bias is not None)
                sources.setdefault(new.bias, {}).update(biases)
    return {new: list(old) for new, old in sources.items()}


def _covered(moves: Sequence[tuple[Before, Factorization]]) -> dict[nn.Parameter, int]:
    """new parameter -> how many of its entries some product reads; views that differ in offset do not overlap."""
    sizes = {part: size for _, product in moves for part, size in _parts(product.views)}
    covered: dict[nn.Parameter, int] = {}
    for (parameter, _), size in sizes.items():
        covered[parameter] = covered.get(parameter, 0) + size
    return covered


def _parts(views: Sequence[View]) -> Iterator[tuple[tuple[nn.Parameter, int], int]]:
    """((parameter, offset), entries) of what views read."""
    for view in views:
        yield (view.parameter, view.offset), view.read(view.parameter).numel()
        if view.bias is not None:
            yield (view.bias, view.offset), view.read_bias(view.bias).numel()


def _has_only_moments(kept: Mapping, parameter: Tensor) -> bool:
    """Whether every tensor in an optimizer's state is a moment that can be carried, or a count."""
    tensors = {key: value for key, value in kept.items() if torch.is_tensor(value) and value.dim()}
    return all(key in MOMENTS and value.shape == parameter.shape for key, value in tensors.items())


def _own(value: object, shape: torch.Size | None) -> object:
    """A new parameter's own entry: a moment of its shape, to be written into, or the old one's count, copied."""
    if not torch.is_tensor(value):
        return value
    return value.clone() if shape is None or value.shape == shape else value.new_zeros(shape)


def _or_zeros(tensors: Mapping[nn.Parameter, Tensor]) -> Callable[[nn.Parameter], Tensor]:
    """Reads something else of the parameters' shapes; zeros where it is not known."""
    return lambda parameter: tensors[parameter] if parameter in tensors else torch.zeros_like(parameter)
