"""Backends: the only modules that know how gradients get reduced (FSDP2, DDP, one process)."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from grass_dist.backends.base import HookedBackend, device_of
from grass_dist.backends.ddp import DdpBackend
from grass_dist.backends.fsdp2 import Fsdp2Backend
from grass_dist.backends.mesh import check_plans, largest_mesh
from grass_dist.backends.single import SingleBackend
from grass_dist.backends.tensor_parallel import TensorParallelBackend
from grass_dist.errors import UnsupportedModel
from grass_dist.ranks import Ranks, world


def backend_for(model: nn.Module, accumulation_steps: int) -> HookedBackend:
    """The backend that ``model`` is wrapped for.

    Raises:
        UnsupportedModel: it is wrapped by something that no backend knows.
    """
    wrappers = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if "FullyShardedDataParallel" in wrappers:
        raise UnsupportedModel(
            "The model is wrapped in FullyShardedDataParallel (FSDP1), which grass_dist does not support; "
            "shard it with torch.distributed.fsdp.fully_shard instead."
        )
    if wrappers & {"DeepSpeedEngine", "PipelineEngine"}:
        raise UnsupportedModel(
            "The model is a DeepSpeed engine, which GrassOptimizer does not support; "
            "pass a plain, DDP-wrapped or fully_shard-ed model."
        )
    if "DistributedDataParallel" in wrappers and not DdpBackend.knows(model):
        raise UnsupportedModel(
            f"DistributedDataParallel is inside a {type(model).__name__}; pass the DDP module itself to GrassOptimizer "
            "(and compile the model inside of it, not around it)."
        )
    check_plans(model)
    for backend in (DdpBackend, Fsdp2Backend, TensorParallelBackend):
        if backend.knows(model):
            return backend(model, accumulation_steps)
    return SingleBackend(model, accumulation_steps)


def trains_alone(backend: HookedBackend) -> str | None:
    """What ranks are told that train a model without the others: the first of all, or of a group."""
    everyone = world()
    part = backend.ranks.world_size
    if part not in (1, everyone.world_size):
        return (
            f"The model is wrapped for {part} of {everyone.world_size} ranks, which draw layers and average gradients "
            "by themselves; if the others train the same model (on parts of a sequence, for example), wrap it over all "
            "of them: fully_shard takes a flattened mesh."
        )
    if not isinstance(backend, SingleBackend) or everyone.world_size == 1 or everyone.rank != 0:
        return None
    return (
        f"The model is wrapped in nothing, so each of the {everyone.world_size} ranks trains it alone, with draws of "
        "its own and weights that drift apart; wrap it in DistributedDataParallel, or shard it by fully_shard, first."
    )


def ranks_of(model: object) -> Ranks:
    """The ranks that train ``model`` together, as far as it tells: they are told if one of them is refused. Never
    raises.

    A model that is wrapped in nothing is of a process alone. Where something else was passed, all processes are told.
    """
    if not isinstance(model, nn.Module):
        return world()
    if isinstance(model, DistributedDataParallel):
        return Ranks(model.process_group, device_of(model))
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return Ranks(None, device_of(model))
    mesh = largest_mesh(model.parameters())
    if mesh.size() != dist.get_world_size() and mesh.ndim == 1:
        return Ranks(mesh.get_group(), device_of(model))
    return Ranks(dist.group.WORLD if mesh.size() == dist.get_world_size() else None, device_of(model))
