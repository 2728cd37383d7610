"""What fnl_hf finds in a model, what it would factorize, and what its probe says: the only module that asks fnl_hf."""

import collections
from collections.abc import Mapping
from typing import Any

from torch import nn

import fnl_hf
from fnl_hf.heads import find_attention
from fnl_hf.planning import plan
from fnl_hf.proof import UNREACHED, Recording


def attention_names(model: nn.Module) -> list[str]:
    """Names of the modules that are found to be attention."""
    return [site.name for site in find_attention(model)]


def proven_products(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The products found in a model and probed on these inputs: four entries of a type's row.

    "products" counts the proven ones by kind, "skipped" lists reasons, "wrong" the products that are claimed without
    inputs although the probe refutes them, and "found without inputs" says whether inputs were needed for none.
    """
    config = fnl_hf.FNLConfig()
    claimed, proven = plan(model, config).targets, plan(model, config, inputs)
    recording = Recording(model, inputs, {target.owner for target in claimed})
    verdicts = [recording.verdict(target.name, target.kind, target.found) for target in claimed]
    return {
        "products": collections.Counter(target.kind for target in proven.targets),
        "skipped": sorted({f"{skip.kind}: {skip.reason}" for skip in proven.skipped}),
        "wrong": [str(v) for v in verdicts if not v.exact and v.reason != UNREACHED],
        "found without inputs": {(t.name, t.kind) for t in proven.targets} <= {(t.name, t.kind) for t in claimed},
    }
