"""Configurations of transformers made small by the names of their fields, so that any class can be built on a CPU."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from transformers import CONFIG_MAPPING

VOCAB = 112
WIDTH, LAYERS, HEADS = 64, 4, 4
FIRST_SPECIAL = 80
"""Token ids from here on are those of images, sounds and the like; a text has smaller ones."""

# The first pattern that matches the whole name of a field decides. None: the field stays as it is.
_FIXED: list[tuple[str, int | None]] = [
    (r"type_vocab_size|.*_(bucket|group)_vocab|spkr_.*|lang_embed_dim|num_hidden_groups", None),
    (r"(.*_)?vocab_size(_per_layer_input)?|unpadded_vocab_size", VOCAB),
    (r"hidden_size_per_layer_input", 16),
    (r"moe_.*intermediate_size|shared_.*intermediate_size|.*expert.*(intermediate|ffn).*size", 32),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|feed_forward_size|dim_ff)|d_ff|dff|d_inner|n_inner", 4 * WIDTH),
    (r"qk_(rope|nope)_head_dim", 8),
    (r"head_dim|.*_head_dim|d_kv|attention_head_size|kv_channels|dim_head|d_head", 16),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|emb_dim|embedding_dim|hidden_dim|dim|width)", WIDTH),
    (r"out_hidden_size|projection_dim|d_latents", WIDTH),
    (r".*(num_hidden_layers|encoder_layers|decoder_layers)|n_layers?|num_layers|layers|depth|encoder_depth", LAYERS),
    (r".*(key_value_heads|kv_heads)", 2),
    (r".*attention_heads|n_heads?|num_heads|heads", HEADS),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|num_experts_per_token", 2),
    (r"n_group|topk_group|first_k_dense_replace", 1),
    (r"(kv|q|o)_lora_rank|state_size|mamba_d_state|ssm_state_size|mamba_dt_rank", 16),
    (r"max_position_embeddings|n_positions|max_(source|target)_positions|n_ctx|max_seq_len", 128),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_chunk_size", 16),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"sliding_window|local_attention|attention_window|attention_chunk_size", 16),
    (r"image_size|input_size", 32),
    (r"patch_size", 8),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers", 0),
    (r"num_mel_bins|feature_size|input_feat_per_channel", 16),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups", 4),
    (r"classifier_proj_size|conv_channels|subsampling_conv_channels|d_conv_channels|output_channels", 32),
    (r"adaptor_(kernel_size|stride)", 2),
    (r"decoder_hidden_layers", 2),
]  # fmt: skip
_DEPTHS = re.compile(r".*(num_hidden_layers|encoder_layers|decoder_layers)|n_layers?|num_layers|layers|depth")
_SIZES = re.compile(r".*(size|dim|dims|rank|width|d_model|d_ff|d_kv|d_inner|n_inner|n_embd|channels|sizes|latents|dff)")
_NOT_SIZES = re.compile(
    r".*(vocab_size|image_size|patch_size|kernel_size|window_size|chunk_size|block_size|merge_size|num_channels|"
    r"patch_sizes|kernel_sizes|block_sizes|vocab_sizes|batch_size|train_size|in_channels|input_channels|rotary_dim|"
    r"window_sizes|pool_size|unit_size|temporal_patch_size|hidden_act|resblock.*|axial.*)"
)
_TOKEN = re.compile(r".*(_token_id|_token_index|_tok_id|_start_id|_end_id|_newline_id|_patch_id|_index)")
_NOT_TOKENS = {"semantic_loss_ignore_index", "sparse_pred_ignore_index", "altup_active_idx", "aux_loss_ignore_index"}
_CHANCE = re.compile(r".*(dropout|drop|drop_rate|layerdrop|dropout_prob|mask_time_prob|mask_feature_prob|_pdrop)")
"""Dropout, and layers or places that are left out by chance."""
_SEQUENCE = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

Change = Callable[[str, Any], Any]


def recipes(config_class: type, fixes: Mapping[str, Any], problems: list[str]) -> Iterator[Any]:
    """Small configurations of a class, that of the most usual sizes first.

    Args:
        fixes: what the names do not tell, for this class; a dict for each part that is a configuration. ``parts`` names
            the families of the parts of a composed one.
        problems: gets why one cannot be made.
    """
    for change in (_fixed, partial(_scaled, 16), partial(_scaled, 4), _shallow):
        try:
            made = _small(config_class, change, fixes, _Tokens())
        except Exception as error:  # the next one may be a possible combination of sizes
            problems.append(f"{type(error).__name__}: {str(error)[:200]}")
        else:
            yield made


class _Tokens:
    """Gives each special token an id of its own, the same in all parts of a configuration."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def id_of(self, name: str) -> int:
        if name in _SEQUENCE:
            return _SEQUENCE[name]
        return self._ids.setdefault(name, FIRST_SPECIAL + len(self._ids))


def _fixed(name: str, value: Any) -> Any:
    if isinstance(value, int):
        for pattern, small in _FIXED:
            if re.fullmatch(pattern, name):
                return value if small is None else min(value, small) if value > 0 else value
    return _shorter(name, value)


def _scaled(factor: int, name: str, value: Any) -> Any:
    """All sizes by the same power of two, so that what was divisible mostly stays so."""
    return _shallow(name, _by(factor, name, value))


def _shallow(name: str, value: Any) -> Any:
    """The depth, the vocabulary and the number of experts alone."""
    if isinstance(value, int):
        if _DEPTHS.fullmatch(name):
            return min(value, LAYERS)
        if re.fullmatch(r"(.*_)?vocab_size(_per_layer_input)?", name) and name != "type_vocab_size":
            return min(value, VOCAB)
        if re.fullmatch(r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", name):
            return min(value, 8)
        if re.fullmatch(r"num_experts_per_tok|moe_topk|moe_k", name):
            return min(value, 2)
    return value


def _by(factor: int, name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_by(factor, name, entry) for entry in value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 32:
        return value
    return max(value // factor, 8) if _SIZES.fullmatch(name) and not _NOT_SIZES.fullmatch(name) else value


def _shorter(name: str, value: Any) -> Any:
    """Widths and depths of stages, and of a stack of convolutions."""
    if not isinstance(value, list | tuple) or not value or not all(type(entry) is int for entry in value):
        return value
    if name in ("depths", "layers", "stage_num_blocks", "num_block_repeats"):
        return type(value)(2 for _ in value)
    if name in ("conv_dim", "tdnn_dim"):
        return type(value)(32 for _ in value)
    return value


def _small(config_class: type, change: Change, fixes: Mapping[str, Any], tokens: _Tokens, base: Any = None) -> Any:
    if composed := fixes.get("parts"):
        small = {name: _small(CONFIG_MAPPING[family], change, {}, tokens) for name, family in composed.items()}
        more = {name: value for name, value in fixes.items() if name != "parts"}
        return config_class(**{name: part.to_dict() for name, part in small.items()}, **more)
    base = base or _default(config_class)
    kwargs: dict[str, Any] = {}
    parts: Mapping[str, type] = getattr(config_class, "sub_configs", {})
    for field in dataclasses.fields(config_class):
        name = field.name
        if name in parts or (isinstance(fixes.get(name), Mapping) and name.endswith("_config")):
            continue
        value = field.default
        if _TOKEN.fullmatch(name) and name not in _NOT_TOKENS and _is_token(value, name):
            kwargs[name] = tokens.id_of(name)
        elif isinstance(value, float) and _CHANCE.fullmatch(name):
            kwargs[name] = 0.0
        elif value is not dataclasses.MISSING and value is not None and not isinstance(value, bool | str):
            small = change(name, value)
            if small != value:
                kwargs[name] = small
    kwargs |= _of_heads(config_class, base, kwargs)
    if rope := _sections(_value(base, "rope_parameters"), base, kwargs):
        kwargs["rope_parameters"] = rope
    for name in parts:
        part = getattr(base, name, None)
        if part is not None and dataclasses.is_dataclass(part):
            small = _small(type(part), change, fixes.get(name, {}), tokens, part)
            kwargs[name] = small
    return config_class(**{**kwargs, **{n: v for n, v in fixes.items() if n not in parts}})


def _of_heads(config_class: type, base: Any, kwargs: Mapping[str, Any]) -> dict[str, int]:
    """What follows from the number of heads and experts where a configuration leaves it open."""
    open_ = {field.name for field in dataclasses.fields(config_class) if _value(base, field.name, 0) is None}
    made: dict[str, int] = {}
    heads = kwargs.get("num_attention_heads", _value(base, "num_attention_heads"))
    equal = _value(base, "num_attention_heads") == _value(base, "num_key_value_heads", 0)
    if isinstance(heads, int) and (equal or "num_key_value_heads" in open_):
        made["num_key_value_heads"] = heads
    width = kwargs.get("hidden_size", _value(base, "hidden_size"))
    if isinstance(heads, int) and isinstance(width, int) and "head_dim" in open_:
        made["head_dim"] = width // heads
    return made | ({"num_experts_per_tok": 2} if "num_experts_per_tok" in open_ else {})


def _sections(rope: Any, base: Any, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rotary parameters whose sections of a head (of time, height and width) fit the smaller head, if there are any."""
    if not isinstance(rope, dict):
        return None
    if inner := {name: made for name, value in rope.items() if (made := _sections(value, base, kwargs))}:
        return {**rope, **inner}
    if not (sections := rope.get("mrope_section")):
        return None
    whole = _value(base, "head_dim") or base.hidden_size // base.num_attention_heads
    width, heads = (
        kwargs.get("hidden_size", base.hidden_size),
        kwargs.get("num_attention_heads", base.num_attention_heads),
    )
    small = kwargs.get("head_dim") or (
        whole if _value(base, "head_dim") and "hidden_size" not in kwargs else width // heads
    )
    first = [max(1, part * small // whole) for part in sections[:-1]]
    return {**rope, "mrope_section": [*first, sum(sections) * small // whole - sum(first)]}


def _value(base: Any, name: str, default: Any = None) -> Any:
    try:
        return getattr(base, name, default)
    except Exception:  # what differs from layer to layer has no value of its own in some configurations
        return default


def _is_token(value: Any, name: str) -> bool:
    return (type(value) is int and value >= 0) or (
        value is None and (name in _SEQUENCE or name.startswith(("image_token", "video_token")))
    )


def _default(config_class: type) -> Any:
    try:
        return config_class()
    except Exception:  # those of composed models want their parts
        return None
