"""What the names of a configuration's fields do not tell: the sizes that only work together, by family or class."""

from __future__ import annotations

from typing import Any

from integration_tests.support.tiny_configs import VOCAB

_PERCEIVER = {"d_latents": 128, "d_model": 64, "num_latents": 16, "num_self_attends_per_block": 4}

FIXES: dict[str, dict[str, Any]] = {
    "esm": {"vocab_size": VOCAB, "mask_token_id": 4, "position_embedding_type": "rotary"},
    "reformer": {"axial_pos_shape": (4, 4), "axial_pos_embds_dim": (32, 32), "attn_layers": ("local", "lsh") * 2,
                 "num_buckets": 2, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "perceiver": {**_PERCEIVER, "max_position_embeddings": 16, "num_self_attention_heads": 4, "num_cross_attention_heads": 1},
    "PerceiverForImageClassificationFourier": {**_PERCEIVER, "d_model": 261, "num_cross_attention_heads": 1},
    "PerceiverForImageClassificationConvProcessing": {**_PERCEIVER, "d_model": 322, "num_cross_attention_heads": 1},
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "efficientnet": {"image_size": 32, "width_coefficient": 0.5, "depth_coefficient": 0.4},
    "vision-encoder-decoder": {"parts": {"encoder": "vit", "decoder": "bert"}, "decoder_start_token_id": 1, "pad_token_id": 0},
    "speech-encoder-decoder": {"parts": {"encoder": "wav2vec2", "decoder": "bert"}, "decoder_start_token_id": 1, "pad_token_id": 0},
    "encoder-decoder": {"parts": {"encoder": "bert", "decoder": "bert"}, "decoder_start_token_id": 1, "pad_token_id": 0},
    "wav2vec2-conformer": {"vocab_size": VOCAB},
    "textnet": {"hidden_sizes": [16, 16, 32, 48, 64]},
}  # fmt: skip
