"""Factors one after another, each by its inputs as they are once what stands before it is compressed.

A layer that is cut loses something, and what follows is given other inputs than before. So every product is made the
best approximation of what the dense model computes from the inputs that the compressed one will give it: with x̃ in the
place of x, the least E‖W x − U Vᵀ x̃‖², which takes C̃ = E[x̃ x̃ᵀ] and E[x x̃ᵀ]. Batches advance through both models
block by block (`fnl_hf.blocks`), with the moments of one place in memory at a time.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .blocks import Batch, Calls, block_lists, calls_of, stopped_after
from .calibration import Calibration
from .factorization import Factorization, overwrite
from .initialization import Sides
from .messages import progress
from .moments import Moment, checked, evaluated, masks_of
from .plan import Target

# (target, its product in the dense model, sides, crosses) -> new factors
Initial = Callable[[Target, Factorization, Sides, Sides], Sequence[Tensor]]


@dataclass
class _Walk:
    """One batch on its way through both models."""

    masks: list[Tensor]
    dense: Calls
    compressed: Calls


def successive(
    model: nn.Module, targets: Sequence[Target], data: Calibration, initial: Initial
) -> Iterator[tuple[Target, Sequence[Tensor]]]:
    """(target, its factors) for every target, in the order of a forward.

    What lies in no block of the model (embeddings, output layers), and weights that are tied, come first, by the inputs
    of the dense model. The model is not changed: a copy of it takes each product as it is made.
    """
    batches = list(checked(model, data.batches))
    chains = block_lists(model, batches[0])
    inside = {block: [t for t in targets if _lies_in(model, t, block, targets)] for chain in chains for block in chain}
    in_blocks = {target.name for several in inside.values() for target in several}
    compressed = copy.deepcopy(model)
    with torch.no_grad(), evaluated(model), evaluated(compressed):
        outside = [target for target in targets if target.name not in in_blocks]
        sides = data.of(outside)
        for target in outside:
            product = target.found(model)
            factors = initial(target, product, sides[product.weights], None)
            overwrite(target.found(compressed), factors)
            yield target, factors
        for chain in chains:
            walks = [_walk(model, compressed, chain, batch) for batch in batches]
            for index, block in enumerate(progress(chain, "blocks")):
                for stage in _stages(model, chain, index, inside[block], walks[0]):
                    for target, sides, crosses in _paired(model, compressed, chain, index, stage, walks):
                        factors = initial(target, target.found(model), sides, crosses)
                        overwrite(target.found(compressed), factors)
                        yield target, factors
                for walk in walks:
                    walk.dense.hidden = walk.dense.run(model, chain, index)
                    walk.compressed.hidden = walk.compressed.run(compressed, chain, index)


def _lies_in(model: nn.Module, target: Target, block: str, targets: Sequence[Target]) -> bool:
    """Whether a target is a block's own: all that it reads lies there, and nothing else has its weights."""
    reads = [activation for activation in target.inputs() if activation is not None]
    weights = target.found(model).weights
    return (
        bool(reads)
        and all(f"{activation.module}.".startswith(f"{block}.") for activation in reads)
        and sum(other.found(model).weights == weights for other in targets) == 1
    )


def _walk(model: nn.Module, compressed: nn.Module, chain: Sequence[str], batch: Batch) -> _Walk:
    return _Walk(list(masks_of(model, batch)), calls_of(model, chain, batch), calls_of(compressed, chain, batch))


def _stages(
    model: nn.Module, chain: Sequence[str], index: int, targets: Sequence[Target], walk: _Walk
) -> list[list[Target]]:
    """The targets of a block in the order in which it reads them; those that read the same go together."""
    read: dict[str, list[Tensor]] = {target.name: [] for target in targets}
    when: dict[str, int] = {}

    def take(name: str, module: nn.Module, value: Tensor) -> None:
        read[name].append(value)
        when[name] = len(when) if name not in when else when[name]

    with contextlib.ExitStack() as stack:
        for target in targets:
            for moment in _moments(target):
                stack.callback(moment.hook(model, partial(take, target.name)).remove)
        walk.dense.run(model, chain, index)
    stages: dict[tuple[int, ...], list[Target]] = {}
    for target in sorted(targets, key=lambda target: when.get(target.name, len(when))):
        stages.setdefault(tuple(map(id, read[target.name])), []).append(target)
    return list(stages.values())


def _paired(
    model: nn.Module,
    compressed: nn.Module,
    chain: Sequence[str],
    index: int,
    stage: Sequence[Target],
    walks: Sequence[_Walk],
) -> Iterator[tuple[Target, Sides, Sides]]:
    """The targets of a stage with the moments of their inputs in the compressed model, and those of both."""
    moments = {target.name: [a and Moment(a) for a in target.inputs()] for target in stage}
    wanted = [moment for several in moments.values() for moment in several if moment is not None]
    unlike: set[str] = set()  # where other positions come to a module, as to an expert, than in the dense model
    for walk in walks:
        given = _features(model, wanted, walk.masks, partial(walk.dense.run, model, chain, index))
        taken = _features(compressed, wanted, walk.masks, partial(walk.compressed.run, compressed, chain, index))
        for moment in wanted:
            x, stood_for = taken.get(moment), given.get(moment)
            if x is None:
                continue
            if stood_for is None or x.shape != stood_for.shape:
                unlike.add(moment.activation.module)
            moment.add_features(x, None if moment.activation.module in unlike else stood_for)
    for target in stage:
        means = [(None, None) if moment is None else moment.mean(True) for moment in moments[target.name]]
        sides, crosses = zip(*means, strict=True)
        paired = all(cross is not None for side, cross in means if side is not None)
        reached = all(side is not None for moment, side in zip(moments[target.name], sides, strict=True) if moment)
        known = paired and reached and not any(m and m.activation.module in unlike for m in moments[target.name])
        yield target, sides if reached else None, crosses if known else None


def _moments(target: Target) -> list[Moment]:
    return [Moment(activation) for activation in target.inputs() if activation is not None]


def _features(
    model: nn.Module, wanted: Sequence[Moment], masks: Sequence[Tensor], run: Callable[[], Tensor]
) -> dict[Moment, Tensor]:
    """What each moment is of, in one call of a block, which ends once all of it is there."""
    found: dict[Moment, list[Tensor]] = {}
    with contextlib.ExitStack() as stack:
        seen = stack.enter_context(stopped_after(len(wanted)))

        def take(moment: Moment, module: nn.Module, value: Tensor) -> None:
            first = moment not in found
            found.setdefault(moment, []).append(moment.features(module, value, masks))
            if first:
                seen()

        for moment in wanted:
            stack.callback(moment.hook(model, partial(take, moment)).remove)
        run()
    return {moment: torch.cat(several, -2) for moment, several in found.items()}
