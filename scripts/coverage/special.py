"""Inputs of the model types whose `forward` takes something special. Draws come as ``d``."""

import math
from typing import Any

import torch

from scripts.coverage.draws import Draws
from scripts.coverage.reading import nearest
from scripts.coverage.sizes import DECODER_LENGTH, HIDDEN, TEXT_LENGTH


def special_inputs(d: Draws) -> dict[str, Any] | None:
    """Keyword arguments for a model of the type of ``d.config``, or None if the usual guesses do."""
    inputs = _INPUTS.get(d.config.model_type)
    return inputs(d) if inputs else None


def _time_series(d: Draws) -> dict[str, Any]:
    return {
        "past_values": d.randn(2, 10),
        "past_time_features": d.randn(2, 10, 2),
        "future_values": d.randn(2, 4),
        "past_observed_mask": torch.ones(2, 10),
        "future_time_features": d.randn(2, 4, 2),
    }


def _omni_audio(d: Draws) -> dict[str, Any]:
    return {
        "input_features": d.randn(d.mels, 64),
        "feature_lens": torch.tensor([64]),
        "aftercnn_lens": torch.tensor([32]),
    }


def _siglip2(d: Draws) -> dict[str, Any]:
    return {
        "pixel_values": d.randn(2, 16, 3 * 64),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def _flattened_patches(d: Draws) -> dict[str, Any]:
    width = nearest(d.config, "patch_embed_hidden_size", default=HIDDEN)
    place = torch.tensor([[i // 3 + 1, i % 3 + 1] for i in range(6)]).float().expand(2, 6, 2)
    return {"flattened_patches": torch.cat([place, d.randn(2, 6, width)], -1)}


def _one_image(d: Draws, shape: tuple[int, ...], **more: Any) -> dict[str, Any]:
    return {"pixel_values": d.randn(*shape, *d.size), **more}


def _tiles(d: Draws, count: int) -> dict[str, Any]:
    ones = torch.ones(1, 1, count, dtype=torch.long)
    return _one_image(d, (1, 1, count, 3), aspect_ratio_ids=ones[..., 0], aspect_ratio_mask=ones)


def _kosmos(d: Draws) -> dict[str, Any]:
    latents = nearest(d.config, "latent_query_num", default=16)
    mask = torch.zeros(2, latents + 6, dtype=torch.bool)
    mask[:, 2 : latents + 2] = True
    return _one_image(d, (2, 3), input_ids=d.ids(latents + 6), image_embeds_position_mask=mask)


def _instructblip(d: Draws, frames: tuple[int, ...] = ()) -> dict[str, Any]:
    count = d.config.num_query_tokens * math.prod(frames or (1,))
    token = d.config.video_token_index if frames else d.config.image_token_index
    ids = torch.cat([torch.full((2, count), token), d.ids(6)], 1)
    return _one_image(d, (2, *frames, 3), input_ids=ids, qformer_input_ids=d.ids(6))


def _detr_encoder(d: Draws) -> dict[str, Any]:
    return {
        "vision_features": [d.randn(2, d.hidden, 4, 4)],
        "text_features": d.randn(2, 6, d.hidden),
        "vision_pos_embeds": [d.randn(2, d.hidden, 4, 4)],
        "spatial_sizes": [(4, 4)],
    }


def _detr_decoder(d: Draws) -> dict[str, Any]:
    return {
        "vision_features": d.randn(2, 16, d.hidden),
        "text_features": d.randn(2, 6, d.hidden),
        "vision_pos_encoding": d.randn(2, 16, d.hidden),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }


# By the model type of the config; a type that is not here is guessed at, see `candidates`.
_INPUTS = {
    **dict.fromkeys(["autoformer", "informer", "time_series_transformer"], _time_series),
    **dict.fromkeys(["qwen2_5_omni_audio_encoder", "qwen3_omni_moe_audio_encoder"], _omni_audio),
    **dict.fromkeys(["siglip2_vision_model"], _siglip2),
    **dict.fromkeys(["pix2struct_vision_model", "kosmos_2_5_vision_model"], _flattened_patches),
    **dict.fromkeys(["sam3_detr_encoder", "sam3_lite_text_detr_encoder"], _detr_encoder),
    **dict.fromkeys(["sam3_detr_decoder", "sam3_lite_text_detr_decoder"], _detr_decoder),
    **dict.fromkeys(
        ["minicpm_ocr_vision", "minicpmv4_6_vision", "minicpmv4_7_vision"],
        lambda d: {"pixel_values": d.randn(1, 3, 8, 128), "target_sizes": torch.tensor([[4, 4]])},
    ),
    **dict.fromkeys(
        ["patchtst", "patchtsmixer"],
        lambda d: {"past_values": d.randn(2, d.config.context_length, d.config.num_input_channels)},
    ),
    **dict.fromkeys(
        ["timesfm", "timesfm2_5"],
        lambda d: {
            "past_values": d.randn(2, 64),
            "past_values_padding": torch.zeros(2, 64, dtype=torch.long),
            "freq": torch.zeros(2, 1, dtype=torch.long),
        },
    ),
    **dict.fromkeys(
        ["musicgen", "musicgen_melody"],
        lambda d: {"input_ids": d.ids(TEXT_LENGTH), "decoder_input_ids": d.ids(5, 2 * d.config.decoder.num_codebooks)},
    ),
    "decision_transformer": lambda d: {
        "states": d.randn(2, 4, d.config.state_dim),
        "actions": d.randn(2, 4, d.config.act_dim),
        "rewards": d.randn(2, 4, 1),
        "returns_to_go": d.randn(2, 4, 1),
        "timesteps": torch.arange(4).repeat(2, 1),
        "attention_mask": torch.ones(2, 4),
    },
    "dia_decoder": lambda d: {
        "input_ids": torch.stack([d.ids(6)] * d.config.num_channels, -1),
        "encoder_hidden_states": d.randn(2, 6, d.config.cross_hidden_size),
    },
    "florence_vision": lambda d: {"hidden_states": d.randn(2, 3, 64, 64)},
    "gemma3n_audio": lambda d: {
        "audio_mel": d.randn(2, 64, d.config.input_feat_size),
        "audio_mel_mask": torch.zeros(2, 64, dtype=torch.bool),
    },
    "gemma4_audio": lambda d: {"input_features": d.randn(2, 64, 128)},
    "gemma4_vision": lambda d: {
        "pixel_values": d.randn(1, 36, 3 * d.config.patch_size**2),
        "pixel_position_ids": torch.tensor([[i // 6, i % 6] for i in range(36)])[None],
    },
    "idefics": lambda d: _one_image(
        d, (2, 1, 3), input_ids=d.ids(TEXT_LENGTH), image_attention_mask=torch.ones(2, TEXT_LENGTH, 1, dtype=torch.long)
    ),
    "instructblip": _instructblip,
    "instructblipvideo": lambda d: _instructblip(d, (2,)),
    "kosmos-2": _kosmos,
    "lxmert": lambda d: {
        "input_ids": d.ids(TEXT_LENGTH),
        "visual_feats": d.randn(2, 5, d.config.visual_feat_dim),
        "visual_pos": d.randn(2, 5, d.config.visual_pos_dim),
    },
    "mllama": lambda d: {
        **_tiles(d, d.config.vision_config.max_num_tiles),
        "input_ids": d.ids(TEXT_LENGTH, 1),
        "cross_attention_mask": torch.ones(1, TEXT_LENGTH, 1, d.config.vision_config.max_num_tiles),
    },
    "mllama_text_model": lambda d: {"input_ids": d.ids(TEXT_LENGTH), "cross_attention_states": d.randn(2, 6, d.hidden)},
    "mllama_vision_model": lambda d: _tiles(d, d.config.max_num_tiles),
    "molmo2_vision": lambda d: {"pixel_values": d.randn(2, 64, 3 * 64)},
    "moshi_depth": lambda d: {"input_ids": d.ids(3), "last_hidden_state": d.randn(2, 1, d.config.input_size)},
    "phi4_multimodal_audio": lambda d: {
        "hidden_states": d.randn(2, 64, d.config.input_size),
        "mask": torch.ones(2, 64, dtype=torch.bool),
    },
    "pix2struct": lambda d: {**_flattened_patches(d), "decoder_input_ids": d.ids(DECODER_LENGTH)},
    "siglip2": lambda d: {"input_ids": d.ids(TEXT_LENGTH), **_siglip2(d)},
    "speech-encoder-decoder": lambda d: {"input_values": d.randn(2, 2000), "decoder_input_ids": d.ids(DECODER_LENGTH)},
    "unlimited_ocr_vision_encoder": lambda d: {"patch_embeds": d.randn(2, d.hidden, 4, 4)},
    "clap": lambda d: {"input_ids": d.ids(TEXT_LENGTH), "input_features": d.randn(2, 1, 64, d.mels)},
    "clap_audio_model": lambda d: {"input_features": d.randn(2, 1, 64, d.mels)},
    "depth_pro": lambda d: {"pixel_values": d.randn(1, 3, 128, 128)},
    "muse_spark_audio": lambda d: {"input_values": d.randn(1, 3840)},
    "qwen3_asr_encoder": lambda d: {
        "input_features": d.randn(2, d.mels, 200),
        "input_features_mask": torch.ones(2, 200, dtype=torch.long),
    },
    "seggpt": lambda d: {
        n: d.randn(1, 3, d.size[0] // 2, d.size[1]) for n in ("pixel_values", "prompt_pixel_values", "prompt_masks")
    },
    "tvp": lambda d: {"input_ids": d.ids(TEXT_LENGTH), "pixel_values": d.randn(2, d.config.num_frames, 3, 32, 32)},
    "voxtral_realtime": lambda d: {"input_ids": d.ids(8), "input_features": d.randn(2, d.mels, 64)},
    "xclip_vision_model": lambda d: _one_image(d, (2 * d.config.num_frames, 3)),
}
