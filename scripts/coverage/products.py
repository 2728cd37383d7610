"""What fnl_hf finds in a model, what it would factorize, and what its proof says: the only module that asks fnl_hf."""

import collections
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import fnl_hf
from fnl_hf.heads import find_attention
from fnl_hf.outputs import outputs_of
from fnl_hf.planning import plan
from fnl_hf.proof import Evidence, prove


def attention_names(model: nn.Module) -> list[str]:
    """Names of the modules that are found to be attention."""
    return [site.name for site in find_attention(model)]


def proven_products(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The products found in a model, with these inputs and without: five entries of a type's row.

    "products" counts those that are proven on the inputs by kind, "by default" how many of these are found without any
    inputs, "claimed" all that are found without. "skipped" lists reasons, with inputs. "wrong" are products claimed
    without inputs that a change of basis in the whole model refutes (of a model that gives the same twice).
    """
    config = fnl_hf.FNLConfig()
    claimed, proven = plan(model, config).targets, plan(model, config, inputs)
    runs = [outputs_of(model, inputs) for _ in range(2)]
    repeats = all(map(torch.equal, *runs))  # else no change of the whole model says anything
    verdicts = prove(Evidence(model, inputs, {t.name for t in claimed}), [t.found for t in claimed]).verdicts
    here = {(target.name, target.kind) for target in claimed}
    return {
        "products": collections.Counter(target.kind for target in proven.targets),
        "by default": collections.Counter(t.kind for t in proven.targets if (t.name, t.kind) in here),
        "claimed": collections.Counter(target.kind for target in claimed),
        "skipped": sorted({f"{skip.kind}: {skip.reason}" for skip in proven.skipped}),
        "wrong": [str(verdict) for verdict in verdicts if repeats and not verdict.exact and not verdict.reason],
    }
