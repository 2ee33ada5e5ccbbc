"""Backends: the only modules that know how gradients get reduced (FSDP2, DDP, one process)."""

from __future__ import annotations

from torch import nn

from grass_dist.backends.base import HookedBackend
from grass_dist.backends.ddp import DdpBackend
from grass_dist.backends.fsdp2 import Fsdp2Backend
from grass_dist.backends.single import SingleBackend
from grass_dist.errors import UnsupportedModel


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
    for backend in (DdpBackend, Fsdp2Backend):
        if backend.knows(model):
            return backend(model, accumulation_steps)
    return SingleBackend(model, accumulation_steps)
