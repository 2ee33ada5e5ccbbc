"""Which entries of a DTensor are this rank's, on a mesh of any number of dimensions (FSDP2, HSDP, tensor parallel)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from grass_dist.backends.dtensors import DTensorSharding, dtensor_of, place_of
from grass_dist.errors import UnsupportedModel
from grass_dist.model.sharding import Block
from grass_dist.ranks import Ranks


def largest_mesh(params: Iterable[torch.Tensor]) -> DeviceMesh:
    """The mesh of all ranks that divide a model.

    Parameters that tensor parallelism leaves alone may be on a part of it, that of their data-parallel ranks.

    Args:
        params: of a model of which some are DTensors.
    """
    meshes = dict.fromkeys(p.device_mesh for p in params if isinstance(p, DTensor))
    return max(meshes, key=lambda mesh: (mesh.size(), mesh.ndim))


class MeshSharding(DTensorSharding):
    """Parameters are DTensors: a rank holds a part of each, and the states of its entries.

    A part is some rows, under tensor parallelism also some columns. Parameters that are no DTensors are whole on every
    rank: frozen ones that FSDP2 was told to ignore, and those that tensor parallelism alone leaves as they are.

    Args:
        ranks: those that train one model together.
        mesh: all of them.
    """

    def __init__(self, ranks: Ranks, mesh: DeviceMesh) -> None:
        super().__init__(ranks)
        self._mesh = mesh
        self._first: dict[DeviceMesh, bool] = {}  # whether this rank is the first that has a part on a mesh, of several

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def counts(self, param: nn.Parameter) -> bool:
        """A shard counts on one of the ranks that hold it.

        These are the ranks at coordinate 0 of every mesh dimension that replicates it: those of its placements, and
        those that its own mesh lacks.
        """
        if not isinstance(tensor := param, DTensor):
            return super().counts(param)
        mesh = tensor.device_mesh
        if mesh not in self._first:
            self._first[mesh] = mesh == self._mesh or self._is_first(mesh)
        where = zip(mesh.get_coordinate() or (), tensor.placements, strict=True)
        return self._first[mesh] and all(c == 0 for c, placed in where if isinstance(placed, Replicate))

    def _is_first(self, mesh: DeviceMesh) -> bool:
        """Whether the ranks of ``mesh`` are at coordinate 0 of the dimensions of the whole mesh that ``mesh`` lacks."""
        holders = torch.isin(self._mesh.mesh, mesh.mesh).nonzero()  # coordinates in the whole mesh
        alike = (holders == holders[0]).all(dim=0)
        return not holders[0][alike].any()

    def start_of(self, param: nn.Parameter) -> int | Block:
        if not isinstance(tensor := param, DTensor):
            return super().start_of(param)
        return place_of(tensor)

    def replicates(self, param: nn.Parameter) -> bool:
        return not isinstance(param, DTensor)

    def as_dtensor(self, param: nn.Parameter, part: torch.Tensor) -> torch.Tensor:
        if not isinstance(param, DTensor):
            return part
        tensor = cast(DTensor, param)
        return dtensor_of(part, tensor.device_mesh, tensor.placements, tensor)


SUMMED_BY_A_HOOK = "replicated_with_grad_allreduce"
"""The style of transformers for parameters that each rank applies to its own heads (q_norm of Qwen3)."""


def check_plans(model: nn.Module) -> None:
    """Checks how transformers has divided the model or a part of it (`DistributedConfig`, ``tp_plan="auto"``).

    Raises:
        UnsupportedModel: ranks hold different experts or layers, or hooks of transformers, which the first forward
            registers, change gradients after they have been measured.
    """
    for module in model.modules():
        how = getattr(getattr(module, "config", None), "distributed_config", None)
        for name in ("ep_size", "pp_size"):
            if (size := getattr(how, name, None) or 1) > 1:
                raise UnsupportedModel(
                    f"DistributedConfig({name}={size}) gives ranks different parts of the model, and importances would "
                    f"be those of a part: leave {name} out, and use fsdp_size or tp_size."
                )
        plan = getattr(module, "tp_plan", None) or {}
        summed = [name for name, style in plan.items() if style == SUMMED_BY_A_HOOK]
        if (getattr(how, "tp_size", None) or 1) > 1 and summed:
            raise UnsupportedModel(
                f"The tensor-parallel plan of transformers sums the gradients of {summed[0]} over the ranks in a hook "
                "that runs after they have been measured: use fsdp_size alone, or divide the model by torch's "
                "parallelize_module."
            )


def check_blocks(params: Iterable[tuple[str, torch.Tensor]]) -> None:
    """
    Raises:
        UnsupportedModel: a rank's part of a parameter is no block of it, or not in one piece in memory.
    """
    for name, param in params:
        if not isinstance(param, DTensor) or all(p.is_replicate() or p == Shard(0) for p in param.placements):
            continue  # whole, or rows; the planner's fake tensors cannot be asked for more
        mine, chunks = param.to_local(), param.__create_chunk_list__()
        if len(chunks) != 1 or tuple(chunks[0].sizes) != tuple(mine.shape) or not mine.is_contiguous():
            raise UnsupportedModel(
                f"{name} of shape {tuple(param.shape)} is placed as {param.placements}, which leaves a rank no single "
                f"block of it, or one with gaps in memory: shard it by Shard(dim), evenly, and make it contiguous."
            )
