"""Rules on the names of config fields: what a number or a list of numbers becomes in a tiny model.

The first rule in `RULES` whose pattern matches a field's name decides; a field that no rule matches keeps its value.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scripts.coverage.sizes import FIRST_SPECIAL, HEADS, HIDDEN, LAYERS, MLP, VOCAB


@dataclass(frozen=True)
class Context:
    """What a rule may use besides a field's name and value.

    Attributes:
        head_dim: the width of a head.
        heads: number of query heads before shrinking, None if the config has no such field.
        image: side of an image in pixels.
        width: hidden size.
        tokens: name of a special token -> its place among them, the same in every sub-config of a model.
    """

    head_dim: int
    heads: int | None
    image: int
    width: int
    tokens: dict[str, int]


Rule = Callable[[str, int, Context], int]


def _cap(limit: int) -> Rule:
    return lambda name, value, context: min(value, limit)


def _set(value: int) -> Rule:
    return lambda name, _, context: value


def _keep(name: str, value: int, context: Context) -> int:
    return value


def _head_dim(name: str, value: int, context: Context) -> int:
    return context.head_dim


def _image(name: str, value: int, context: Context) -> int:
    return context.image


def _width(name: str, value: int, context: Context) -> int:
    return context.width if value >= 32 else value


def _token(name: str, value: int, context: Context) -> int:
    return value if value < 4 else FIRST_SPECIAL + context.tokens.setdefault(name, len(context.tokens))


def _kv_heads(name: str, value: int, context: Context) -> int:
    return HEADS if value == context.heads else max(1, min(HEADS // 2, value))


def _patch(name: str, value: int, context: Context) -> int:
    return value if value <= 4 else 8


def _window(name: str, value: int, context: Context) -> int:
    return 32 if value > 64 else min(value, 4)  # in pixels, or in patches


# The first rule that matches a field's name decides. Numbers only; lists go through `_shrink_list`.
RULES = [
    (r"^(eos|bos|pad|sep|cls|unk|mask|decoder_start)_token_id$", _token),
    (r"(token_id|token_index|_token)$|^(image|video|audio)_.*(_id|index)$", _token),
    (r"vocab_size(_per_layer_input)?$|^n_vocab$|^vocab$|_vocab$|num_embeddings$", _set(VOCAB)),
    (r"codebook_size$", _cap(32)),
    (r"num_.*_labels$", _cap(40)),
    (r"^(num_filters|n_filters)$", _cap(4)),
    (r"^base_channels$", _cap(32)),
    (r"upsample_groups$", _set(HIDDEN)),
    (r"^d_latents$", _set(HIDDEN)),
    (r"^(num_latents|.*_num_latents|latent_query_num)$", _cap(16)),
    (r"zero_expert_num", _cap(4)),
    (r"upsample_initial_channel$", _set(32)),
    (r"^mamba_(n|num)_heads$", _set(8)),
    (r"^mamba_d_ssm$", _set(2 * HIDDEN)),
    (r"^n_groups$", _cap(2)),
    (r"^max_length$", _cap(64)),
    (r"^num_(codebooks|quantizers|code_groups)$|^n_codebooks$", _cap(4)),
    (r"(num_encoder_blocks|num_stages)$", _keep),
    (r"(layers|_layer|_blocks|^depth|^n_layers|_depth)$", _cap(LAYERS)),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", _cap(1)),
    (r"(num_key_value_heads|num_kv_heads|kv_heads|num_key_value_attention_heads)$", _kv_heads),
    (r"(index_n_heads|linear_num_(key|value)_heads)$", _cap(4)),
    (r"(num_heads|_heads|n_heads?|attention_heads)$", _cap(HEADS)),
    (r"(qk_nope_head_dim|v_head_dim)$", _set(16)),
    (r"qk_rope_head_dim$", _set(8)),
    (r"(q_lora_rank|kv_lora_rank|o_lora_rank)$", _set(32)),
    (r"index_head_dim$", _set(16)),
    (r"(linear_.*head_dim|mamba_head_dim|mamba_d_head)$", _set(16)),
    (r"(head_dim|head_size|d_kv|d_head|dim_head|kv_channels)$", _head_dim),
    (r"query_pre_attn_scalar$", _head_dim),
    (r"rotary_dim$", _set(8)),
    (r"(n_routed_experts|num_experts|num_local_experts|moe_num_experts|n_experts)$", _cap(4)),
    (r"(experts_per_tok(en)?|moe_topk|moe_k|topk_group|top_k_experts)$", _cap(2)),
    (r"^n_group$", _cap(2)),
    (r"^index_topk$", _cap(4)),
    (r"^(pretrain_)?image_size$|^crop_size$|^resolution$", _image),
    (r"patch_size$|^patch$", _patch),
    (r"^window_size$", _window),
    (r"(sliding_window|local_attention|attention_window)(_size)?$", _cap(8)),
    (r"^num_position_embeddings$", _set(64)),
    (r"max_source_positions$", _set(32)),
    (r"max_.*positions?_embeddings?$|^n_positions$|^n_ctx$|_positions$|^max_seq_len$|^max_seq_length$", _cap(256)),
    (r"^mm_tokens_per_image$", _set(4)),
    (r"^num_quer(ies|y_tokens)$", _cap(8)),
    (r"^(num_frames|frames_per_clip)$", _cap(4)),
    (r"^keypoint_decoder_dim$", _keep),
    (r"n_mels$|num_mel_bins$|mel_bins$", _cap(16)),
    (
        r"(intermediate|ffn|mlp|feedforward|feed_forward|d_ff|n_inner|d_inner|dim_ff|dff)"
        r"(_?(size|dim|hidden_dim|hidden_size))?$",
        _set(MLP),
    ),
    (r"(kernel|chunk|block|window|group|stride|batch|crop|merge|feature_map|sample)_size$|sampling_rate", _keep),
    (r"^(num_channels|in_chans|type_vocab_size)$", _keep),
    (
        r"(hidden_size(_global)?|d_model|n_embd|embed_dim|hidden_dim|emb_dim|_channels|_width|_units|_size|_dim|^dim|_features|"
        r"embedding_size|_features_dim|channels)$",
        _width,
    ),
]
RULES = [(re.compile(pattern), rule) for pattern, rule in RULES]
_CHANNELS = re.compile(r"(sizes|dims?|channels|planes|channel_list|per_stage|filters)$")
_INDEXES = re.compile(r"(ind(ic|ex)es|_indexes|_layers|blocks)$")


def shrink_value(name: str, value: Any, context: Context) -> Any:
    """What the field ``name`` gets instead of ``value``: dropout none, numbers and lists by the rules, else a copy."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and "drop" in name:
        return type(value)(0)
    if isinstance(value, int):
        rule = next((rule for pattern, rule in RULES if pattern.search(name)), _keep)
        return rule(name, value, context)
    if isinstance(value, (list, tuple)):
        return _shrink_list(name, value, context)
    return copy.deepcopy(value)


def _shrink_list(name: str, value: list | tuple, context: Context) -> list | tuple:
    """Lists keep their length (one entry per stage); widths are scaled so that the narrowest becomes 32."""
    numbers = [v for v in value if isinstance(v, int) and not isinstance(v, bool)]
    if not value or len(numbers) != len(value):
        return value
    if name.endswith("token_id"):
        return [_token(name, v, context) for v in value[:1]]
    if "depths" in name or name.endswith(("num_blocks", "numb_of_layers", "blocks_per_stage", "layers_per_stage")):
        return [min(v, 2) for v in value]
    if "heads" in name:
        low = min(value)
        return [2 * v // low if low > 1 else v for v in value]
    if name.endswith("image_size"):
        return [context.image] * len(value)
    if _CHANNELS.search(name) and min(value) > 24 and "kernel" not in name and "patch" not in name:
        return [max(16, round(32 * v / min(value) / 16) * 16) for v in value]
    if _INDEXES.search(name):
        return sorted({min(v, LAYERS - 1) for v in value})
    return value


def shrink_rope(rope: dict[str, Any], head_dim: int, sections: bool) -> dict[str, Any]:
    """Rotary settings for heads of ``head_dim``: `mrope_section` sums to half of the rotated width.

    ``sections`` writes one even where the config has none; the other entries do not depend on sizes.
    """
    rope = {key: shrink_rope(v, head_dim, sections) if isinstance(v, dict) else v for key, v in rope.items()}
    flat = "rope_theta" in rope or "rope_type" in rope
    if "mrope_section" in rope or (flat and sections):
        half = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        parts = len(rope.get("mrope_section", (1, 1, 1)))
        rope["mrope_section"] = [half - half // parts * (parts - 1)] + [half // parts] * (parts - 1)
    return rope
