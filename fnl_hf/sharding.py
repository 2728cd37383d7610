"""Grams and decay of sharded parameters (FSDP2), without gathering the factors.

Under `fully_shard` a parameter is a DTensor that holds some rows of the weight on each process. Where rows are a
factor's outer dimension (output projections), the sum of the shards' Grams is the Gram. Where rows are the features of
heads (queries, keys, values), a shard of whole heads holds their Grams, and zero for all others. So each process takes
the Grams of its own rows, padded with zeros to the shape of the weight, one all-reduce of r x r matrices makes them
those of the model, and each process multiplies its own rows by them. Only a weight whose shards cut a head in two is
gathered, one at a time.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from .factorization import Factorization, View


def is_sharded(product: Factorization) -> bool:
    """Whether a factor of the product is a DTensor."""
    return any(isinstance(view.parameter, DTensor) for view in product.views)


def grams(products: Sequence[Factorization]) -> list:
    """``form.decay_grams`` of whole factors, for products of sharded ones; one all-reduce for all of them.

    Raises:
        ValueError: A parameter that is not sharded by rows alone, as under tensor parallelism; a chain of another
            length than two, whose inner Grams are not sums over shards.
    """
    for product in products:
        if product.form.has_matrix and len(product.views) != 2:
            raise ValueError(
                f"{product.name} has {len(product.views)} factors: sharded products are supported with two; set "
                "frobenius_decay to 0, or train without FSDP"
            )
    local = [product.form.decay_grams([_share(view) for view in product.views]) for product in products]
    for group, leaves in _by_group(products, local):
        flat = torch.cat([leaf.flatten() for leaf in leaves])
        dist.all_reduce(flat, group=group)
        for leaf, values in zip(leaves, flat.split([leaf.numel() for leaf in leaves]), strict=True):
            leaf.copy_(values.view_as(leaf))
    return local


def decay_gradients(products: Sequence[Factorization], of_products: Sequence) -> dict[nn.Parameter, DTensor]:
    """parameter -> gradient of ½ Σ squared_norm, sharded as the parameter; ``of_products`` is what ``grams`` gave."""
    shards: dict[nn.Parameter, Tensor] = {}
    for product, of_product in zip(products, of_products, strict=True):
        gradients = product.form.decay_gradients([_padded(view) for view in product.views], of_product)
        for view, gradient in zip(product.views, gradients, strict=True):
            parameter = view.parameter
            if parameter.requires_grad:
                whole = gradient.new_zeros(parameter.shape)
                view.read(whole).copy_(gradient)
                shard = whole[own_rows(parameter)]
                shards[parameter] = shards[parameter].add_(shard) if parameter in shards else shard.clone()
    return {parameter: _like(parameter, shard) for parameter, shard in shards.items()}


def _by_group(products: Sequence[Factorization], local: Sequence) -> Iterator[tuple[dist.ProcessGroup, list[Tensor]]]:
    """The processes that shard a parameter together, and the Grams to sum over them."""
    groups: dict[dist.ProcessGroup, list[Tensor]] = {}
    for product, of_product in zip(products, local, strict=True):
        parameter = next(view.parameter for view in product.views if isinstance(view.parameter, DTensor))
        groups.setdefault(parameter.device_mesh.get_group(_shard_axis(parameter)), []).extend(_leaves(of_product))
    yield from groups.items()


def _leaves(of_product) -> Iterator[Tensor]:
    """The tensors in what ``decay_grams`` returns, whichever the form."""
    if isinstance(of_product, Tensor):
        yield of_product
    elif isinstance(of_product, Iterable):
        for part in of_product:
            yield from _leaves(part)


def _share(view: View) -> Tensor:
    """The factor as this process counts it into the Grams: over all processes, every row exactly once."""
    factor = _padded(view)
    if not _cuts_heads(view):
        return factor  # zero but for the process's own rows
    first = view.parameter.device_mesh.get_local_rank(_shard_axis(view.parameter)) == 0
    return factor if first else torch.zeros_like(factor)


def _padded(view: View) -> Tensor:
    """The factor with the process's own rows, and zeros for the others'; whole where shards cut its heads."""
    parameter = view.parameter
    if _cuts_heads(view):
        return view.read(parameter.full_tensor())
    shard = parameter.to_local()
    whole = shard.new_zeros(parameter.shape)
    whole[own_rows(parameter)] = shard
    return view.read(whole)


def _cuts_heads(view: View) -> bool:
    """Whether some head has its features on more than one process."""
    parameter, processes = view.parameter, view.parameter.device_mesh.size(_shard_axis(view.parameter))
    owners = torch.arange(parameter.shape[0]) // _chunk(parameter.shape[0], processes)
    owners = owners.view(-1, *[1] * (parameter.dim() - 1)).expand(parameter.shape)
    # What differs along a factor's outer dimension are not features: one entry shows all of them.
    features = view.read(owners).narrow(view.outer, 0, 1)
    axis = -1 if view.outer == -2 else -2
    return bool((features.amin(axis) != features.amax(axis)).any())


def own_rows(parameter: DTensor) -> slice:
    """The rows of the process's own shard."""
    axis = _shard_axis(parameter)
    chunk = _chunk(parameter.shape[0], parameter.device_mesh.size(axis))
    start = min(parameter.device_mesh.get_local_rank(axis) * chunk, parameter.shape[0])
    return slice(start, start + parameter.to_local().shape[0])


def _chunk(rows: int, processes: int) -> int:
    """Rows of a shard; the last ones may have fewer (as ``torch.chunk``)."""
    return -(-rows // processes)


def _shard_axis(parameter: DTensor) -> int:
    """The dimension of the mesh along which rows are sharded; along others (HSDP) they are replicated."""
    if not isinstance(parameter, DTensor):
        raise ValueError("one factor of a product is sharded and another is not: shard both, or none")
    by_rows = [axis for axis, placement in enumerate(parameter.placements) if placement == Shard(0)]
    others = [placement for placement in parameter.placements if placement not in (Shard(0), Replicate())]
    if len(by_rows) != 1 or others:
        raise ValueError(
            f"Frobenius decay reads parameters that are sharded by rows (FSDP2's fully_shard), got placements "
            f"{tuple(parameter.placements)}: leave factorized layers out of tensor parallelism"
        )
    return by_rows[0]


def _like(parameter: DTensor, shard: Tensor) -> DTensor:
    return DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip
