"""Tiny configs of every model type: each constructor field by a rule on its name, see `rules` and `overrides`."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from scripts.coverage.overrides import OVERRIDES
from scripts.coverage.reading import read
from scripts.coverage.rules import Context, shrink_rope, shrink_value
from scripts.coverage.sizes import HEADS, HIDDEN, LAYERS, VOCAB

_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "encoder_layers", "layers")
_PER_LAYER = re.compile(r"layer|types|pattern|block|intermediate|rope_theta|_ids")
_HEAD_COUNTS = ("num_attention_heads", "n_heads", "num_heads", "n_head")
_STAGES = ("depths", "hidden_sizes", "num_heads", "embed_dim_per_stage")
# Optional sizes that some class needs although its own default is None.
_NONE_VALUES = {
    "topk_group": 1,
    "n_group": 1,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "sliding_window": 8,
    "vocab_size": VOCAB,
    "num_key_value_heads": HEADS // 2,
}


@dataclass(frozen=True)
class Profile:
    """A way to shrink that some classes permit and others do not.

    Attributes:
        head_dim: the width of a head; 16 is the hidden size over the number of heads.
        set_head_dim: write it also where the config leaves it open.
        fill: give optional sizes a value.
        mrope: give rotary positions in three dimensions their sections.
    """

    head_dim: int
    set_head_dim: bool = False
    fill: bool = False
    mrope: bool = False


# Tried in order until one runs: head_dim * heads differs from the hidden size if the class permits it.
PROFILES = (
    Profile(24, set_head_dim=True),
    Profile(24, set_head_dim=True, fill=True),
    Profile(16, fill=True),
    Profile(16, mrope=True),
    Profile(24, set_head_dim=True, mrope=True),
)


def model_types() -> list[str]:
    """Every model type that this transformers knows."""
    return list(CONFIG_MAPPING_NAMES)


def tiny_config(model_type: str, profile: Profile) -> PreTrainedConfig:
    """A tiny config of this type; what the config's class raises at sizes that it does not permit is passed on."""
    return _shrink(CONFIG_MAPPING[model_type](), profile, tokens={})


def _shrink(config: PreTrainedConfig, profile: Profile, tokens: dict[str, int]) -> PreTrainedConfig:
    """A tiny config of the same class. Only constructor fields are set, so derived attributes follow from them."""
    names = _fields(config)
    context = _context(config, names, profile, tokens)
    depth = _depth_field(config, names)
    keep, per_layer = _layer_choice(config, names, read(config, depth) if depth else 0)
    values = {}
    for name in names:
        value = read(config, name)
        if isinstance(value, PreTrainedConfig) and value.model_type == "timm_backbone":
            values[name] = _resnet(value)  # timm is not a dependency; the head works on any backbone
        elif isinstance(value, PreTrainedConfig):
            values[name] = _shrink(value, profile, tokens)
        elif name in per_layer:
            values[name] = [shrink_value(name.removesuffix("_per_layer"), value[i], context) for i in keep]
        elif name == depth:
            values[name] = len(keep) if keep else min(value, LAYERS)
        elif name.startswith("rope_") and isinstance(value, dict):
            head_dim = profile.head_dim if "head_dim" in names else HIDDEN // HEADS
            values[name] = shrink_rope(value, head_dim, profile.mrope)
        elif value is not None:
            values[name] = shrink_value(name, value, context)
        elif name == "head_dim" and profile.set_head_dim:
            values[name] = profile.head_dim
        elif profile.fill and name in _NONE_VALUES:
            values[name] = _NONE_VALUES[name]
    if taps := _feature_maps(config, depth):
        values["out_indices"] = taps
        if depth:
            values[depth] = max(values[depth], len(taps))
    values.update(OVERRIDES.get(config.model_type, {}))
    values = {k: v for k, v in values.items() if k not in ("_out_indices", "_out_features")}
    return type(config)(**values)


def _fields(config: PreTrainedConfig) -> list[str]:
    """Names of the constructor's own fields; inherited ones (return_dict, id2label ...) need no shrinking."""
    base = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    return [f.name for f in dataclasses.fields(config) if f.init and (f.name not in base or "token" in f.name)]


def _context(config: PreTrainedConfig, names: list[str], profile: Profile, tokens: dict[str, int]) -> Context:
    hierarchical = any(isinstance(read(config, name), (list, tuple)) for name in _STAGES)
    image = 32 if not hierarchical else 128 if "window_size" in names else 64
    heads = next((v for name in _HEAD_COUNTS if isinstance(v := read(config, name), int)), None)
    return Context(profile.head_dim, heads, image, 32 if hierarchical else HIDDEN, tokens)


def _depth_field(config: PreTrainedConfig, names: list[str]) -> str | None:
    """The constructor field that sets the number of layers, or None (e.g. if `depths` does)."""
    aliases = getattr(config, "attribute_map", {})
    fields = (aliases.get(name, name) for name in _DEPTHS)
    return next((f for f in fields if f in names and isinstance(read(config, f), int)), None)


def _layer_choice(config: PreTrainedConfig, names: list[str], depth: int) -> tuple[list[int], list[str]]:
    """One layer of every distinct combination of per-layer settings (at least two), and the names of those lists."""
    if depth < LAYERS:
        return [], []
    lists: dict[str, Any] = {
        name: value
        for name in names
        if _PER_LAYER.search(name) and isinstance(value := read(config, name), (list, tuple)) and len(value) == depth
    }
    if not lists:
        return [], []
    kinds = list(zip(*(map(repr, value) for value in lists.values()), strict=True))
    chosen = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[:6]
    return (chosen if len(chosen) >= LAYERS else sorted({*chosen, *range(LAYERS)})), list(lists)


def _resnet(timm_config: PreTrainedConfig) -> PreTrainedConfig:
    """A tiny ResNet with as many feature maps as the timm backbone in its place."""
    maps = len(read(timm_config, "_out_indices") or read(timm_config, "out_indices") or [4])
    return CONFIG_MAPPING["resnet"](
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_indices=list(range(5 - maps, 5)),
    )


def _feature_maps(config: PreTrainedConfig, depth: str | None) -> list[int] | None:
    """Output indices of a backbone with several feature maps: their number stays, a head expects it."""
    taps = read(config, "_out_indices")
    if not isinstance(taps, (list, tuple)) or len(taps) < 2:
        return None
    return list(range(1, len(taps) + 1)) if depth else list(taps)
