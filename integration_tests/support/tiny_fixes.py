"""What the names of a configuration's fields do not tell: the sizes that only work together, by family or class."""

from __future__ import annotations

from typing import Any

from integration_tests.support.tiny_configs import VOCAB

_PERCEIVER = {"d_latents": 384, "d_model": 64, "num_latents": 16, "num_self_attends_per_block": 4}

_DECODER = {"decoder_start_token_id": 1, "pad_token_id": 0}

_ROPE = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}
_VQ = {"base_channels": 32, "channel_multiplier": (1, 1), "latent_channels": 32}
_SECTIONS = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
}

FIXES: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {"vocabulary_map": {"<image>": 100}, "vq_config": {**_VQ, "resolution": 32}},
    "cohere_compass_text": {"rope_parameters": _ROPE},
    "cohere_compass": {"text_config": {"rope_parameters": _ROPE}},
    "bamba": {"attn_layer_indices": [1, 3]},
    "data2vec-audio": {"conv_pos_kernel_size": 3},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "efficientnet": {"image_size": 32, "width_coefficient": 0.5, "depth_coefficient": 0.4, "hidden_dim": 640},
    "emu3": {"vocabulary_map": {"<image>": 100}, "vq_config": _VQ},
    "deepseek_vl_hybrid": {"high_res_vision_config": {"output_channels": 16}},
    "encoder-decoder": {"parts": {"encoder": "bert", "decoder": "bert"}, **_DECODER},
    "esm": {"vocab_size": VOCAB, "mask_token_id": 4, "position_embedding_type": "rotary"},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "janus": {"vq_config": {**_VQ, "image_token_embed_dim": 64, "num_embeddings": 32}},
    "kimi_k25": {"vision_config": {"pos_emb_height": 4, "pos_emb_width": 4}},
    "kosmos-2": {"latent_query_num": 4},
    "kosmos-2.5": {"latent_query_num": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "chunk_size": 16, "n_groups": 1},
    "minicpm_ocr": {"vision_config": {"intermediate_size": 64}},
    "minicpmv4_6": {"vision_config": {"intermediate_size": 64}},
    "minicpmv4_7": {"vision_config": {"intermediate_size": 64}},
    "perceiver": {
        **_PERCEIVER, "max_position_embeddings": 16, "num_self_attention_heads": 4, "num_cross_attention_heads": 1
    },
    "PerceiverForImageClassificationFourier": {"d_model": 261},
    "PerceiverForImageClassificationConvProcessing": {"d_model": 322},
    "phi4_multimodal": {"audio_config": {"num_blocks": 2, "nemo_conv_channels": 32}},
    "pp_lcnet": {"class_expand": 64},
    "reformer": {
        "axial_pos_shape": (4, 4), "axial_pos_embds_dim": (32, 32), "attn_layers": ("local", "lsh") * 2,
        "num_buckets": 2, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
    },
    "ReformerModelWithLMHead": {"is_decoder": True},
    "speech-encoder-decoder": {"parts": {"encoder": "wav2vec2", "decoder": "bert"}, **_DECODER},
    "textnet": {"hidden_sizes": [16, 16, 32, 48, 64]},
    "udop": {"decoder_start_token_id": 1},
    "vision-encoder-decoder": {"parts": {"encoder": "vit", "decoder": "bert"}, **_DECODER},
    "wav2vec2-bert": {"vocab_size": VOCAB},
    "wav2vec2-conformer": {"vocab_size": VOCAB},
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "layer_types": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "layer_types": ["mamba", "hybrid"] * 2},
}  # fmt: skip
_OF_QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
FIXES |= dict.fromkeys(("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", *_OF_QWEN), _SECTIONS)
