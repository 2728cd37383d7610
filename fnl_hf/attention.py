"""Finds softmax attention in any Hugging Face model, by structure: no table of models.

A site is a module with q, k and v projections (or one fused projection) and an output projection of its own or of its
parent. Roles come from the children's names with filler words dropped, and only what closes in shape counts:
q_out = H·d, k_out = G·d, v_out = G·dv, o_in = H·dv with H divisible by G. What looks like attention but is not
understood is left alone and reported with the reason.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from .factorization import HeadSlice
from .heads import Product

_FILLER = {"proj", "projection", "lin", "linear", "dense", "to", "layer", "w", "c", "self", "attn", "attention", "fc"}
_ROLES = {
    "q": {"q", "query", "queries", "wq"},
    "k": {"k", "key", "keys", "wk"},
    "v": {"v", "value", "values", "wv"},
    "o": {"o", "out", "output", "wo", ""},
    "qkv": {"qkv", "query_key_value", "in", "wqkv", "mixed_qkv"},
    "kv": {"kv", "key_value"},
}
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_HEAD_DIMS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_per_head", "d_head")


@dataclass(frozen=True)
class Leaf:
    """A projection: its path below the module that was searched, and its shape as (out, in)."""

    path: str
    module: nn.Module
    out: int
    inp: int
    transposed: bool

    @property
    def bias(self) -> bool:
        return self.module.bias is not None


@dataclass
class Site:
    """One attention module: the products found in it, at full rank, and what was skipped and why."""

    name: str
    products: list[Product] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (kind, reason)


def find_attention(model: nn.Module) -> list[Site]:
    """Every attention site of a model, in module order; shared modules once.

    Sites whose products are all skipped are listed too, so that ``summary`` can say why.
    """
    return list(_sites(model))


def _sites(model: nn.Module) -> Iterator[Site]:
    for name, module in model.named_modules():
        roles = _roles(module)
        if not ({"q", "k", "v"} <= roles.keys() or "qkv" in roles):
            continue
        site = Site(name)
        heads = _head_count(module)
        outputs = list(_output_candidates(model, name, module))
        if heads is None:
            site.skipped = [
                (kind, "the number of heads is not to be found on the module or its config") for kind in ("qk", "ov")
            ]
        elif not {"q", "k", "v"} <= roles.keys():
            _add_fused(site, module, roles["qkv"], heads, outputs)
        else:
            _add_separate(site, module, roles, heads, outputs)
        if site.products or site.skipped:
            yield site


def _add_separate(site, module, roles, heads, outputs) -> None:
    """Products of separate q, k and v projections."""
    q, k, v = roles["q"], roles["k"], roles["v"]
    d = _first_int(module, _HEAD_DIMS)
    if not d or q.out != heads * d:
        d = q.out // heads
    groups = k.out // d if d else 0
    if not d or q.out != heads * d or not groups or k.out != groups * d or heads % groups or v.out % groups:
        return  # does not close: some other module that happens to have such names
    dv = v.out // groups
    batch = ((heads,), (heads,)) if groups == heads else ((groups, heads // groups), (groups, 1))
    if reason := _between_q_and_k(module):
        site.skipped.append(("qk", reason))
    else:
        left = HeadSlice(f"{q.path}.weight", _bias(q), "out", batch[0], d, transposed=q.transposed)
        right = HeadSlice(f"{k.path}.weight", _bias(k), "out", batch[1], d, transposed=k.transposed)
        site.products.append(Product(site.name, "qk", left, right, d))
    right = HeadSlice(f"{v.path}.weight", _bias(v), "out", batch[1], dv, transposed=v.transposed)
    _add_output(site, module, heads, dv, batch[0], right, outputs)


def _add_fused(site, module, fused, heads, outputs) -> None:
    """Products of one fused projection whose blocks are [q, k, v]."""
    if not fused.transposed:
        site.skipped += [
            (kind, "q, k and v are fused in one Linear whose layout is not known") for kind in ("qk", "ov")
        ]
        return
    d = fused.out // (3 * heads)
    if fused.out != 3 * heads * d:
        return
    q, k, v = (
        HeadSlice(f"{fused.path}.weight", _bias(fused), "out", (heads,), d, offset=i * heads * d, transposed=True)
        for i in range(3)
    )
    if reason := _between_q_and_k(module):
        site.skipped.append(("qk", reason))
    else:
        site.products.append(Product(site.name, "qk", q, k, d))
    _add_output(site, module, heads, d, (heads,), v, outputs)


def _add_output(site, module, heads, dv, batch, right, outputs) -> None:
    """The O/V product, declared on the common ancestor of v and o."""
    fitting = [(up, leaf) for up, leaf in outputs if leaf.inp == heads * dv]
    if not fitting:
        site.skipped.append(("ov", f"no output projection of {heads * dv} features beside the value projection"))
        return
    if reason := _between_v_and_o(module):
        site.skipped.append(("ov", reason))
        return
    up, leaf = fitting[0]
    parts = site.name.split(".") if site.name else []
    ancestor = ".".join(parts[: len(parts) - up])
    below = ".".join(parts[len(parts) - up :])
    path = f"{below}.{right.weight}" if below else right.weight
    bias = f"{below}.{right.bias}" if below and right.bias else right.bias
    right = replace(right, weight=path, bias=bias)
    left = HeadSlice(f"{leaf.path}.weight", None, "in", batch, dv, transposed=leaf.transposed)
    site.products.append(Product(ancestor, "ov", left, right, dv))


# ----------------------------------------------------------------------------------------------------


def _roles(module: nn.Module) -> dict[str, Leaf]:
    """role -> projection among the children of a module; the first of a role wins."""
    roles: dict[str, Leaf] = {}
    for name, child in module.named_children():
        if (leaf := _leaf(name, child)) and (role := _role(name)):
            roles.setdefault(role, leaf)
    return roles


def _role(name: str) -> str | None:
    if name == "c_attn":  # "attn" is a filler elsewhere
        return "qkv"
    words = [word for word in re.split(r"[_\W]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()) if word]
    rest = "_".join(word for word in words if word not in _FILLER)
    return next((role for role, names in _ROLES.items() if rest in names), None)


def _leaf(path: str, module: nn.Module) -> Leaf | None:
    """The projection that a child is, or that it thinly wraps (a Sequential of one Linear and a Dropout)."""
    if isinstance(module, nn.Linear):
        return Leaf(path, module, module.out_features, module.in_features, False)
    if isinstance(module, Conv1D):
        inp, out = module.weight.shape
        return Leaf(path, module, out, inp, True)
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        leaves = [_leaf(f"{path}.{name}", child) for name, child in module.named_children()]
        leaves = [leaf for leaf in leaves if leaf]
        return leaves[0] if len(leaves) == 1 else None
    return None


def _output_candidates(model: nn.Module, name: str, module: nn.Module) -> Iterator[tuple[int, Leaf]]:
    """(levels up, leaf with its path below that ancestor) of what may be the output projection, nearest first."""
    parts = name.split(".") if name else []
    for up in range(min(2, len(parts)) + 1):
        ancestor_name = ".".join(parts[: len(parts) - up])
        ancestor = model.get_submodule(ancestor_name)
        if up and isinstance(ancestor, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            return
        for child_name, child in ancestor.named_children():
            if up and child_name == parts[len(parts) - up]:
                continue
            if _role(child_name) != "o":
                continue
            if leaf := _leaf(child_name, child):
                yield up, leaf
            elif up:  # BERT's output.dense
                for grandchild_name, grandchild in child.named_children():
                    leaf = _leaf(f"{child_name}.{grandchild_name}", grandchild)
                    if leaf and _role(grandchild_name) == "o":
                        yield up, leaf


def _head_count(module: nn.Module) -> int | None:
    return _first_int(module, _HEAD_COUNTS) or _first_int(getattr(module, "config", None), _HEAD_COUNTS)


def _first_int(owner: object, names: tuple[str, ...]) -> int | None:
    for name in names:
        try:
            value = getattr(owner, name, None)
        except Exception:  # a heterogeneous config raises its own error for a per-layer attribute
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _bias(leaf: Leaf) -> str | None:
    return f"{leaf.path}.bias" if leaf.bias else None


def _code_names(module: nn.Module) -> set[str]:
    """Names that a module's forward uses, through its own methods one level down."""
    cls, names, queue = type(module), set(), ["forward"]
    while queue:
        function = getattr(cls, queue.pop(), None)
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        code = getattr(function, "__code__", None)
        if code is None:
            continue
        new = set(code.co_names) - names
        names |= new | set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
        queue += [name for name in new if not hasattr(nn.Module, name) and callable(getattr(cls, name, None))]
    return names


def _between_q_and_k(module: nn.Module) -> str | None:
    """Why Q_hᵀK_h is not what the scores use, if something stands between."""
    for name, child in module.named_children():
        words = set(re.split(r"[_\W]+", name.lower()))
        if "Norm" in type(child).__name__ and words & {"q", "k", "query", "key", "qk"}:
            return f"{name} normalises queries and keys: the scores do not depend on the product's scale"
    names = _code_names(module)
    if rotary := sorted(n for n in names if "rotary" in n or "rope" in n):
        return f"rotary positions ({rotary[0]}) stand between queries and keys"
    if relative := sorted(n for n in names if re.search(r"distance_embedding|pos_bias_u|rel_pos|r_w_bias", n)):
        return f"relative positions ({relative[0]}) are added to queries or keys"
    return None


def _between_v_and_o(module: nn.Module) -> str | None:
    """Why O_h V_h is not what the model applies, if something stands between."""
    for name, child in module.named_children():
        words = set(re.split(r"[_\W]+", name.lower()))
        if "Norm" in type(child).__name__ and words & {"v", "value", "sub", "subln", "inner"}:
            return f"{name} normalises between values and output"
        if words & {"gate", "g"} and isinstance(child, nn.Linear):
            return f"{name} gates what the output projection reads"
    return None
