"""Finds softmax attention in any Hugging Face model, by structure: no table of models.

A site is a module with q, k and v projections (separate, fused, or latent) and an output projection of its own or of
an ancestor. Roles come from the children's names with filler words dropped, and only what closes in shape counts:
q_out = H·d, k_out = G·d, v_out = G·dv, o_in = H·dv with H divisible by G.

Names cannot tell how heads lie inside a fused weight, nor what happens between queries and keys, or values and output.
So a site offers its possible products, the most general first; ``fnl_hf.proof`` tells them apart on a replay.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from ..config import FNLConfig
from ..plan import Candidate
from .slices import HeadSlice, RotaryLayout
from .structure import Leaf, between_q_and_k, between_v_and_o, first_number, head_counts, output_candidates, roles_of
from .target import HeadTarget

_UNCOUNTED = "the number of heads is not to be found on the module or its config"


@dataclass
class Site:
    """One attention module: per slot ("qk", "ov") the products that it may hold, the most general first.

    Attributes:
        doubts: slot -> what stands between, or why nothing fits, in words for the user.
    """

    name: str
    options: dict[str, list[HeadTarget]] = field(default_factory=lambda: {"qk": [], "ov": []})
    doubts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Layout:
    """One way to read the heads of q, k and v."""

    q: HeadSlice
    k: HeadSlice
    v: HeadSlice


def find_heads(model: nn.Module, config: FNLConfig) -> list[Candidate]:
    """The finder of this family: the products of every attention site, of the kinds that the config asks for, with
    their ranks."""
    return [
        Candidate(
            site.name,
            slot,
            tuple(
                replace(option, rank=config.head_rank_of((option.name, site.name), option.rank))
                for option in site.options[slot]
            ),
            doubt=site.doubts.get(slot, ""),
            optional="relative" in site.doubts.get(slot, ""),
        )
        for site in (find_attention(model) if config.attention else ())
        for slot in config.attention_kinds()
        if site.options[slot] or slot in site.doubts
    ]


def find_attention(model: nn.Module) -> list[Site]:
    """Every attention site of a model, in module order; shared modules once."""
    return [site for name, module in model.named_modules() if (site := _site(model, name, module))]


def options_at(model: nn.Module, name: str) -> list[HeadTarget]:
    """The products that the module of this name may hold; [] if it is no attention module."""
    site = _site(model, name, model.get_submodule(name))
    return [option for options in site.options.values() for option in options] if site else []


def _site(model: nn.Module, name: str, module: nn.Module) -> Site | None:
    roles = roles_of(module)
    if not _looks_like_attention(module, roles):
        return None
    site, heads = Site(name), head_counts(module)
    outputs = list(output_candidates(model, name, module))
    layouts = [layout for count in heads or [1] for layout in _layouts(module, roles, count, outputs)]
    if not heads:
        site.doubts = dict.fromkeys(("qk", "ov"), _UNCOUNTED)
    if not layouts:
        # Projections whose shapes do not close are something else; with an output beside them, worth a word.
        if outputs and roles.keys() & {"qkv", "q"}:
            site.doubts = dict.fromkeys(("qk", "ov"), "the shapes of its projections do not close into heads")
            return site
        return None
    layouts = [_with_own_biases(module, layout) for layout in layouts]
    _offer_qk(site, module, layouts)
    _offer_ov(site, module, layouts, outputs)
    return site


def _looks_like_attention(module: nn.Module, roles: dict[str, Leaf]) -> bool:
    found = {"q", "k", "v"} <= roles.keys() or "qkv" in roles or {"q", "kv"} <= roles.keys() or "kv_b" in roles
    # Linear attention and state-space mixers wear the same names, but have a short convolution or a decay.
    recurrent = any(hasattr(module, name) for name in ("conv1d", "A_log", "dt_bias"))
    return found and not recurrent and ("qkv" not in roles or bool(head_counts(module)))


# -- layouts -----------------------------------------------------------------------------------------


def _layouts(module: nn.Module, roles: dict[str, Leaf], heads: int, outputs: list) -> list[_Layout]:
    """The ways in which the projections may hold ``heads`` query heads; [] where shapes do not close."""
    if "kv_b" in roles and roles.keys() & {"q", "q_b"}:
        return _latent(module, roles.get("q_b") or roles["q"], roles["kv_b"], heads)
    if {"q", "k", "v"} <= roles.keys():
        return _separate(module, roles["q"], roles["k"], roles["v"], heads)
    if {"q", "kv"} <= roles.keys():
        return _fused_kv(roles["q"], roles["kv"], heads)
    return _fused(roles["qkv"], heads, outputs) if "qkv" in roles else []


def _separate(module: nn.Module, q: Leaf, k: Leaf, v: Leaf, heads: int) -> list[_Layout]:
    if q.out % heads:
        return []
    d = q.out // heads
    groups = k.out // d
    if not groups or k.out != groups * d or heads % groups or v.out % groups:
        return []
    query, shared = _batches(heads, groups)
    return [_Layout(q.rows(query, d), k.rows(shared, d), v.rows(shared, v.out // groups))]


def _fused_kv(q: Leaf, kv: Leaf, heads: int) -> list[_Layout]:
    d = q.out // heads
    groups = kv.out // (2 * d) if d else 0
    if not groups or q.out != heads * d or kv.out != 2 * groups * d or heads % groups:
        return []
    query, shared = _batches(heads, groups)
    left = q.rows(query, d)
    blocks = _Layout(left, kv.rows(shared, d), kv.rows(shared, d, offset=groups * d))
    inner = shared[1:]
    woven = _Layout(left, *(kv.rows(inner, d, repeats=groups, offset=i * d) for i in range(2)))
    return [blocks, woven]


def _fused(qkv: Leaf, heads: int, outputs: list) -> list[_Layout]:
    """[q, k, v] in blocks; per group [q…, k, v]; CodeGen's four parts of [q, v, k]. Which, only a probe can tell."""
    layouts = []
    for d in dict.fromkeys(leaf.inp // heads for _, leaf in outputs if leaf.inp % heads == 0):
        total = qkv.out // d
        groups = (total - heads) // 2
        if qkv.out != total * d or groups < 1 or total != heads + 2 * groups or heads % groups:
            continue
        query, shared = _batches(heads, groups)
        blocks = [qkv.rows(query, d)]
        blocks += [qkv.rows(shared, d, offset=(heads + i * groups) * d) for i in range(2)]
        layouts.append(_Layout(*blocks))
        each = heads // groups
        woven = [qkv.rows((each,), d, repeats=groups)]
        woven += [qkv.rows((1,), d, repeats=groups, offset=(each + i) * d) for i in range(2)]
        layouts.append(_Layout(*woven))
        if groups == heads and heads % 4 == 0:
            part = heads // 4
            q, v, k = (qkv.rows((part,), d, repeats=4, offset=i * part * d) for i in range(3))
            layouts.append(_Layout(q, k, v))
    # A Conv1D that is fused is GPT-2's, whose blocks no one has ever woven.
    return layouts[:1] if qkv.transposed else layouts


def _latent(module: nn.Module, q: Leaf, kv_b: Leaf, heads: int) -> list[_Layout]:
    """Multi-head latent attention: per head [nope | rope] queries against [nope | value] of the latent.

    The rotated part of the key is one head of another projection: it stays outside the product.
    """
    nope, dv = getattr(module, "qk_nope_head_dim", 0), getattr(module, "v_head_dim", 0)
    if not nope or not dv or q.out % heads or kv_b.out != heads * (nope + dv):
        return []
    place = {"repeats": heads, "offset": 0}
    value = kv_b.rows((), dv, repeats=heads, offset=nope)
    return [_Layout(q.rows((), nope, **place), kv_b.rows((), nope, **place), value)]


def _with_own_biases(module: nn.Module, layout: _Layout) -> _Layout:
    """Biases that are parameters of the attention module itself (DeBERTa's q_bias and v_bias)."""

    def with_bias(role: str) -> HeadSlice:
        side, bias = getattr(layout, role), getattr(module, f"{role}_bias", None)
        own = side.bias is None and isinstance(bias, nn.Parameter) and bias.numel() == side.size * side.width
        return replace(side, bias=f"{role}_bias", bias_width=side.width) if own else side

    return _Layout(*map(with_bias, ("q", "k", "v")))


def _batches(heads: int, groups: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batch shapes of the query side and of the shared side."""
    return ((heads,), (heads,)) if groups == heads else ((groups, heads // groups), (groups, 1))


# -- products ----------------------------------------------------------------------------------------


def _offer_qk(site: Site, module: nn.Module, layouts: list[_Layout]) -> None:
    if reason := between_q_and_k(module):
        site.doubts["qk"] = reason
    for layout in layouts:
        d = layout.q.width
        name = f"{site.name}.qk" if site.name else "qk"
        site.options["qk"].append(HeadTarget(name, "qk", d, layout.q, layout.k))
        site.options["qk"] += [
            HeadTarget(name, "rotary-qk", d, layout.q, layout.k, rotary) for rotary in _rotary_layouts(module, d)
        ]


def _rotary_layouts(module: nn.Module, width: int) -> Iterator[RotaryLayout]:
    """Ways to rotate ``width`` features: as many as the config says (all, if it says nothing), then the fewest first.

    What is unrotated keeps its whole Gram.
    """
    named = first_number(module, ("rotary_dim", "rotary_ndims", "rope_dim", "qk_rope_head_dim"))
    share = first_number(module, ("partial_rotary_factor", "rotary_pct"))
    dims = {width // 4, width // 2, 3 * width // 4, width, int(named or 0), int(width * (share or 0))}
    said = int(named or width * (share or 1))
    for dim in sorted((dim for dim in dims if 2 <= dim <= width and dim % 2 == 0), key=lambda dim: (dim != said, dim)):
        for start in dict.fromkeys((0, width - dim)):
            yield RotaryLayout(start, dim)
            yield RotaryLayout(start, dim, interleaved=True)
            if dim % 4 == 0:
                yield RotaryLayout(start, dim, chunks=2)


def _offer_ov(site: Site, module: nn.Module, layouts: list[_Layout], outputs: list) -> None:
    """The O/V products, declared on the common ancestor of v and o."""
    if reason := between_v_and_o(module):
        site.doubts["ov"] = reason
    for layout in layouts:
        width = layout.q.size * layout.v.width
        fitting = [(up, leaf) for up, leaf in outputs if leaf.inp == width]
        if not fitting:
            site.doubts.setdefault("ov", f"no output projection of {width} features beside the value projection")
            continue
        up, leaf = fitting[0]
        parts = site.name.split(".") if site.name else []
        ancestor, below = ".".join(parts[: len(parts) - up]), "".join(f"{part}." for part in parts[len(parts) - up :])
        right = replace(layout.v, weight=below + layout.v.weight, bias=layout.v.bias and below + layout.v.bias)
        left = HeadSlice(leaf.weight, None, "in", layout.q.batch, right.width, transposed=leaf.transposed)
        name = f"{ancestor}.ov" if ancestor else "ov"
        site.options["ov"].append(HeadTarget(name, "ov", right.width, left, right))
