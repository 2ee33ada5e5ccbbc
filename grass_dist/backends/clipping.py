"""Global-norm gradient clipping over shards and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from grass_dist.method.measurement import norms
from grass_dist.model.sharding import Sharding


@torch.no_grad()
def clip_grads(params: Sequence[nn.Parameter], max_norm: float, norm_type: float, sharding: Sharding) -> torch.Tensor:
    """Scales the gradients of ``params`` so that their norm is at most ``max_norm``; gives the norm before.

    fp32 gradients go to torch's own functions; if all are on one mesh, as `torch.nn.utils.clip_grad_norm_` would have
    it, to the bit. 16-bit gradients with the 2-norm have it taken in fp64 instead, by one all-reduce of 8 bytes, since
    torch would round each parameter's norm to 16 bits.
    """
    low = {torch.bfloat16, torch.float16}
    if norm_type != 2.0 or not any(p.grad is not None and p.grad.dtype in low for p in params):
        return _clip_by_torch(params, max_norm, norm_type)
    grads = [(p, sharding.local(p.grad)) for p in params if p.grad is not None]
    counted = norms([grad for param, grad in grads if sharding.counts(param)])
    device = grads[0][1].device
    counted = counted or [torch.zeros((), dtype=torch.float64, device=device)]
    squares = torch.stack([norm.to(device) for norm in counted]).square().sum()
    total = sharding.ranks.sum_over_ranks(squares).sqrt()
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for place in dict.fromkeys(grad.device for _, grad in grads):
        torch._foreach_mul_([grad for _, grad in grads if grad.device == place], scale.to(place, torch.float32))
    return total.float()


def _clip_by_torch(params: Sequence[nn.Parameter], max_norm: float, norm_type: float) -> torch.Tensor:
    """Clips as torch does, which takes the norm of DTensors of one mesh at a time, or of plain tensors.

    Beside tensor parallelism parameters that are not divided are on another mesh, or plain.
    """
    of: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for param in params:
        if param.grad is not None:
            of.setdefault(param.device_mesh if isinstance(param, DTensor) else None, []).append(param)
    if len(of) < 2:
        return _whole(torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type))
    norms = [
        _whole(torch.nn.utils.get_total_norm([p.grad for p in own if p.grad is not None], norm_type))
        for own in of.values()
    ]
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    for own in of.values():
        torch.nn.utils.clip_grads_with_norm_(own, max_norm, total)
    return total


def _whole(norm: torch.Tensor) -> torch.Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
