"""What the structure of an attention module shows: its projections by role, its heads, and what stands between them.

Read from names, shapes and the names that its forward uses; nothing is run.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from .slices import HeadSlice

_FILLER = {"proj", "projection", "project", "lin", "linear", "dense", "fc", "layer", "head", "to", "w", "c"}
_FILLER |= {"self", "attn", "attention"}
_ROLES = {
    "q": {"q", "query", "queries", "wq"},
    "k": {"k", "key", "keys", "wk"},
    "v": {"v", "value", "values", "wv"},
    "o": {"o", "out", "output", "wo", "post", "final", ""},
    "qkv": {"qkv", "query_key_value", "in", "wqkv"},
    "kv": {"kv", "key_value", "keys_values"},
    "q_b": {"q_b"},
    "kv_b": {"kv_b"},
}
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_attn_heads", "n_heads", "n_head", "heads", "nhead")


@dataclass(frozen=True)
class Leaf:
    """A projection below the module that was searched: the names of its parameters and its shape."""

    weight: str
    bias: str | None
    out: int
    inp: int
    transposed: bool = False
    convolution: bool = False

    def rows(self, heads: tuple[int, ...], width: int, **place) -> HeadSlice:
        """Its output features as heads."""
        return HeadSlice(self.weight, self.bias, "out", heads, width, transposed=self.transposed, **place)


def roles_of(module: nn.Module) -> dict[str, Leaf]:
    """role -> projection among the children of a module; the first of a role wins."""
    roles: dict[str, Leaf] = {}
    for name, child in module.named_children():
        if (role := _role(name)) and (leaf := _leaf(name, child)):
            roles.setdefault(role, leaf)
    fused = getattr(module, "in_proj_weight", None)
    if isinstance(module, nn.MultiheadAttention) and fused is not None:
        bias = None if module.in_proj_bias is None else "in_proj_bias"
        roles["qkv"] = Leaf("in_proj_weight", bias, *fused.shape)
    return roles


def _role(name: str) -> str | None:
    if name == "c_attn":  # "attn" is a filler elsewhere
        return "qkv"
    words = [word for word in re.split(r"[_\W]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()) if word]
    rest = "_".join(word for word in words if word not in _FILLER)
    return next((role for role, names in _ROLES.items() if rest in names), None)


def _leaf(path: str, module: nn.Module) -> Leaf | None:
    """The projection that a child is, or that it thinly wraps (a Sequential of one Linear and a Dropout)."""
    if isinstance(module, (nn.Linear, Conv1D)) and isinstance(module.weight, nn.Parameter):
        transposed = isinstance(module, Conv1D)
        out, inp = reversed(module.weight.shape) if transposed else module.weight.shape
        bias = f"{path}.bias" if module.bias is not None else None
        return Leaf(f"{path}.weight", bias, out, inp, transposed)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and set(module.kernel_size) == {1} and module.groups == 1:
        bias = f"{path}.bias" if module.bias is not None else None
        return Leaf(f"{path}.weight", bias, module.out_channels, module.in_channels, convolution=True)
    leaves = [leaf for name, child in module.named_children() if (leaf := _leaf(f"{path}.{name}", child))]
    thin = isinstance(module, (nn.ModuleList, nn.Sequential)) or len(list(module.parameters())) <= 2
    return leaves[0] if thin and len(leaves) == 1 else None


def output_candidates(model: nn.Module, name: str, module: nn.Module) -> Iterator[tuple[int, Leaf]]:
    """(levels up, leaf with its path below that ancestor) of what may be the output projection, nearest first."""
    parts = name.split(".") if name else []
    for up in range(min(2, len(parts)) + 1):
        ancestor = model.get_submodule(".".join(parts[: len(parts) - up]))
        if isinstance(ancestor, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            return
        for child_name, child in ancestor.named_children():
            if _role(child_name) != "o" or (up and child_name == parts[len(parts) - up]):
                continue
            if leaf := _leaf(child_name, child):
                yield up, leaf
            elif up:  # BERT's output.dense
                for grandchild_name, grandchild in child.named_children():
                    leaf = _leaf(f"{child_name}.{grandchild_name}", grandchild)
                    if leaf and _role(grandchild_name) == "o":
                        yield up, leaf


def head_counts(module: nn.Module) -> list[int]:
    """Candidates for the number of query heads: the module's own, else those of its config."""
    for owner in (module, getattr(module, "config", None)):
        counts = [n for name in _HEAD_COUNTS if isinstance(n := _read_number(owner, name), int)]
        if counts:
            return list(dict.fromkeys(counts))
    return []


def first_number(module: nn.Module, names: tuple[str, ...]) -> float | None:
    """The first of these attributes on a module, its config or that's rotary parameters."""
    config = getattr(module, "config", None)
    rope = getattr(config, "rope_parameters", None) or {}
    owners = [module, config, rope, *(rope.values() if isinstance(rope, dict) else ())]
    return next((n for owner in owners for name in names if (n := _read_number(owner, name))), None)


def _read_number(owner: object, name: str) -> float | None:
    try:
        value = owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)
    except Exception:  # a heterogeneous config raises an error of its own for a per-layer attribute
        return None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else None


def _code_names(module: nn.Module) -> set[str]:
    """Names that a module's forward uses, its own methods included."""
    cls, names, seen, queue = type(module), set(), set(), ["forward"]
    while queue:
        method = queue.pop()
        function = getattr(cls, method, None)
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        code = getattr(function, "__code__", None)
        if code is None or method in seen:
            continue
        seen.add(method)
        names |= set(code.co_names) | set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
        queue += [name for name in code.co_names if not hasattr(nn.Module, name) and callable(getattr(cls, name, None))]
    return names


def between_q_and_k(module: nn.Module) -> str | None:
    """Why Q_hᵀK_h may not be what the scores use, from names: what stands between."""
    for name, child in module.named_children():
        words = set(re.split(r"[_\W]+", name.lower()))
        if ("Norm" in type(child).__name__ or "norm" in name) and words & {"q", "k", "query", "key", "qk"}:
            return f"{name} normalises queries and keys: the scores do not depend on the product's scale"
    names = _code_names(module)
    if rotary := sorted(n for n in names if re.search(r"rotary|rope|position_embeddings|freqs_cis|apply_rot", n)):
        return f"rotary positions ({rotary[0]}) stand between queries and keys"
    relative = r"distance_embed|pos_bias|position_bias|rel_pos|_r_bias|relative_k|pos_key"
    if relative := sorted(n for n in names if re.search(relative, n)):
        return f"relative positions ({relative[0]}) are added to queries or keys"
    return None


def between_v_and_o(module: nn.Module) -> str | None:
    """Why O_h V_h may not be what the model applies, from names: what stands between."""
    for name, child in module.named_children():
        words = set(re.split(r"[_\W]+", name.lower()))
        if "Norm" in type(child).__name__ and words & {"v", "value", "sub", "subln", "inner", "o"}:
            return f"{name} normalises between values and output"
        if words & {"gate", "g"} and list(child.parameters()):
            return f"{name} gates what the output projection reads"
    return None
