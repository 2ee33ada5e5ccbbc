"""How a model is sharded by FSDP2 and HSDP: the training program and the simulation of the planner do it this way."""

from __future__ import annotations

from collections import Counter
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

    What several layers share (Zamba's transformer block) is a group by itself, since each of them needs it whole and
    `fully_shard` refuses parameters that are in two groups.

    Args:
        layers: their FQNs.
    """
    low = next(model.parameters()).dtype != torch.float32
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if low else None)
    blocks = [model.get_submodule(layer) for layer in layers]
    for layer in (*shared_modules(blocks), *blocks):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def shared_modules(blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Returns the outermost modules of which each parameter is in more than one of ``blocks``.

    Modules with the same parameters are in one list: each is a group for `fully_shard`.
    """
    times = Counter(param for block in blocks for param in block.parameters())
    found: dict[frozenset[nn.Parameter], dict[nn.Module, None]] = {}

    def visit(module: nn.Module) -> None:
        params = frozenset(module.parameters())
        if params and all(times[param] > 1 for param in params):
            found.setdefault(params, {})[module] = None
        else:
            for child in module.children():
                visit(child)

    for block in blocks:
        visit(block)
    return [list(modules) for modules in found.values()]
