"""Tiny random models of (nearly) every model type of the installed transformers, with inputs that run.

    python scripts/tiny_models.py [--json report.json] [model_type ...]

Configs are shrunk by rules on the names of their fields (`RULES`), not by a table of models; `OVERRIDES` holds what
the rules cannot know. Inputs are guessed from the signature of `forward`: several candidates are tried in order and
the first on which the model runs is kept.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import importlib
import inspect
import itertools
import json
import math
import re
import signal
import threading
import time
import warnings

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils import logging

MAX_PARAMETERS = 5_000_000
SECONDS = 30  # a type that takes longer is given up
VOCAB, HIDDEN, HEADS, LAYERS, MLP, TEXT_LENGTH, DECODER_LENGTH = 160, 64, 4, 2, 96, 10, 7
FIRST_SPECIAL = 100  # special tokens live in [100, 160), ordinary text in [4, 100)


class NotBuilt(Exception):
    """No tiny model of this type; `kind` is the stage that failed: 'config', 'model' or 'forward'."""

    def __init__(self, kind, reason):
        self.kind = kind
        self.reason = " ".join(str(reason).split())[:300]
        super().__init__(f"{kind}: {self.reason}")


def model_types():
    """Every model type that this transformers knows."""
    return list(CONFIG_MAPPING_NAMES)


# ---------------------------------------------------------------------------------------------------- shrinking


def _cap(limit):
    return lambda v, ctx: min(v, limit)


def _set(value):
    return lambda v, ctx: value


def _token(v, ctx):
    """One small id per name, the same in every sub-config of one model."""
    if v < 4:
        return v
    return FIRST_SPECIAL + ctx["tokens"].setdefault(ctx["name"], len(ctx["tokens"]))


def _kv_heads(v, ctx):
    return HEADS if v == ctx["heads"] else max(1, min(HEADS // 2, v))


def _patch(v, ctx):
    return v if v <= 4 else 8


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
    (r"(num_encoder_blocks|num_stages)$", None),
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
    (r"(head_dim|head_size|d_kv|d_head|dim_head|kv_channels)$", lambda v, ctx: ctx["head_dim"]),
    (r"query_pre_attn_scalar$", lambda v, ctx: ctx["head_dim"]),
    (r"rotary_dim$", _set(8)),
    (r"(n_routed_experts|num_experts|num_local_experts|moe_num_experts|n_experts)$", _cap(4)),
    (r"(experts_per_tok(en)?|moe_topk|moe_k|topk_group|top_k_experts)$", _cap(2)),
    (r"^n_group$", _cap(2)),
    (r"^index_topk$", _cap(4)),
    (r"^(pretrain_)?image_size$|^crop_size$|^resolution$", lambda v, ctx: ctx["image"]),
    (r"patch_size$|^patch$", _patch),
    (r"^window_size$", lambda v, ctx: 32 if v > 64 else min(v, 4)),  # in pixels, or in patches
    (r"(sliding_window|local_attention|attention_window)(_size)?$", _cap(8)),
    (r"^num_position_embeddings$", _set(64)),
    (r"max_source_positions$", _set(32)),
    (r"max_.*positions?_embeddings?$|^n_positions$|^n_ctx$|_positions$|^max_seq_len$|^max_seq_length$", _cap(256)),
    (r"^mm_tokens_per_image$", _set(4)),
    (r"^num_quer(ies|y_tokens)$", _cap(8)),
    (r"^(num_frames|frames_per_clip)$", _cap(4)),
    (r"^keypoint_decoder_dim$", None),
    (r"n_mels$|num_mel_bins$|mel_bins$", _cap(16)),
    (
        r"(intermediate|ffn|mlp|feedforward|feed_forward|d_ff|n_inner|d_inner|dim_ff|dff)"
        r"(_?(size|dim|hidden_dim|hidden_size))?$",
        _set(MLP),
    ),
    (r"(kernel|chunk|block|window|group|stride|batch|crop|merge|feature_map|sample)_size$|sampling_rate", None),
    (r"^(num_channels|in_chans|type_vocab_size)$", None),
    (
        r"(hidden_size(_global)?|d_model|n_embd|embed_dim|hidden_dim|emb_dim|_channels|_width|_units|_size|_dim|^dim|_features|"
        r"embedding_size|_features_dim|channels)$",
        lambda v, ctx: ctx["width"] if v >= 32 else v,
    ),
]
RULES = [(re.compile(pattern), rule) for pattern, rule in RULES]
# Optional sizes that some class needs although its own default is None.
NONE_VALUES = {
    "topk_group": 1,
    "n_group": 1,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "sliding_window": 8,
    "vocab_size": VOCAB,
    "num_key_value_heads": HEADS // 2,
}
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "encoder_layers", "layers")
PER_LAYER = re.compile(r"layer|types|pattern|block|intermediate|rope_theta|_ids")
CHANNELS = re.compile(r"(sizes|dims?|channels|planes|channel_list|per_stage|filters)$")
INDEXES = re.compile(r"(ind(ic|ex)es|_indexes|_layers|blocks)$")


def _shrink_int(name, value, ctx):
    for pattern, rule in RULES:
        if pattern.search(name):
            return value if rule is None else rule(value, {**ctx, "name": name})
    return value


def _shrink_list(name, value, ctx):
    """Lists keep their length (one entry per stage); widths are scaled so that the narrowest becomes 32."""
    numbers = [v for v in value if isinstance(v, int) and not isinstance(v, bool)]
    if not value or len(numbers) != len(value):
        return value
    if name.endswith("token_id"):
        return [_token(v, {**ctx, "name": name}) for v in value[:1]]
    if "depths" in name or name.endswith(("num_blocks", "numb_of_layers", "blocks_per_stage", "layers_per_stage")):
        return [min(v, 2) for v in value]
    if "heads" in name:
        low = min(value)
        return [2 * v // low if low > 1 else v for v in value]
    if name.endswith("image_size"):
        return [ctx["image"]] * len(value)
    if CHANNELS.search(name) and min(value) > 24 and "kernel" not in name and "patch" not in name:
        return [max(16, round(32 * v / min(value) / 16) * 16) for v in value]
    if INDEXES.search(name):
        return sorted({min(v, LAYERS - 1) for v in value})
    return value


def _shrink_rope(rope, ctx, names=(), head_dim=None):
    """`mrope_section` sums to half of the rotated width; the other entries do not depend on sizes."""
    head_dim = head_dim or (ctx["head_dim"] if "head_dim" in names else HIDDEN // HEADS)
    rope = {k: _shrink_rope(v, ctx, names, head_dim) if isinstance(v, dict) else v for k, v in rope.items()}
    flat = "rope_theta" in rope or "rope_type" in rope
    if "mrope_section" in rope or (flat and ctx.get("mrope")):
        half = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        parts = len(rope.get("mrope_section", (1, 1, 1)))
        rope["mrope_section"] = [half - half // parts * (parts - 1)] + [half // parts] * (parts - 1)
    return rope


def _fields(config):
    """Names of the constructor's own fields; inherited ones (return_dict, id2label ...) need no shrinking."""
    base = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    return [f.name for f in dataclasses.fields(config) if f.init and (f.name not in base or "token" in f.name)]


def _read(config, name):
    """A config's value; heterogeneous configs raise on attributes that differ per layer."""
    try:
        return config._getattr_without_heterogeneous_validation(name, None)
    except Exception:
        return getattr(config, name, None)


def _depth_field(config, names):
    """The constructor field that sets the number of layers, or None (e.g. if `depths` does)."""
    aliases = getattr(config, "attribute_map", {})
    fields = (aliases.get(name, name) for name in DEPTHS)
    return next((f for f in fields if f in names and isinstance(_read(config, f), int)), None)


def _layer_choice(config, names, depth):
    """One layer of every distinct combination of per-layer settings (at least two), and the names of those lists."""
    lists = {
        n: v
        for n in names
        if PER_LAYER.search(n)
        and isinstance(v := _read(config, n), (list, tuple))
        and len(v) == depth
        and depth >= LAYERS
    }
    if not lists:
        return None, []
    kinds = list(zip(*(map(repr, v) for v in lists.values()), strict=True))
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[:6]
    return (first if len(first) >= LAYERS else sorted({*first, *range(LAYERS)})), list(lists)


def shrink(config, profile):
    """A tiny config of the same class. Only constructor fields are set, so derived attributes follow from them."""
    names = _fields(config)
    heads = next(
        (
            v
            for n in ("num_attention_heads", "n_heads", "num_heads", "n_head")
            if isinstance(v := _read(config, n), int)
        ),
        None,
    )
    stages = ("depths", "hidden_sizes", "num_heads", "embed_dim_per_stage")
    hierarchical = any(isinstance(_read(config, n), (list, tuple)) for n in stages)
    ctx = {
        **profile,
        "heads": heads,
        "image": (128 if "window_size" in names else 64) if hierarchical else 32,
        "width": 32 if hierarchical else HIDDEN,
    }
    depth = _depth_field(config, names)
    keep, per_layer = _layer_choice(config, names, _read(config, depth) if depth else 0)
    values = {}
    for name in names:
        value = _read(config, name)
        if isinstance(value, PreTrainedConfig) and value.model_type == "timm_backbone":
            values[name] = _resnet(value)  # timm is not a dependency; the head works on any backbone
        elif isinstance(value, PreTrainedConfig):
            values[name] = shrink(value, profile)
        elif name in per_layer:
            values[name] = [_shrink_value(name.removesuffix("_per_layer"), value[i], ctx) for i in keep]
        elif name == depth:
            values[name] = len(keep) if keep else min(value, LAYERS)
        elif name.startswith("rope_") and isinstance(value, dict):
            values[name] = _shrink_rope(value, ctx, names)
        elif value is not None:
            values[name] = _shrink_value(name, value, ctx)
        elif name == "head_dim" and profile.get("set_head_dim"):
            values[name] = ctx["head_dim"]
        elif profile.get("fill") and name in NONE_VALUES:
            values[name] = NONE_VALUES[name]
    if taps := _shrink_taps(config, depth):
        values["out_indices"] = taps
        if depth:
            values[depth] = max(values[depth], len(taps))
    values.update(OVERRIDES.get(config.model_type, {}))
    values = {k: v for k, v in values.items() if k not in ("_out_indices", "_out_features")}
    return type(config)(**values)


def _resnet(timm_config):
    """A tiny ResNet with as many feature maps as the timm backbone in its place."""
    maps = len(_read(timm_config, "_out_indices") or _read(timm_config, "out_indices") or [4])
    return CONFIG_MAPPING["resnet"](
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_indices=list(range(5 - maps, 5)),
    )


def _shrink_value(name, value, ctx):
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and "drop" in name:
        return 0.0 if isinstance(value, float) else 0
    if isinstance(value, int):
        return _shrink_int(name, value, ctx)
    if isinstance(value, (list, tuple)):
        return _shrink_list(name, value, ctx)
    return copy.deepcopy(value)


def _shrink_taps(config, depth):
    """A backbone with several feature maps keeps their number (a head expects it)."""
    taps = _read(config, "_out_indices")
    if not isinstance(taps, (list, tuple)) or len(taps) < 2:
        return None
    return list(range(1, len(taps) + 1)) if depth else list(taps)


# What no rule on names can know, by the `model_type` of the config (also where it is a sub-config).
_HGNET_OUT = [48, 64, 64]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OVERRIDES = {
    **dict.fromkeys(
        ["autoformer", "informer", "time_series_transformer"],
        {
            "prediction_length": 4,
            "context_length": 8,
            "lags_sequence": [1, 2],
            "num_time_features": 2,
            "label_length": 4,
        },
    ),
    **dict.fromkeys(
        ["d_fine", "deimv2", "pp_doclayout_v2", "pp_doclayout_v3", "pp_doclayout_v4"],
        {"encoder_in_channels": _HGNET_OUT, "decoder_in_channels": [HIDDEN] * 3},
    ),
    **dict.fromkeys(
        ["rt_detr", "rt_detr_v2"], {"encoder_in_channels": [64, 128, 256], "decoder_in_channels": [HIDDEN] * 3}
    ),
    **dict.fromkeys(["sam_vision_model", "sam_hq_vision_model"], {"num_pos_feats": HIDDEN // 2}),
    **dict.fromkeys(["llava_next", "llava_next_video", "llava_onevision"], {"image_grid_pinpoints": [[32, 32]]}),
    **dict.fromkeys(["clvp_encoder", "clvp_decoder"], {"num_attention_heads": 2}),
    **dict.fromkeys(
        ["sam2_vision_model", "sam2_hiera_det_model"],
        {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "global_attention_blocks": [2]},
    ),
    **dict.fromkeys(["sam3_vision_model"], {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}),
    **dict.fromkeys(["diffusion_gemma_text"], {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": MLP}),
    **dict.fromkeys(["t5gemma2_decoder", "t5gemma2_encoder", "t5gemma2_text"], {"dropout_rate": 0.0}),
    **dict.fromkeys(["lw_detr", "lw_detr_vit"], {"num_windows": 4}),
    **dict.fromkeys(
        [
            "vibevoice_acoustic_tokenizer",
            "vibevoice_acoustic_tokenizer_encoder",
            "vibevoice_acoustic_tokenizer_decoder",
        ],
        {"num_filters": 2, "n_filters": 2},
    ),
    **dict.fromkeys(["glm5_next", "glm5_next_text"], {"index_topk": 4, "index_kpool": 2}),
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "chameleon": {"vocabulary_map": {"<image>": FIRST_SPECIAL}},
    "clap_audio_model": {"spec_size": 128},
    "cohere_compass_text": {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    "dac": {"encoder_hidden_size": 4, "decoder_hidden_size": 32},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": MLP, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "depth_pro": {"patch_size": 32},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "efficientloftr": {"hidden_size": 256},
    "ernie4_5_vl_moe_text": {"head_dim": 24, "rope_parameters": {**_ROPE, "mrope_section": [4, 4, 4]}},
    **dict.fromkeys(
        ["instructblip", "instructblipvideo"], {"image_token_index": FIRST_SPECIAL, "video_token_index": FIRST_SPECIAL}
    ),
    "fastspeech2_conformer_hifigan": {"model_in_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [0, 0, 1, 1]},
    "dinov3_vit": {"return_class_token": True},
    "hgnet_v2": {
        "stem_channels": [3, 16, 16],
        "stage_in_channels": [16, 32, 48, 64],
        "hidden_sizes": [32, 48, 64, 64],
        "stage_mid_channels": [16] * 4,
        "stage_out_channels": [32, *_HGNET_OUT],
        "stage_numb_of_layers": [1] * 4,
        "stage_num_blocks": [1] * 4,
    },
    "levit": {"patch_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "llama4_vision_model": {"intermediate_size": 4 * HIDDEN},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "longcat_flash": {"head_dim": 8},
    "mistral_large4_text": {"kv_source_layers": None},
    "mllama_vision_model": {"vision_output_dim": 2 * HIDDEN},
    "mistral4": {"qk_nope_head_dim": 8},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "muse_spark_audio": {"num_hidden_layers": 4, "out_hidden_size": HIDDEN},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": MLP},
    "qwen4_exp_text": {
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "indexer_head_dim": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
    },
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "tvp": {"visual_prompt_size": 8, "max_img_size": 32},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "voxtral_encoder": {"intermediate_size": 4 * HIDDEN},
    "vitdet": {"patch_size": 16},
    "molmo2_adapter": {"vision_feature_layer": [0, 1]},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "reformer": {
        "axial_pos_embds_dim": [16, 48],
        "axial_pos_shape": [4, 8],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "max_position_embeddings": 32,
        "attn_layers": ["local", "lsh"],
        "num_buckets": 2,
    },
    "seggpt": {"num_hidden_layers": 5, "merge_index": 0, "intermediate_hidden_state_indices": [1, 2, 3, 4]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_head_dim": 2 * HIDDEN // HEADS,
        "attention_hidden_size": 2 * HIDDEN,
    },
}
# Tried in order until one runs: head_dim * heads differs from the hidden size if the class permits it.
PROFILES = [
    {"head_dim": 24, "set_head_dim": True},
    {"head_dim": 24, "fill": True, "set_head_dim": True},
    {"head_dim": 16, "fill": True},
    {"head_dim": 16, "mrope": True},
    {"head_dim": 24, "mrope": True, "set_head_dim": True},
]


# ------------------------------------------------------------------------------------------------------ building


@contextlib.contextmanager
def _time_limit(seconds):
    """Stops a build that hangs (main thread only: elsewhere signals are not available)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeoutError(f"more than {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@contextlib.contextmanager
def _parameter_limit(limit):
    """Stops a build at the parameter that exceeds the limit, also for classes that cannot be built on meta."""
    seen = 0

    def count(module, name, parameter):
        nonlocal seen
        seen += 0 if parameter is None else parameter.numel()
        if seen > limit:
            raise MemoryError(f"more than {limit} parameters (at {type(module).__name__}.{name} {[*parameter.shape]})")

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _classes(model_type, config):
    """Model classes for a config: what AutoModel maps to, else those of its file, base models first."""
    mapped = []
    if model_type in MODEL_MAPPING_NAMES:
        with contextlib.suppress(KeyError, ValueError):
            mapped = AutoModel._model_mapping[type(config)]
            mapped = list(mapped) if isinstance(mapped, (list, tuple)) else [mapped]
    try:
        module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    except ModuleNotFoundError:  # a config that borrows another family's model
        if mapped:
            return mapped
        raise
    found = [
        c
        for c in vars(module).values()
        if inspect.isclass(c)
        and issubclass(c, PreTrainedModel)
        and c.config_class is type(config)
        and "PreTrained" not in c.__name__
        and c.forward is not nn.Module.forward
        and c not in mapped
    ]
    return mapped + sorted(found, key=lambda c: (not c.__name__.endswith(("Model", "Encoder")), len(c.__mro__)))


def _instantiate(cls, config, seed):
    torch.manual_seed(seed)
    with _parameter_limit(MAX_PARAMETERS):
        try:
            model = cls._from_config(copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32)
        except ValueError as error:
            if "attention implementation" not in str(error):
                raise
            model = cls._from_config(copy.deepcopy(config), dtype=torch.float32)
    return randomize(model.eval().float(), seed)


@torch.no_grad()
def randomize(model, seed=0):
    """Makes every parameter matter: constants are perturbed, matrices get a gain of about one."""
    generator = torch.Generator().manual_seed(seed + 1)
    seen = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen or not parameter.is_floating_point() or not parameter.numel():
                continue
            seen.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            low, high = parameter.min().item(), parameter.max().item()
            if not math.isfinite(low) or not math.isfinite(high):
                parameter.copy_(0.1 * noise)
            elif low == high and parameter.dim() >= 2 and abs(low) < 0.05:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))  # zero-initialised projections
            elif low == high == 0:
                parameter.copy_(0.1 * noise)
            elif low == high and abs(low) < 0.05:
                parameter.copy_(0.5 + 0.1 * noise)  # layer scale
            elif low == high:
                parameter.mul_(1 + 0.2 * noise.clamp(-2, 2))
            elif parameter.dim() >= 2:
                convolution = isinstance(module, nn.modules.conv._ConvNd)
                fan_in = math.prod(parameter.shape[1:]) if convolution else parameter.shape[-1]
                gain = parameter.std().item() * math.sqrt(fan_in)
                if 0 < gain < 0.7:
                    parameter.mul_(1 / gain)
    return model


# -------------------------------------------------------------------------------------------------------- inputs


def _config_value(config, *names, default=None):
    """First of these attributes that the config or one of its sub-configs has, nearest first."""
    queue = [config]
    while queue:
        current = queue.pop(0)
        for name in names:
            value = _read(current, name)
            if value is not None:
                return value
        queue += [v for v in vars(current).values() if isinstance(v, PreTrainedConfig)]
    return default


def _first(value):
    return value[0] if isinstance(value, (list, tuple)) else value


class _Examples:
    """Example tensors by argument name; where layouts differ between models, several to try."""

    def __init__(self, model, seed):
        self.model, self.config = model, model.config
        self.generator = torch.Generator().manual_seed(seed + 2)
        self.hidden = _first(_config_value(self.config, "hidden_size", "d_model", "embed_dim", "dim", default=HIDDEN))
        self.vocab = min(_first(_config_value(self.config, "vocab_size", default=VOCAB)), FIRST_SPECIAL)
        self.channels = _config_value(self.config, "num_channels", "in_channels", "in_chans", default=3)
        self.channels = self.channels if isinstance(self.channels, int) else 3
        size = _config_value(self.config, "image_size", default=64)
        size = [size["height"], size["width"]] if isinstance(size, dict) else size
        self.size = tuple(size)[-2:] if isinstance(size, (list, tuple)) and len(size) > 1 else (_first(size),) * 2
        self.mels = _config_value(
            self.config, "num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim", "n_mels", default=16
        )

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def ids(self, length, batch=2):
        return torch.randint(4, max(self.vocab, 8), (batch, length), generator=self.generator)

    def layouts(self, name):
        """Possible tensors for an argument, the most common layout first; none if unknown."""
        height, width = self.size
        frames = _config_value(self.config, "num_frames", "frames_per_clip", default=2)
        if name in ("input_ids",):
            return [self.ids(TEXT_LENGTH)]
        if name in ("decoder_input_ids",):
            return [self.ids(DECODER_LENGTH)]
        if name in ("attention_mask",):
            return [torch.ones(2, TEXT_LENGTH, dtype=torch.long)]
        if name in ("pixel_values", "pixel_values_images", "images", "image", "input"):
            return [
                self.randn(2, self.channels, height, width),
                self.randn(2, frames, self.channels, height, width),
                self.randn(2, 1, self.channels, height, width),
                self.randn(2, self.channels, 64, 64),
                self.randn(2, 1, self.channels, 2 * height, 2 * width),
            ]
        if name in ("pixel_values_videos", "video"):
            return [self.randn(2, frames, self.channels, height, width)]
        if name in ("input_values", "waveform", "audio_values", "audio", "input_audio"):
            return [
                self.randn(2, 2000),
                self.randn(2, 1, 2000),
                self.randn(2, 64, self.mels),
                self.randn(2, TEXT_LENGTH, self.hidden),
            ]
        if name in ("input_features", "spectrogram", "audio_features"):
            length = 2 * _config_value(self.config, "max_source_positions", default=32)
            return [
                self.randn(2, self.mels, length),
                self.randn(2, length, self.mels),
                self.randn(2, 1, length, self.mels),
                self.randn(2, length, 2 * self.mels),
            ]
        if name in ("hidden_states", "inputs_embeds", "query_embeds", "x"):
            return [self.randn(2, TEXT_LENGTH, self.hidden), self.randn(TEXT_LENGTH, self.hidden)]
        if name in ("encoder_hidden_states", "cross_attention_states", "context"):
            width = _config_value(self.config, "encoder_hidden_size", "cross_hidden_size", default=self.hidden)
            return [self.randn(2, 6, width)]
        if name in ("grid_thw", "image_grid_thw"):
            return [torch.tensor([[1, 4, 4]])]
        if name in ("bbox",):
            box = torch.tensor([1, 2, 30, 40])
            bros = self.config.model_type == "bros"  # four corners, relative
            return [
                torch.tensor([[0.1, 0.1, 0.3, 0.1, 0.3, 0.2, 0.1, 0.2]]).repeat(2, TEXT_LENGTH, 1)
                if bros
                else (box / 100 if self.config.model_type == "udop" else box).repeat(2, TEXT_LENGTH, 1)
            ]
        if name == "merge_sizes":
            return [torch.tensor([1])]
        if name == "input_features_mask":
            return [torch.ones(2, n, dtype=torch.long) for n in (2 * LAYERS * 16, self.mels)]
        if name in ("position_ids",):
            return [torch.arange(TEXT_LENGTH).repeat(2, 1)]
        return []

    def flat_patches(self):
        """Patches of one image in the layout of Qwen2-VL and its heirs: [patches, channels * time * patch**2]."""
        patch = _first(_config_value(self.config, "patch_size", default=8))
        time_patch = _config_value(self.config, "temporal_patch_size", default=1)
        return [
            self.randn(16, self.channels * time_patch * patch**2),
            self.randn(16, self.channels * patch**2),
            self.randn(16, self.channels * 2 * patch**2),
            self.randn(16, self.channels, patch, patch),
            self.randn(1, 16, self.channels, patch, patch),
        ]

    def candidates(self):
        """Keyword arguments to try, the ones that use most of the model first."""
        parameters = inspect.signature(self.model.forward).parameters
        if (special := INPUTS.get(self.config.model_type)) is not None:
            yield {n: v for n, v in special(self).items() if n in parameters}
        main = getattr(self.model, "main_input_name", "input_ids")
        required = [
            n
            for n, p in parameters.items()
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        decoder = ["decoder_input_ids"] if "decoder_input_ids" in parameters else []
        media = [
            n for n in ("pixel_values", "input_features", "input_values", "pixel_values_videos") if n in parameters
        ]
        if "input_ids" in parameters and media:
            yield from self.with_media(parameters)
        choices = []
        if "input_ids" in parameters:
            choices += [["input_ids", n, *decoder] for n in media]
        choices += [[main, *decoder], [main], ["input_ids", *decoder], ["input_ids"]]
        choices += [[n] for n in media] + [["inputs_embeds"], []]
        done = set()
        for names in choices:
            names = tuple(dict.fromkeys([*required, *(n for n in names if n in parameters)]))
            if not names or names in done:
                continue
            done.add(names)
            for tensors in itertools.islice(itertools.product(*(self.layouts(n) for n in names)), 24):
                inputs = dict(zip(names, tensors, strict=True))
                yield from self.companions(inputs, parameters)
                yield inputs
            grid = next((n for n in ("grid_thw", "image_grid_thw") if n in parameters), None)
            if grid and names[0] in ("pixel_values", "hidden_states"):
                rest = {n: v[0] for n in names[1:] if (v := self.layouts(n))}
                for patches in self.flat_patches():
                    yield {**rest, names[0]: patches, grid: torch.tensor([[1, 4, 4]])}

    def companions(self, inputs, parameters):
        """The same inputs with the optional arguments that some models of this kind insist on."""
        extra = {}
        if "bbox" in parameters and "bbox" not in inputs:
            extra["bbox"] = self.layouts("bbox")[0]
        for name in ("input_features_mask", "padding_mask"):
            if name in parameters and name not in inputs and "input_features" in inputs:
                extra[name] = torch.ones(2, inputs["input_features"].shape[-1], dtype=torch.long)
                extra[name] = (
                    extra[name]
                    if extra[name].shape[1] > self.mels
                    else torch.ones(2, inputs["input_features"].shape[1], dtype=torch.long)
                )
        if (
            "encoder_hidden_states" in parameters
            and "decoder_input_ids" not in parameters
            and ("encoder_hidden_states" not in inputs)
        ):
            extra["encoder_hidden_states"] = self.layouts("encoder_hidden_states")[0]
        if extra:
            yield {**inputs, **extra}

    def media(self):
        """Arguments of the vision or audio tower: (method, token names, variants of one image or one recording)."""
        height, width = self.size
        grid = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
        flat = self.randn(1, 16, self.channels * 64)
        images = [
            {"pixel_values": self.randn(1, self.channels, height, width)},
            {"pixel_values": self.randn(1, 1, self.channels, height, width)},
            *({"pixel_values": p, **grid} for p in self.flat_patches()),
            {
                "pixel_values": flat,
                "spatial_shapes": torch.tensor([[4, 4]]),
                "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
            },
            {"pixel_values": self.randn(1, 3, 8, 128), "target_sizes": torch.tensor([[4, 4]])},
        ]
        images.append({"pixel_values": self.randn(1, 2, self.channels, height, width)})
        images += [{**i, "image_sizes": torch.tensor([[height, width]])} for i in (*images[:2], images[-1])]
        sounds = [
            {"input_features": self.randn(1, *shape), mask: torch.ones(1, 64, dtype=torch.long)}
            for shape in ((self.mels, 64), (64, self.mels))
            for mask in ("input_features_mask", "feature_attention_mask", "none")
        ]
        yield "get_image_features", ("image_token_id", "image_token_index"), images
        yield "get_audio_features", ("audio_token_id", "audio_token_index"), sounds

    def with_media(self, parameters):
        """Text with as many image (or audio) tokens as the tower makes of one image, by asking the tower."""
        for method, tokens, variants in self.media():
            token = _config_value(self.config, *tokens)
            features = getattr(self.model, method, None)
            if not isinstance(token, int) or features is None:
                continue
            accepted = inspect.signature(features).parameters
            for variant in variants:
                if not set(variant) - {"none"} <= set(accepted):
                    continue
                variant = {n: v for n, v in variant.items() if n in parameters}
                try:
                    with torch.no_grad():
                        found = features(**variant)
                except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError):
                    continue
                yield from self._with_tokens(found, token, variant, parameters)

    def _with_tokens(self, found, token, variant, parameters):
        states = getattr(found, "pooler_output", found)
        states = getattr(found, "last_hidden_state", found) if states is None else states
        count = sum(math.prod(t.shape[:-1]) for t in _tensors(states))
        if not 0 < count < 300:
            return
        ids = torch.cat([self.ids(4, 1), torch.full((1, count), token), self.ids(4, 1)], 1)
        kinds = {n: (ids == token).long() for n in ("mm_token_type_ids", "token_type_ids") if n in parameters}
        decoder = {"decoder_input_ids": self.ids(DECODER_LENGTH, 1)} if "decoder_input_ids" in parameters else {}
        yield {"input_ids": ids, **variant, **kinds, **decoder}


def _patch_inputs(e, width, **more):
    return {"pixel_values": e.randn(2, 16, width), **more}


def _time_series(e):
    return {
        "past_values": e.randn(2, 10),
        "past_time_features": e.randn(2, 10, 2),
        "future_values": e.randn(2, 4),
        "past_observed_mask": torch.ones(2, 10),
        "future_time_features": e.randn(2, 4, 2),
    }


def _omni_audio(e):
    return {
        "input_features": e.randn(e.mels, 64),
        "feature_lens": torch.tensor([64]),
        "aftercnn_lens": torch.tensor([32]),
    }


def _siglip2(e):
    return _patch_inputs(
        e,
        3 * 64,
        pixel_attention_mask=torch.ones(2, 16, dtype=torch.long),
        spatial_shapes=torch.tensor([[4, 4], [4, 4]]),
    )


def _flattened_patches(e):
    width = _config_value(e.config, "patch_embed_hidden_size", default=HIDDEN)
    place = torch.tensor([[i // 3 + 1, i % 3 + 1] for i in range(6)]).float().expand(2, 6, 2)
    return {"flattened_patches": torch.cat([place, e.randn(2, 6, width)], -1)}


def _one_image(e, shape, **more):
    return {"pixel_values": e.randn(*shape, *e.size), **more}


def _tiles(e, count):
    ones = torch.ones(1, 1, count, dtype=torch.long)
    return _one_image(e, (1, 1, count, 3), aspect_ratio_ids=ones[..., 0], aspect_ratio_mask=ones)


def _kosmos(e):
    latents = _config_value(e.config, "latent_query_num", default=16)
    mask = torch.zeros(2, latents + 6, dtype=torch.bool)
    mask[:, 2 : latents + 2] = True
    return _one_image(e, (2, 3), input_ids=e.ids(latents + 6), image_embeds_position_mask=mask)


def _instructblip(e, frames=()):
    count = e.config.num_query_tokens * math.prod(frames or (1,))
    ids = torch.cat(
        [torch.full((2, count), e.config.image_token_index if not frames else e.config.video_token_index), e.ids(6)], 1
    )
    return _one_image(e, (2, *frames, 3), input_ids=ids, qformer_input_ids=e.ids(6))


def _detr_encoder(e):
    return {
        "vision_features": [e.randn(2, e.hidden, 4, 4)],
        "text_features": e.randn(2, 6, e.hidden),
        "vision_pos_embeds": [e.randn(2, e.hidden, 4, 4)],
        "spatial_sizes": [(4, 4)],
    }


def _detr_decoder(e):
    return {
        "vision_features": e.randn(2, 16, e.hidden),
        "text_features": e.randn(2, 6, e.hidden),
        "vision_pos_encoding": e.randn(2, 16, e.hidden),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }


# Inputs of the model types whose forward takes something special; tried before the guesses.
INPUTS = {
    **dict.fromkeys(["autoformer", "informer", "time_series_transformer"], _time_series),
    **dict.fromkeys(["qwen2_5_omni_audio_encoder", "qwen3_omni_moe_audio_encoder"], _omni_audio),
    **dict.fromkeys(["siglip2_vision_model"], _siglip2),
    **dict.fromkeys(["pix2struct_vision_model", "kosmos_2_5_vision_model"], _flattened_patches),
    **dict.fromkeys(["sam3_detr_encoder", "sam3_lite_text_detr_encoder"], _detr_encoder),
    **dict.fromkeys(["sam3_detr_decoder", "sam3_lite_text_detr_decoder"], _detr_decoder),
    **dict.fromkeys(
        ["minicpm_ocr_vision", "minicpmv4_6_vision", "minicpmv4_7_vision"],
        lambda e: {"pixel_values": e.randn(1, 3, 8, 128), "target_sizes": torch.tensor([[4, 4]])},
    ),
    **dict.fromkeys(
        ["patchtst", "patchtsmixer"],
        lambda e: {"past_values": e.randn(2, e.config.context_length, e.config.num_input_channels)},
    ),
    **dict.fromkeys(
        ["timesfm", "timesfm2_5"],
        lambda e: {
            "past_values": e.randn(2, 64),
            "past_values_padding": torch.zeros(2, 64, dtype=torch.long),
            "freq": torch.zeros(2, 1, dtype=torch.long),
        },
    ),
    **dict.fromkeys(
        ["musicgen", "musicgen_melody"],
        lambda e: {"input_ids": e.ids(TEXT_LENGTH), "decoder_input_ids": e.ids(5, 2 * e.config.decoder.num_codebooks)},
    ),
    "decision_transformer": lambda e: {
        "states": e.randn(2, 4, e.config.state_dim),
        "actions": e.randn(2, 4, e.config.act_dim),
        "rewards": e.randn(2, 4, 1),
        "returns_to_go": e.randn(2, 4, 1),
        "timesteps": torch.arange(4).repeat(2, 1),
        "attention_mask": torch.ones(2, 4),
    },
    "dia_decoder": lambda e: {
        "input_ids": torch.stack([e.ids(6)] * e.config.num_channels, -1),
        "encoder_hidden_states": e.randn(2, 6, e.config.cross_hidden_size),
    },
    "florence_vision": lambda e: {"hidden_states": e.randn(2, 3, 64, 64)},
    "gemma3n_audio": lambda e: {
        "audio_mel": e.randn(2, 64, e.config.input_feat_size),
        "audio_mel_mask": torch.zeros(2, 64, dtype=torch.bool),
    },
    "gemma4_audio": lambda e: {"input_features": e.randn(2, 64, 128)},
    "gemma4_vision": lambda e: {
        "pixel_values": e.randn(1, 36, 3 * e.config.patch_size**2),
        "pixel_position_ids": torch.tensor([[i // 6, i % 6] for i in range(36)])[None],
    },
    "idefics": lambda e: _one_image(
        e, (2, 1, 3), input_ids=e.ids(TEXT_LENGTH), image_attention_mask=torch.ones(2, TEXT_LENGTH, 1, dtype=torch.long)
    ),
    "instructblip": _instructblip,
    "instructblipvideo": lambda e: _instructblip(e, (2,)),
    "kosmos-2": _kosmos,
    "lxmert": lambda e: {
        "input_ids": e.ids(TEXT_LENGTH),
        "visual_feats": e.randn(2, 5, e.config.visual_feat_dim),
        "visual_pos": e.randn(2, 5, e.config.visual_pos_dim),
    },
    "mllama": lambda e: {
        **_tiles(e, e.config.vision_config.max_num_tiles),
        "input_ids": e.ids(TEXT_LENGTH, 1),
        "cross_attention_mask": torch.ones(1, TEXT_LENGTH, 1, e.config.vision_config.max_num_tiles),
    },
    "mllama_text_model": lambda e: {"input_ids": e.ids(TEXT_LENGTH), "cross_attention_states": e.randn(2, 6, e.hidden)},
    "mllama_vision_model": lambda e: _tiles(e, e.config.max_num_tiles),
    "molmo2_vision": lambda e: {"pixel_values": e.randn(2, 64, 3 * 64)},
    "moshi_depth": lambda e: {"input_ids": e.ids(3), "last_hidden_state": e.randn(2, 1, e.config.input_size)},
    "phi4_multimodal_audio": lambda e: {
        "hidden_states": e.randn(2, 64, e.config.input_size),
        "mask": torch.ones(2, 64, dtype=torch.bool),
    },
    "pix2struct": lambda e: {**_flattened_patches(e), "decoder_input_ids": e.ids(DECODER_LENGTH)},
    "siglip2": lambda e: {"input_ids": e.ids(TEXT_LENGTH), **_siglip2(e)},
    "speech-encoder-decoder": lambda e: {"input_values": e.randn(2, 2000), "decoder_input_ids": e.ids(DECODER_LENGTH)},
    "unlimited_ocr_vision_encoder": lambda e: {"patch_embeds": e.randn(2, e.hidden, 4, 4)},
    "clap": lambda e: {"input_ids": e.ids(TEXT_LENGTH), "input_features": e.randn(2, 1, 64, e.mels)},
    "clap_audio_model": lambda e: {"input_features": e.randn(2, 1, 64, e.mels)},
    "depth_pro": lambda e: {"pixel_values": e.randn(1, 3, 128, 128)},
    "muse_spark_audio": lambda e: {"input_values": e.randn(1, 3840)},
    "qwen3_asr_encoder": lambda e: {
        "input_features": e.randn(2, e.mels, 200),
        "input_features_mask": torch.ones(2, 200, dtype=torch.long),
    },
    "seggpt": lambda e: {
        n: e.randn(1, 3, e.size[0] // 2, e.size[1]) for n in ("pixel_values", "prompt_pixel_values", "prompt_masks")
    },
    "tvp": lambda e: {"input_ids": e.ids(TEXT_LENGTH), "pixel_values": e.randn(2, e.config.num_frames, 3, 32, 32)},
    "voxtral_realtime": lambda e: {"input_ids": e.ids(8), "input_features": e.randn(2, e.mels, 64)},
    "xclip_vision_model": lambda e: _one_image(e, (2 * e.config.num_frames, 3)),
}


def _tensors(value):
    """Floating-point tensors in a model's output; caches and other objects are passed over."""
    if torch.is_tensor(value):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


@torch.no_grad()
def outputs(model, inputs, seed=0):
    """All floating-point tensors of the model's output, the same at every call."""
    names = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in names and "use_cache" not in inputs else {}
    torch.manual_seed(seed)
    return list(_tensors(model(**copy.deepcopy(inputs), **extra)))


def _fit_inputs(model, seed):
    reasons = collections.Counter()
    last = None
    try:
        candidates = list(_Examples(model, seed).candidates())
    except (TypeError, AttributeError, ValueError) as error:
        raise NotBuilt("forward", f"no example inputs: {type(error).__name__}: {error}") from error
    for inputs in candidates:
        try:
            found = outputs(model, inputs, seed)
        except TimeoutError:
            raise
        except Exception as error:
            last = f"{type(error).__name__}: {error} (inputs {', '.join(inputs)})"
            reasons[last] += 1
            continue
        if found and all(torch.isfinite(t).any() for t in found[:1]):
            return inputs
        last = "no finite float output"
    first = next(iter(reasons), last)
    parameters = list(inspect.signature(model.forward).parameters)
    raise NotBuilt("forward", first or f"no example inputs for forward({', '.join(parameters[:6])}, ...)")


def build(model_type, seed=0):
    """A tiny random model of this type in eval mode, and keyword inputs on which it runs; raises NotBuilt."""
    failures = []
    with warnings.catch_warnings(), _time_limit(SECONDS):
        warnings.simplefilter("ignore")
        for profile in PROFILES:
            try:
                return _build(model_type, seed, profile)
            except NotBuilt as error:
                failures.append(error)
            except TimeoutError as error:
                raise NotBuilt("forward", error) from None
    stages = ("config", "model", "forward")
    raise max(failures, key=lambda error: stages.index(error.kind))


def _build(model_type, seed, profile):
    try:
        config = _default_config(model_type)
        config = shrink(config, {**profile, "tokens": {}})
    except TimeoutError:
        raise
    except Exception as error:
        raise NotBuilt("config", f"{type(error).__name__}: {error}") from error
    failures = []
    try:
        classes = _classes(model_type, config)
    except Exception as error:
        raise NotBuilt("model", f"{type(error).__name__}: {error}") from error
    for cls in classes[:3]:
        try:
            model = _instantiate(cls, config, seed)
        except TimeoutError:
            raise
        except Exception as error:
            failures.append(NotBuilt("model", f"{cls.__name__}: {type(error).__name__}: {error}"))
            continue
        try:
            return model, _fit_inputs(model, seed)
        except NotBuilt as error:
            failures.append(NotBuilt("forward", f"{cls.__name__}: {error.reason}"))
    raise failures[0] if failures else NotBuilt("model", "no model class takes this config")


def _default_config(model_type):
    return CONFIG_MAPPING[model_type]()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("types", nargs="*")
    parser.add_argument("--json", help="write type -> status, reason, seconds, parameters to this file")
    options = parser.parse_args()
    logging.set_verbosity_error()
    report = {}
    for model_type in options.types or model_types():
        start = time.time()
        entry = {"status": "runs", "reason": "", "parameters": 0}
        try:
            model, inputs = build(model_type)
            entry["parameters"] = sum(p.numel() for p in model.parameters())
            entry["class"] = type(model).__name__
            entry["inputs"] = {k: list(getattr(v, "shape", [])) for k, v in inputs.items()}
            del model
        except NotBuilt as error:
            entry.update(status=error.kind, reason=error.reason)
        entry["seconds"] = round(time.time() - start, 2)
        report[model_type] = entry
        print(
            f"{entry['seconds']:6.2f} s {entry['parameters']:9d} {entry['status']:8s} {model_type} {entry['reason']}",
            flush=True,
        )
    print(dict(collections.Counter(entry["status"] for entry in report.values())))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
