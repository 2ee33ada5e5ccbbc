"""The whole of one parameter, however the model is wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch.distributed.tensor import DTensor


@contextmanager
def whole(param: torch.Tensor) -> Iterator[torch.Tensor]:
    """Gives a parameter's weights, of its whole shape and own dtype, on every rank. All ranks enter it together.

    The tensor is valid within the block, and not to be written to. Over the wire: one all-gather of the parameter
    where ranks divide it (FSDP2, ZeRO-3), else nothing.
    """
    if hasattr(param, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([param]):
            yield param.detach()
    elif isinstance(param, DTensor):
        shard = cast(DTensor, param.detach())
        yield cast(DTensor, shard.to(shard.device_mesh.device_type)).full_tensor()  # which may rest in host memory
    else:
        yield param.detach()
