"""What fnl_hf finds in a model, what it would factorize, and what its probe says: the only module that asks fnl_hf."""

import collections
from collections.abc import Mapping
from typing import Any

from torch import nn

import fnl_hf
from fnl_hf.attention import find_attention
from fnl_hf.planning import plan
from fnl_hf.probe import UNREACHED, Recording


def attention_names(model: nn.Module) -> list[str]:
    """Names of the modules that are found to be attention."""
    return [site.name for site in find_attention(model)]


def proven_products(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The products found in a model and probed on these inputs: four entries of a type's row.

    "products" counts the proven ones by kind, "skipped" lists reasons, "wrong" the products that are claimed without
    inputs although the probe refutes them, and "found without inputs" says whether inputs were needed for none.
    """
    config = fnl_hf.FNLConfig()
    claimed, _ = plan(model, config)
    proven, skipped = plan(model, config, inputs)
    recording = Recording(model, inputs, {product.owner for product in claimed})
    verdicts = [
        recording.verdict(
            product.owner,
            product.name,
            fnl_hf.HeadProduct(product.kind, product.left, product.right, product.left.width, product.rotary),
        )
        for product in claimed
    ]
    return {
        "products": collections.Counter(product.kind for product in proven),
        "skipped": sorted({f"{entry['kind']}: {entry['reason']}" for entry in skipped}),
        "wrong": [str(v) for v in verdicts if not v.exact and v.reason != UNREACHED],
        "found without inputs": {(p.name, p.kind) for p in proven} <= {(p.name, p.kind) for p in claimed},
    }
