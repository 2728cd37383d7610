"""Which attention modules get another form for inference: really narrower heads, or ordinary projections."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from ..factorization import swap
from ..plan import Skip
from ..replay import under_its_name
from ..trial import DENSE, Trial
from .leaf import HeadLinear
from .target import HeadTarget, _compacted, _in_one_attention, _submodule

COMPOSED = "composed for inference: nothing is faster than the ordinary projections"


def quickened(model: nn.Module, targets: Sequence[HeadTarget], trial: Trial) -> list[Skip]:
    """Put each attention module with narrow heads into its fastest form."""
    targets = _without_cores(model, targets)
    groups = _by_attention([target for target in targets if any(_narrow_leaves(model, target))])
    members = [target for group in groups.values() for target in group]
    proven = _proven_compact([target for target in members if target.compact is None], trial)
    calls, skipped = trial.calls(groups), []
    for owner, group in groups.items():
        changes: dict[str, Callable[[nn.Module], None]] = {}  # what saves most first, where times are the same
        if all(target.name in proven for target in group):
            changes["compact"] = partial(_make_compact, [proven[target.name] for target in group])
        changes |= {"kept": lambda root: None, DENSE: partial(_make_dense, group)}
        forms = {form: partial(_changed, model, owner, change) for form, change in changes.items()}
        form = trial.fastest(owner, forms, calls[owner])
        if form is not None:
            changes[form](model)
        if form == DENSE:
            skipped += [Skip(target.name, target.kind, COMPOSED) for target in group]
    return skipped


def _without_cores(model: nn.Module, targets: Sequence[HeadTarget]) -> list[HeadTarget]:
    """The targets, those that are deep with their cores merged into keys and values."""
    deep = [target for target in targets if target.deep]
    leaves = {leaf: leaf.merged() for target in deep for leaf in _narrow_leaves(model, target) if leaf.cores}
    swap(model, leaves)
    for target in deep:
        getattr(model.get_submodule(target.owner), target.slot).deep = False
    whole = {leaf: leaf.dense() for t in deep for leaf in _narrow_leaves(model, t) if not leaf.is_narrow()}
    swap(model, whole)
    return [replace(target, deep=False) for target in targets]


def _narrow_leaves(root: nn.Module, target: HeadTarget) -> list[HeadLinear]:
    leaves = (_submodule(root, target.leaf(side)) for side in target.sides)
    return [leaf for leaf in leaves if isinstance(leaf, HeadLinear)]


def _by_attention(targets: Sequence[HeadTarget]) -> dict[str, list[HeadTarget]]:
    """Name of an attention module -> the products in it."""
    groups: dict[str, list[HeadTarget]] = {}
    for target in sorted(targets, key=lambda target: target.slot == "qk"):  # those of values first, which lie around
        around = (
            name for name, (first, *_) in groups.items() if target.slot == "qk" and _in_one_attention(first, target)
        )
        groups.setdefault(next(around, target.owner), []).append(target)
    return groups


def _proven_compact(padded: Sequence[HeadTarget], trial: Trial) -> dict[str, HeadTarget]:
    """The products whose heads can be really narrower, with what their module must be told, by their names."""
    if not padded:
        return {}
    names, leaves = {t.name for t in padded}, {t.leaf(side) for t in padded for side in t.sides}
    settled = _compacted(trial.dense, list(padded), trial.evidence(names, leaves))
    return {target.name: target for target in settled if target.compact is not None}


def _changed(model: nn.Module, name: str, change: Callable[[nn.Module], None]) -> nn.Module:
    """A copy of a module with the same parameters, changed as if it lay in the model."""
    module = model.get_submodule(name)
    root = under_its_name(name, copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()}))
    change(root)
    return root.get_submodule(name)


def _make_compact(group: Sequence[HeadTarget], root: nn.Module) -> None:
    """Tell narrow leaves, and the module around them, that heads are as wide as they are stored."""
    for target in group:
        for leaf in _narrow_leaves(root, target):
            leaf.make_compact()
        owner = root.get_submodule(target.owner)
        declaration = getattr(owner, target.slot)
        declaration.replaced = {name: getattr(owner, name) for name in target.compact}
        declaration.planned = replace(declaration.planned, compact=target.compact)
        for name, value in target.compact.items():
            setattr(owner, name, value)


def _make_dense(group: Sequence[HeadTarget], root: nn.Module) -> None:
    """Ordinary projections without declarations."""
    swap(root, {leaf: leaf.dense() for target in group for leaf in _narrow_leaves(root, target)})
    for target in group:
        owner = root.get_submodule(target.owner)
        getattr(owner, target.slot).withdraw(owner)
        delattr(owner, target.slot)
