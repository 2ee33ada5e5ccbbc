"""Global-norm gradient clipping over shards and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from grass_dist.method.measurement import sum_of_squares
from grass_dist.model.sharding import Sharding


@torch.no_grad()
def clip_grads(params: Sequence[nn.Parameter], max_norm: float, norm_type: float, sharding: Sharding) -> torch.Tensor:
    """Scales the gradients of ``params`` so that their norm is at most ``max_norm``; gives the norm before.

    fp32 gradients go to `torch.nn.utils.clip_grad_norm_`, to the bit. 16-bit gradients with the 2-norm have it taken
    in fp64 instead, by one all-reduce of 8 bytes, since torch would round each parameter's norm to 16 bits.
    """
    low = {torch.bfloat16, torch.float16}
    if norm_type != 2.0 or not any(p.grad is not None and p.grad.dtype in low for p in params):
        total = torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
        return total.full_tensor() if isinstance(total, DTensor) else total
    grads = [(p, sharding.local(p.grad)) for p in params if p.grad is not None]
    mine = torch.stack(
        [sum_of_squares(g) if sharding.counts(p) else g.new_zeros((), dtype=torch.float64) for p, g in grads]
    )
    total = sharding.ranks.sum_over_ranks(mine.sum()).sqrt()
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for _, grad in grads:
        grad.mul_(scale.to(grad.device, torch.float32))
    return total.float()
