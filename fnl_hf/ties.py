"""What shares its parameters, by their identity: a product whose factors serve elsewhere too must not change."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .factorization import Factorization, View
from .plan import Skip, Target


def without_shared(model: nn.Module, targets: Sequence[Target]) -> tuple[list[Target], list[Skip]]:
    """The targets whose factors nothing else in the model reads, and the others with what they are shared with.

    Targets of the very same factors (tied layers) are one product: they stay, and change together.
    """
    products = [target.found(model) for target in targets]
    shared = _overlapping(targets, products) | _used_elsewhere(model, targets, products)
    kept = [target for target in targets if target.name not in shared]
    if len(kept) < len(targets):  # what a dropped one was the other use of
        kept, more = without_shared(model, kept)
        return kept, [Skip(t.name, t.kind, f"shared with {shared[t.name]}") for t in targets if t.name in shared] + more
    return kept, []


def reads_one_weight_twice(product: Factorization) -> bool:
    """Whether two factors of a product share entries of a parameter, as queries that are tied to keys do."""
    pairs = ((one, other) for i, one in enumerate(product.views) for other in product.views[i + 1 :])
    return any(one.parameter is other.parameter and _overlap(one, other) for one, other in pairs)


def _overlapping(targets: Sequence[Target], products: Sequence[Factorization]) -> dict[str, str]:
    """name of a target -> the other target (or itself) whose factor reads the same entries of a parameter."""
    readers: dict[int, list[tuple[Target, tuple, View]]] = defaultdict(list)
    for target, product in zip(targets, products, strict=True):
        for view in product.views:
            readers[_memory(view.parameter)].append((target, _identity(product), view))
    shared = {}
    for several in readers.values():
        for i, (one, identity, view) in enumerate(several):
            for other, other_identity, other_view in several[i + 1 :]:
                tied = one is not other and identity == other_identity
                if not tied and _overlap(view, other_view):
                    shared.setdefault(one.name, other.name)
                    shared.setdefault(other.name, one.name)
    return shared


def _used_elsewhere(model: nn.Module, targets: Sequence[Target], products: Sequence[Factorization]) -> dict[str, str]:
    """name of a target -> a parameter's name under which no target of the same factors has it."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[_memory(parameter)].append(name)
    uses: dict[tuple, set[tuple]] = defaultdict(set)  # by identity, where its targets have each parameter
    for target, product in zip(targets, products, strict=True):
        uses[_identity(product)] |= {_place(model, target, path) for path in target.parameters()}
    shared = {}
    for target, product in zip(targets, products, strict=True):
        for path in target.parameters():
            for name in names[_memory(model.get_parameter(path))]:
                if not any(_stands_at(model, name, place) for place in uses[_identity(product)]):
                    shared.setdefault(target.name, name.rpartition(".")[0])
    return shared


def _place(model: nn.Module, target: Target, path: str) -> tuple[int, str]:
    """(the module that holds a target's declaration, the parameter's name below it)."""
    owner = target.name.rpartition(".")[0]
    return id(model.get_submodule(owner)), path.removeprefix(f"{owner}." if owner else "")


def _stands_at(model: nn.Module, name: str, place: tuple[int, str]) -> bool:
    """Whether a parameter's name leads through that module: one that is shared as a whole has several names."""
    owner, below = place
    if name != below and not name.endswith(f".{below}"):
        return False
    return id(model.get_submodule(name.removesuffix(below).removesuffix("."))) == owner


def _identity(product: Factorization) -> tuple:
    """The same for products that are one: of the same weights, and of the same biases."""
    return tuple(
        (_memory(view.parameter), view.offset, view.bias is not None and _memory(view.bias)) for view in product.views
    )


def _memory(tensor: Tensor) -> int:
    """Where a tensor lies: parameters may be several over one memory."""
    return id(tensor) if tensor.is_meta or not tensor.numel() else tensor.data_ptr()


def _overlap(one: View, other: View) -> bool:
    """Whether two views of one memory read an entry both."""
    if one.parameter.shape != other.parameter.shape:
        return True
    return all(bool(set(a) & set(b)) for a, b in zip(_extent(one), _extent(other), strict=True))


def _extent(view: View) -> list[list[int]]:
    """The indices that a view reads along each dimension of its parameter: what it reads is all their combinations."""
    shape = view.parameter.shape
    return [_indices(view.read(_counted(shape, axis))) for axis in range(len(shape))]


def _counted(shape: torch.Size, axis: int) -> Tensor:
    """A tensor of this shape, without memory of its own, that holds each entry's index along one dimension."""
    index = torch.arange(shape[axis])
    return index.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)


def _indices(read: Tensor) -> list[int]:
    for axis in reversed(range(read.dim())):
        if read.stride(axis) == 0:  # all the same
            read = read.select(axis, 0)
    return read.unique().tolist()
