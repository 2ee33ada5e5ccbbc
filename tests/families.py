"""Tiny models of transformers, one for each family and task, with batches that every rank can make.

A batch is made of the step and a number of rows: the same rows whoever makes it. All rows have as many labels, so the
mean of the losses of equal parts is the loss of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

T = pytest.importorskip("transformers")

VOCAB = 60
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {**{k: v for k, v in TEXT.items() if k != "num_key_value_heads"}, **NO_DROPOUT}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
SIDES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


ESM: dict[str, Any] = {
    **{k: v for k, v in BERT.items() if k not in ("vocab_size", "pad_token_id", "bos_token_id")},
    "vocab_size": 33,
    "pad_token_id": 1,
    "mask_token_id": 32,
    "position_embedding_type": "rotary",
    "token_dropout": True,
    "emb_layer_norm_before": False,
}
TRUNK: dict[str, Any] = {
    "num_blocks": 3,
    "sequence_state_dim": 16,
    "pairwise_state_dim": 8,
    "sequence_head_width": 8,
    "pairwise_head_width": 4,
    "chunk_size": None,
    "structure_module": {
        "sequence_dim": 16,
        "pairwise_dim": 8,
        "ipa_dim": 4,
        "resnet_dim": 8,
        "num_heads_ipa": 2,
        "num_qk_points": 2,
        "num_v_points": 2,
        "num_blocks": 2,
        "dropout_rate": 0.0,
    },
}
"""ESMFold's trunk, with three folding blocks."""
RESIDUES = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>")


def randint(step: int, rows: int, low: int, high: int) -> torch.Tensor:
    return torch.randint(low, high, (rows, 8), generator=torch.Generator().manual_seed(step))


def ids(step: int, rows: int = 2) -> torch.Tensor:
    return randint(step, rows, 3, VOCAB - 2)


def images(step: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def t5() -> nn.Module:
    config = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 3}
    return T.T5ForConditionalGeneration(
        T.T5Config(**config, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
    )


def whisper(encoder: int = 8, decoder: int = 2) -> nn.Module:
    sizes = {**SIDES, "encoder_layers": encoder, "decoder_layers": decoder}
    more = {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
    quiet = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return T.WhisperForConditionalGeneration(T.WhisperConfig(**sizes, **more, **quiet))


def llava() -> nn.Module:
    vision, text = T.CLIPVisionConfig(**VISION), T.LlamaConfig(**TEXT)
    return T.LlavaForConditionalGeneration(
        T.LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCAB - 1)
    )


def jamba() -> nn.Module:
    experts = {"num_experts": 2, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
    mamba = {"use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 2, "attn_layer_period": 2}
    return T.JambaForCausalLM(
        T.JambaConfig(**{**TEXT, "num_hidden_layers": 4}, **experts, **mamba, attn_layer_offset=1)
    )


def zamba() -> nn.Module:
    """Mamba layers, two of which share a transformer block."""
    mamba = {"use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 2, "n_mamba_heads": 2}
    kinds = ["mamba", "hybrid", "mamba", "hybrid"]
    sizes = {**TEXT, "num_hidden_layers": 4, "attention_head_dim": 16}
    return T.ZambaForCausalLM(T.ZambaConfig(**sizes, **mamba, layers_block_type=kinds))


def swin() -> nn.Module:
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2}
    config = T.SwinConfig(**sizes, drop_path_rate=0.0, num_labels=2, attn_implementation="eager")
    return T.SwinForImageClassification(config)


def resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}
    return T.ResNetForImageClassification(T.ResNetConfig(**sizes, num_labels=2))


def mixtral() -> nn.Module:
    return T.MixtralForCausalLM(T.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2))


def esm2() -> nn.Module:
    model = T.EsmForMaskedLM(T.EsmConfig(**ESM))
    model.esm.contact_head.requires_grad_(False)
    return model


def esmfold() -> nn.Module:
    """ESMFold with its language model in fp32, and without the heads that a loss of distances does not reach."""
    more = {"is_folding_model": True, "vocab_list": RESIDUES}
    config = T.EsmConfig(**ESM, **more, esmfold_config={"fp16_esm": False, "lddt_head_hid_dim": 8, "trunk": TRUNK})
    model = T.EsmForProteinFolding(config)
    for untrained in (model.lm_head, model.lddt_head, model.ptm_head):
        untrained.requires_grad_(False)
    return model


def of_text(step: int, rows: int = 2) -> dict[str, Any]:
    return {"input_ids": ids(step, rows), "labels": ids(step, rows)}


def of_image(step: int, rows: int = 2) -> dict[str, Any]:
    tokens = ids(step, rows)
    tokens[:, :4] = VOCAB - 1
    return {"input_ids": tokens, "pixel_values": images(step, rows), "labels": ids(step, rows)}


def of_class(step: int, rows: int = 2) -> dict[str, Any]:
    return {"input_ids": ids(step, rows), "labels": torch.arange(rows) * step % 2}


def of_image_class(step: int, rows: int = 2) -> dict[str, Any]:
    return {"pixel_values": images(step, rows), "labels": torch.arange(rows) * step % 2}


def of_reward(step: int, rows: int = 2) -> dict[str, Any]:
    return {"input_ids": ids(step, rows), "labels": ids(step, rows)[:, 0] / VOCAB}


def of_sound(step: int, rows: int = 2) -> dict[str, Any]:
    sound = torch.randn(rows, 8, 16, generator=torch.Generator().manual_seed(step))
    return {"input_features": sound, "labels": ids(step, rows)}


def of_span(step: int, rows: int = 2) -> dict[str, Any]:
    at = torch.arange(1, 1 + rows)
    return {"input_ids": ids(step, rows), "start_positions": at, "end_positions": at + step % 3}


def of_tags(step: int, rows: int = 2) -> dict[str, Any]:
    return {"input_ids": ids(step, rows), "labels": ids(step, rows) % 2}


def of_residues(step: int, rows: int = 2) -> dict[str, Any]:
    """Every fourth residue is hidden, and is the label."""
    true = randint(step, rows, 4, 24)
    hidden = torch.arange(8) % 4 == step % 4
    return {"input_ids": true.masked_fill(hidden, 32), "labels": true.masked_fill(~hidden, -100)}


def of_fold(step: int, rows: int = 2) -> dict[str, Any]:
    return {"input_ids": randint(step, rows, 0, 20), "num_recycles": step % 2}


def loss_of(output: Any) -> torch.Tensor:
    """The loss of a model's output; of ESMFold's the distance of its distogram and structure from a straight chain."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    logits, folded = output.distogram_logits, output.positions[-1][:, :, 1]
    rows, length = logits.shape[:2]
    apart = (torch.arange(length)[:, None] - torch.arange(length)).abs().expand(rows, length, length)
    return (
        F.cross_entropy(logits.flatten(0, 2), (4 * apart).clamp(max=63).flatten())
        + (torch.cdist(folded, folded) - 3.8 * apart).abs().mean() / 10
    )


Batch = Callable[..., dict[str, Any]]
MODELS: dict[str, tuple[Callable[[], nn.Module], Batch, str]] = {
    "llama classifier": (
        lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**TEXT)), of_class, "score"
    ),
    "reward": (
        lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**TEXT, num_labels=1)), of_reward, "score"
    ),
    "llama tagger": (
        lambda: T.LlamaForTokenClassification(T.LlamaConfig(**TEXT, classifier_dropout=0.0)), of_tags, "score"
    ),
    "bert classifier": (lambda: T.BertForSequenceClassification(T.BertConfig(**BERT)), of_class, "classifier"),
    "bert tagger": (lambda: T.BertForTokenClassification(T.BertConfig(**BERT)), of_tags, "classifier"),
    "bert answers": (lambda: T.BertForQuestionAnswering(T.BertConfig(**BERT)), of_span, "qa_outputs"),
    "masked bert": (lambda: T.BertForMaskedLM(T.BertConfig(**BERT)), of_text, "cls.predictions.transform.dense"),
    "vit": (
        lambda: T.ViTForImageClassification(T.ViTConfig(**VISION | {"num_hidden_layers": 3}, **NO_DROPOUT)),
        of_image_class,
        "classifier",
    ),
    "t5": (t5, of_text, "encoder.block.0.layer.0.SelfAttention.q"),
    "bart": (lambda: T.BartForConditionalGeneration(T.BartConfig(**SIDES)), of_text, "model.encoder.layers.0.fc1"),
    "whisper": (whisper, of_sound, "model.decoder.layers.0.fc1"),
    "llava": (llava, of_image, "model.multi_modal_projector.linear_1"),
    "jamba": (jamba, of_text, "model.layers.0.mamba.in_proj"),
    "zamba": (zamba, of_text, "model.layers.1.shared_transf.feed_forward.down_proj"),
    "swin": (swin, of_image_class, "swin.encoder.layers.0.downsample.reduction"),
    "resnet": (resnet, of_image_class, "resnet.encoder.stages.0.layers.0.layer.0.convolution"),
    "mixtral": (mixtral, of_text, "model.layers.0.self_attn.q_proj"),
    "esm2": (esm2, of_residues, "lm_head.dense"),
    "esmfold": (esmfold, of_fold, "esm_s_mlp.1"),
}  # fmt: skip
"""By family: the model, its batches, and a module that must train."""


def made(name: str) -> tuple[nn.Module, Batch, str]:
    make, batch, watched = MODELS[name]
    torch.manual_seed(0)
    return make().train(), batch, f"{watched}.weight"
