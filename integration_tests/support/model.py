"""The small Llama, its data and its optimizer settings that parity is measured on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from grass_dist.backends.wrapping import shared_modules
from integration_tests.support.parallel import divided_and_sharded

LAYERS, GLOBAL_BATCH, LENGTH, VOCAB = 8, 8, 16, 128
ADAMW = {"lr": 1e-3, "eps": 1e-6}
CLIP = 0.5
DRAWS = {
    "active_layers": 2,
    "probe_steps": 3,
    "sampling_interval": 4,
    "update_interval": 3,
    "ema_alpha": 0.3,
    "temperature": 0.5,
    "seed": 15,  # with it, a refresh or draw at another step draws other layers
}

FROZEN = (0, 3)
"""Layers that a user has frozen, in the runs in which some are. Their models have a matrix without a role, too."""


def small_llama(dtype: torch.dtype = torch.float32, frozen: Sequence[int] = ()) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for layer in frozen:
        model.model.layers[layer].requires_grad_(False)
    if frozen:
        model.model.norm = nn.Sequential(model.model.norm, nn.Linear(64, 64, bias=False, dtype=dtype))
    return model


def model_of(dtype: torch.dtype, uneven: bool) -> nn.Module:
    """`small_llama`; ``uneven``: the widths of its layers differ."""
    model = small_llama(torch.float32)
    if uneven:
        for i, layer in enumerate(model.model.layers):
            wide = 32 * (2 + i % 3)
            layer.mlp.gate_proj, layer.mlp.up_proj = nn.Linear(64, wide, bias=False), nn.Linear(64, wide, bias=False)
            layer.mlp.down_proj = nn.Linear(wide, 64, bias=False)
    return model.to(dtype)


def global_batch(step: int, size: int = GLOBAL_BATCH) -> torch.Tensor:
    """Token ids (size, LENGTH) of one optimizer step; uneven word frequencies, so that layers differ."""
    generator = torch.Generator().manual_seed(1000 + step)
    return (torch.rand(size, LENGTH, generator=generator) ** 3 * VOCAB).long()


def decay_groups(model: nn.Module) -> list[dict]:
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if "norm" not in n], "weight_decay": 0.1},
        {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0},
    ]


def schedule(step: int) -> float:
    return 1 / (1 + 0.1 * step)


def wrapped(
    model: nn.Module,
    backend: str,
    world_size: int,
    reduce_dtype: torch.dtype | None = None,
    layers: Iterable[nn.Module] | None = None,
) -> nn.Module:
    """The model on ranks.

    Args:
        backend: also one of `divided_and_sharded`.
        layers: what FSDP2 shards one by one; None: those of a Llama.
    """
    if backend == "ddp":
        return DistributedDataParallel(model)
    if "tp" in backend:
        return divided_and_sharded(model, backend, world_size, MixedPrecisionPolicy(reduce_dtype=reduce_dtype))
    if backend in ("fsdp2", "hsdp"):
        shape = (world_size,) if backend == "fsdp2" else (2, world_size // 2)
        names = ("dp_shard",) if backend == "fsdp2" else ("dp_replicate", "dp_shard")
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
        blocks = list(model.model.layers if layers is None else layers)
        for layer in (*shared_modules(blocks), *blocks):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    return model
