"""How a model is sharded by FSDP2 and HSDP: the training program and the simulation of the planner do it this way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def shard_mesh(device_type: str, ranks: int, replicate: int) -> DeviceMesh:
    """A mesh over all ranks: (ranks,) for FSDP2, (replicate, ranks / replicate) for HSDP."""
    if replicate == 1:
        return init_device_mesh(device_type, (ranks,), mesh_dim_names=("dp_shard",))
    shape = (replicate, ranks // replicate)
    return init_device_mesh(device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))


def shard(model: nn.Module, layers: Sequence[str], mesh: DeviceMesh) -> None:
    """Shards each layer, and then what is outside the layers. The gradients of 16-bit weights are reduced in fp32.

    Args:
        layers: their FQNs.
    """
    low = next(model.parameters()).dtype != torch.float32
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if low else None)
    for layer in map(model.get_submodule, layers):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
