"""Which products of heads can have another rank from one step to the next, and why the others keep theirs."""

from collections import Counter
from collections.abc import Mapping

from torch import nn

from .leaf import HeadLinear
from .product import HeadProduct

ROTARY = "rotary positions stand between queries and keys"
FULL = "heads have their full width (a head_rank below 1, such as 0.5, makes them narrower)"
OWN_BIAS = "a bias is a parameter of the attention module itself, outside the layers of factors"
FROZEN = "not all factors train"
SHARED = "weights are those of another layer too"
PARTLY = "one weight holds these heads and others, which are no factors of a rank that adapts"

Places = Mapping[str, tuple[HeadProduct, nn.Module]]  # name -> (the declaration, the module that holds it)


def heads_that_keep_their_rank(model: nn.Module) -> dict[str, str]:
    """name of a product -> why its rank cannot adapt.

    Bases of heads are frozen while their cores train. So all that a weight holds must be such bases.

    Raises:
        ValueError: A product is compact.
    """
    named = dict(model.named_modules())
    places = {
        name: (module, named[name.rpartition(".")[0]])
        for name, module in named.items()
        if isinstance(module, HeadProduct)
    }
    if compact := next((name for name, (product, _) in places.items() if product.replaced is not None), None):
        raise ValueError(
            f"rank_adaptation changes the rank of heads, but those of {compact} are compact: their attention module "
            'has been told how wide they are; factorize with FNLConfig(head_layout="padded")'
        )
    reasons = {name: reason for name, place in places.items() if (reason := _obstacle(*place))}
    uses = Counter(id(p) for module in named.values() for p in module._parameters.values())
    for name, (product, parent) in places.items():
        if name not in reasons and any(uses[id(leaf.weight)] > 1 for leaf in _leaves(product, parent)):
            reasons[name] = SHARED
    while True:
        free = {name: place for name, place in places.items() if name not in reasons}
        if not (partly := _in_shared_weights(free)):
            return reasons
        reasons |= dict.fromkeys(partly, PARTLY)


def _obstacle(product: HeadProduct, parent: nn.Module) -> str | None:
    """What keeps a product by itself from adapting."""
    if product.rotary is not None:
        return ROTARY
    leaves = _leaves(product, parent)
    if not all(isinstance(leaf, HeadLinear) for leaf in leaves) or (
        product.rank == product.head_dim and not product.deep
    ):
        return FULL
    if any(side.bias_width is not None for side in (product.left, product.right)):
        return OWN_BIAS
    if product.deep:
        trains = getattr(leaves[1], product.core).requires_grad
    else:
        trains = all(leaf.weight.requires_grad for leaf in leaves)
    return None if trains else FROZEN


def _in_shared_weights(places: Places) -> list[str]:
    """The names of products in a weight of which they are not the whole."""
    covered: Counter[tuple[nn.Module, str]] = Counter()  # (leaf, axis) -> features that such products read
    for product, parent in places.values():
        for side, leaf in zip((product.left, product.right), _leaves(product, parent), strict=True):
            covered[leaf, side.axis] += side.size * product.rank
    return [
        name
        for name, (product, parent) in places.items()
        for side, leaf in zip((product.left, product.right), _leaves(product, parent), strict=True)
        if covered[leaf, side.axis] < leaf.weight.shape[side.axis == "in"]
    ]


def _leaves(product: HeadProduct, parent: nn.Module) -> list[nn.Module]:
    return [product.leaf(parent, side) for side in (product.left, product.right)]
