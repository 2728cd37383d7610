"""What `factorize` would do to a model: which products, at which ranks, and what is skipped and why."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .attention import Site, find_attention
from .config import FNLConfig
from .factorization import HeadProduct
from .heads import Product
from .probe import ProbeError, Recording, record_examples

KEPT = "a narrower basis does not commute with a rotation, and only the heads of nn.Linear and Conv1D can be narrowed"


def plan(
    model: nn.Module, config: FNLConfig, inputs: Mapping | None = None
) -> tuple[list[Product], list[dict[str, str]]]:
    """What ``factorize`` would do: the products with their ranks, and {"name", "kind", "reason"} of what is skipped.

    Where structure does not decide (fused layouts, rotary positions), or everywhere if ``inputs`` are given, the first
    option of a site that the probe finds exact is taken.
    """
    sites = find_attention(model)
    choices = [(site, slot) for site in sites for slot in config.attention if site.options[slot] or slot in site.doubts]
    probed = [(site, slot) for site, slot in choices if inputs is not None or slot not in site.certain]
    compact = config.head_layout == "compact"
    owners = {option.owner for site, slot in (choices if compact else probed) for option in site.options[slot]}
    recording, obstacle = None, ""
    if owners:
        try:
            recording = record_examples(model, owners) if inputs is None else Recording(model, inputs, owners)
        except ProbeError as error:
            if inputs is not None:
                raise
            obstacle = f"{error}; pass factorize(..., verify=example_inputs) to decide"
    products, skipped, kept = {}, [], []
    for site, slot in choices:
        if (site, slot) in probed:
            product, reason = _probed(recording, site, slot, obstacle)
        else:
            product, reason = site.options[slot][0], None
        if product is None:
            skipped.append({"name": site.name, "kind": slot, "reason": reason})
            continue
        rank = config.head_rank_of(site.name, product.left.width)
        if rank < product.left.width and not _narrows(model, product):
            kept.append(product.kind)
        else:
            product = replace(product, rank=rank)
        products[site.name, slot] = product
    if compact and recording:
        _compact(recording, products)
    products = list(products.values())
    if products and len(kept) == len(products):
        raise ValueError(
            f"head_rank is {config.head_rank}, but every product found ({', '.join(sorted(set(kept)))}) keeps its full "
            f"rank: {KEPT}; leave head_rank at 1.0"
        )
    return products, skipped


def _compact(recording: Recording, products: dict[tuple[str, str], Product]) -> None:
    """Plan really narrower heads for the attention modules where both products agree and a replay proves them."""
    for site in {name for name, _ in products}:
        qk, ov = products.get((site, "qk")), products.get((site, "ov"))
        if qk and ov and qk.rank == ov.rank < qk.left.width == ov.left.width:
            attributes = recording.compact_attributes(qk, ov)
            if attributes is not None:
                products[site, "qk"], products[site, "ov"] = replace(qk, compact=attributes), replace(ov, compact={})


def _narrows(model: nn.Module, product: Product) -> bool:
    """Whether the heads of a product can have a lower rank: not under rotation, and only in ordinary leaves."""
    if product.rotary is not None:
        return False
    sides = (product.left, product.right)
    return all(_is_linear(_submodule(model, product.leaf(side))) for side in sides)


def _is_linear(leaf: nn.Module | None) -> bool:
    """An ``nn.Linear`` or ``Conv1D``, or a subclass that only writes the same product differently (Falcon's)."""
    if type(leaf) in (nn.Linear, Conv1D):
        return True
    if not isinstance(leaf, nn.Linear) or leaf.weight.shape != (leaf.out_features, leaf.in_features):
        return False
    x = torch.linspace(-1, 1, 3 * leaf.in_features, dtype=leaf.weight.dtype, device=leaf.weight.device).view(3, -1)
    with torch.no_grad():
        return torch.allclose(leaf(x), nn.functional.linear(x, leaf.weight, leaf.bias), rtol=1e-3, atol=1e-5)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # a parameter of the attention module itself, such as in_proj_weight
        return None


def _probed(recording: Recording | None, site: Site, slot: str, obstacle: str) -> tuple[Product | None, str | None]:
    """The first option that is exact, or why there is none."""
    verdict = None
    for option in site.options[slot] if recording else ():
        verdict = recording.verdict(option.owner, option.name, as_declared(option))
        if verdict.exact:
            return option, None
    doubt = site.doubts.get(slot, "")
    if verdict is None:
        return None, "; ".join(filter(None, (doubt, obstacle)))
    return None, verdict.reason or doubt or "something stands between its projections: the output does not follow them"


def as_declared(product: Product) -> HeadProduct:
    """The declaration of a product at full width."""
    return HeadProduct(product.kind, product.left, product.right, product.left.width, product.rotary)


def nothing_found(model: nn.Module, config: FNLConfig, skipped: list[dict]) -> str:
    """Why a plan is empty, in words for the user."""
    wanted = " and ".join(config.attention) or "nothing (attention=())"
    reasons = "; ".join(sorted({f"{s['kind']}: {s['reason']}" for s in skipped}))
    why = (
        f"skipped {reasons}" if reasons else "no module has query, key, value and output projections that fit together"
    )
    return f"{type(model).__name__} has no product to factorize; asked for {wanted}: {why}"
