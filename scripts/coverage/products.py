"""What fnl_hf finds in a model, what it would factorize, and what its proof says: the only module that asks fnl_hf."""

import collections
from collections.abc import Mapping
from typing import Any

from torch import nn

import fnl_hf
from fnl_hf.heads import find_attention
from fnl_hf.planning import plan
from fnl_hf.proof import Evidence, prove
from fnl_hf.replay import UNREACHED


def attention_names(model: nn.Module) -> list[str]:
    """Names of the modules that are found to be attention."""
    return [site.name for site in find_attention(model)]


def proven_products(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The products found in a model, with these inputs and without: five entries of a type's row.

    "products" counts those that are proven on the inputs by kind, "by default" how many of these are found without any
    inputs, "claimed" all that are found without. "skipped" lists reasons, with inputs. "wrong" are products claimed
    without inputs that a change of basis in the whole model refutes, or a replay of their module where the model does
    not execute it.
    """
    config = fnl_hf.FNLConfig()
    claimed, proven = plan(model, config).targets, plan(model, config, inputs)
    verdicts = prove(Evidence(model, inputs, {t.name for t in claimed}), [t.found(model) for t in claimed]).verdicts
    here = {(target.name, target.kind) for target in claimed}
    return {
        "products": collections.Counter(target.kind for target in proven.targets),
        "by default": collections.Counter(t.kind for t in proven.targets if (t.name, t.kind) in here),
        "claimed": collections.Counter(target.kind for target in claimed),
        "skipped": sorted({f"{skip.kind}: {skip.reason}" for skip in proven.skipped}),
        "wrong": [str(v) for v in verdicts if not v.exact and v.reason != UNREACHED],
    }
