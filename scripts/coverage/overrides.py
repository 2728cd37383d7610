"""Settings of single model types that no rule on names can know."""

from scripts.coverage.sizes import FIRST_SPECIAL, HEADS, HIDDEN, MLP

_HGNET_OUT = [48, 64, 64]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# By the `model_type` of the config, also where it is a sub-config.
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
