"""DTensors of states that this library keeps as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from grass_dist.model.sharding import Block, Sharding


def dtensor_of(part: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], param: torch.Tensor) -> DTensor:
    """A DTensor of the shape of ``param`` whose entries on this rank are ``part``.

    ``part`` may rest in host memory beside a mesh of GPUs: then its entries are copied there into the memory of a new
    one, since `DTensor.from_local` would move them to the GPU.
    """
    if part.device.type == mesh.device_type:
        # A storage of its own: torch's staging for asynchronous saves fails for a DTensor that begins within another's.
        own = part if part.storage_offset() == 0 else torch.from_dlpack(part)
        return _local(own, mesh, placements, param)
    made = cast(DTensor, torch.empty_like(_local(part.to("meta"), mesh, placements, param), device=part.device))
    made.to_local().copy_(part)
    return made


def _local(part: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], param: torch.Tensor) -> DTensor:
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())


def placed_as(param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``value``; where ``param`` is a DTensor and ``value`` a whole tensor, one placed as it is. All ranks call it."""
    if not isinstance(param, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(param.device), param.device_mesh, param.placements)


def place_of(tensor: DTensor) -> int | Block:
    """The position in the flattened whole at which this rank's entries of ``tensor`` begin, or their block."""
    (chunk,) = tensor.__create_chunk_list__()  # as torch's distributed checkpoint asks for it
    offsets, sizes, shape = tuple(chunk.offsets), tuple(chunk.sizes), tuple(tensor.shape)
    if sizes[1:] == shape[1:]:
        return offsets[0] * math.prod(shape[1:]) if shape else 0
    return Block(shape, offsets, sizes)


class DTensorSharding(Sharding):
    """A `Sharding` that also takes states as DTensors."""

    def own_part(self, param: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        if not isinstance(value, DTensor):
            return super().own_part(param, value)
        mine, shape = value.to_local(), self.state_shard(param.detach()).shape
        alike = value.shape == param.shape and mine.shape == shape
        if alike and (not mine.numel() or place_of(value) == self.state_start_of(param)):
            return mine
        raise ValueError(
            f"is of shape {tuple(value.shape)} and divided as {value.placements} on a mesh of shape "
            f"{tuple(value.device_mesh.shape)}: this rank holds {tuple(mine.shape)} of it where it keeps {tuple(shape)}"
        )
