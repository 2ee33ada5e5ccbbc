"""Finds out that a model was wrapped after its optimizer was made: nobody else would tell the optimizer."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from grass_dist.errors import UnsupportedModel
from grass_dist.model.discovery import Unit
from grass_dist.model.units import shown_names


def refuse_later_wrapping(model: nn.Module, units: Sequence[Unit]) -> None:
    """Looks whether ``model`` still is what trains; before the first step, since it looks at all objects there are.

    Nothing here communicates: what is wrapped is so on all ranks, and each of them raises.

    Args:
        model: as the optimizer was given it.
        units: all that may train.

    Raises:
        UnsupportedModel: parameters of ``units`` are no longer the model's, or are in a
            `DistributedDataParallel` that is not ``model``.
    """
    now = {id(p) for p in model.parameters()}
    if gone := [name for unit in units for name, p in unit.params if id(p) not in now]:
        sharded = any(isinstance(module, FSDPModule) for module in model.modules())
        what = "fully_shard was called" if sharded else "Something has replaced parameters of the model"
        raise UnsupportedModel(
            f"{what} after GrassOptimizer was made, so {len(gone)} parameters of the optimizer are no longer the "
            f"model's ({shown_names(gone)}): make the optimizer after it."
        )
    if dist.is_initialized() and not isinstance(model, DistributedDataParallel) and _in_ddp(units):
        gc.collect()  # there may be an old wrapper that nobody uses
        if _in_ddp(units):
            raise UnsupportedModel(
                "The model that GrassOptimizer was given is inside a DistributedDataParallel, which was made after the "
                "optimizer or was not passed to it, so the ranks would not train the same layers: call "
                "GrassOptimizer(DistributedDataParallel(model), ...)."
            )


def _in_ddp(units: Sequence[Unit]) -> bool:
    """Whether a `DistributedDataParallel` in this process has a parameter of ``units``."""
    mine = {id(p) for unit in units for _, p in unit.params}
    wrappers = [found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel)]
    return any(id(p) in mine for wrapper in wrappers for p in wrapper.parameters())
