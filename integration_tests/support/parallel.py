"""A Llama divided by tensor parallelism, alone or beside FSDP2, as torch's tutorials do it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

TP = 2
"""Ranks that divide a layer, of a model that is sharded too."""


def divided_and_sharded(
    model: nn.Module, backend: str, world_size: int, policy: MixedPrecisionPolicy | None = None
) -> nn.Module:
    """``model``, a Llama, on a mesh.

    Args:
        backend: "tp", "fsdp2+tp" or "hsdp+tp"; with "+sp" at its end norms are applied to parts of a sequence.
    """
    kind, in_parts = backend.removesuffix("+sp"), backend.endswith("+sp")
    if kind == "tp":
        return divided(model, init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",)), in_parts)
    rest = world_size // TP
    shape, names = ((rest,), ("dp",)) if kind == "fsdp2+tp" else ((rest, 1), ("replicas", "dp"))
    mesh = init_device_mesh("cpu", (*shape, TP), mesh_dim_names=(*names, "tp"))
    divided(model, mesh["tp"], in_parts)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh[names], mp_policy=policy or MixedPrecisionPolicy())
    return model


def divided(model: Any, tp: DeviceMesh, in_parts: bool = False) -> nn.Module:
    """``model`` by `parallelize_module`.

    Args:
        in_parts: whether norms are applied to parts of a sequence (`SequenceParallel`).
    """
    between = Shard(1) if in_parts else Replicate()
    outer = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "lm_head": ColwiseParallel(input_layouts=between, output_layouts=Replicate()),
    }
    inner: dict[str, Any] = {
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        **{f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
        **{name: RowwiseParallel(output_layouts=between) for name in ("self_attn.o_proj", "mlp.down_proj")},
    }
    if in_parts:
        outer["model.norm"] = SequenceParallel()
        inner |= {
            "input_layernorm": SequenceParallel(),
            "post_attention_layernorm": SequenceParallel(),
            "self_attn": PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": between},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
            ),
            "mlp": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),)),
        }
        model.set_attn_implementation("sdpa")  # which needs no mask
        model.register_forward_pre_hook(_with_positions, with_kwargs=True)
    parallelize_module(model, tp, outer)
    for layer in model.model.layers:
        parallelize_module(layer, tp, inner)
    return model


def _with_positions(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A Llama counts the positions of the embeddings that it has, here those of a part."""
    return args, {**kwargs, "position_ids": torch.arange(kwargs["input_ids"].shape[1])[None]}


def data_place(backend: str, rank: int, world_size: int) -> tuple[int, int]:
    """Which of how many parts of a global batch a rank takes."""
    if "tp" not in backend:
        return rank, world_size
    return (0, 1) if backend.startswith("tp") else (rank // TP, world_size // TP)
