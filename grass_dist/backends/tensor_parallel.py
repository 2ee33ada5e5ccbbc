"""Tensor parallelism alone (`parallelize_module`): all ranks train one model on the same batches."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from grass_dist.backends.base import HookedBackend, device_of
from grass_dist.backends.mesh import MeshSharding, check_blocks, largest_mesh
from grass_dist.errors import ConfigError, UnsupportedModel
from grass_dist.model.discovery import Unit
from grass_dist.ranks import Ranks


class TensorParallelBackend(HookedBackend):
    """A model of which `parallelize_module` has divided some modules over all ranks, and nothing else has.

    Every rank takes the same batches, so no gradient is averaged. What the plan leaves alone is whole on every rank,
    with the same gradients on all of them.

    Over the wire, for each micro-batch: an all-reduce of the gradients of parameters that each rank applies to a part
    of a sequence (`SequenceParallel`). What the plan sends for activations stays as it is.
    """

    name = "tp"

    @staticmethod
    def knows(model: nn.Module) -> bool:
        return any(isinstance(p, DTensor) for p in model.parameters())

    def __init__(self, model: nn.Module, accumulation_steps: int) -> None:
        if all(placed.is_replicate() for p in model.parameters() if isinstance(p, DTensor) for placed in p.placements):
            raise UnsupportedModel(
                "The parameters are DTensors but no module is sharded by fully_shard or divided by parallelize_module; "
                "call fully_shard on the layers and on the model before GrassOptimizer."
            )
        mesh = largest_mesh(model.parameters())
        if mesh.size() != dist.get_world_size():
            raise UnsupportedModel(
                f"The parameters are DTensors on {mesh.size()} of {dist.get_world_size()} ranks, but no module is "
                "sharded by fully_shard, so nothing averages gradients over the other ranks: call fully_shard on the "
                "layers and on the model, over the mesh dimension of the data, before GrassOptimizer."
            )
        check_blocks(model.named_parameters())
        super().__init__(model, accumulation_steps, MeshSharding(Ranks(dist.group.WORLD, device_of(model)), mesh))

    def rest_weights(self) -> None:
        problem = "parallelize_module divides the weights and says where they are"
        raise ConfigError("grass.offload.weights", "host", problem, "use 'resident'")

    def _on_gradient(self, unit: Unit, slot: int, param: nn.Parameter) -> None:
        """Places the gradient as its parameter is: that of an embedding is whole, that of `SequenceParallel` a sum."""
        grad = param.grad
        if isinstance(grad, DTensor) and isinstance(param, DTensor) and grad.placements != param.placements:
            if any(placed.is_partial() for placed in grad.placements):
                self.bytes_reduced += grad.to_local().nbytes
            param.grad = grad.redistribute(param.device_mesh, param.placements)
        super()._on_gradient(unit, slot, param)
