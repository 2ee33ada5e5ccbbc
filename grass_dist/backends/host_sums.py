"""Sums of micro-batch gradients in host memory, so that a probe accumulates without device memory."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from grass_dist.states.store import LayerStateStore, Use

_USE = Use("the gradients of a probe", "set gradient_accumulation_steps to 1, or grass.probe_steps to 0")


class HostSums:
    """An fp32 sum for each parameter shard, all in one host buffer; pinned where the gradients are on a CUDA device.

    Each micro-batch moves 4 bytes an element each way, on the stream that the gradient was made on. The buffer is made
    here, before training communicates: pinning memory later can block collectives.

    Args:
        shapes: shape of this rank's shard of each parameter, by key.
        device: where the gradients are.

    Raises:
        GrassError: the memory cannot be allocated or pinned on this rank; the other ranks do not know that yet.
    """

    def __init__(self, shapes: Mapping[Any, torch.Size], device: torch.device) -> None:
        numels = [math.prod(shape) for shape in shapes.values()]
        self._store = LayerStateStore([4 * sum(numels)], device, use=_USE)
        parts = self._store[0].view(torch.float32).split(numels) if numels else ()
        self._sums = {key: part.view(shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}
        self._device = device
        self._begun: dict[Hashable, None] = {}

    def add(self, key: Hashable, grad: torch.Tensor, *, last: bool) -> torch.Tensor | None:
        """Adds a micro-batch's gradient; gives the whole sum on the gradient's device if it was the last one."""
        host = self._sums[key]
        grad = grad.to_dense()  # a dense one is itself
        if key in self._begun:
            total = host.to(grad.device, non_blocking=True) if grad.is_cuda else host
            total.add_(grad)
        else:
            total = grad.float()
        if last:
            self._begun.pop(key, None)
            return total
        self._begun[key] = None
        if total is not host:
            host.copy_(total, non_blocking=True)
        return None

    def clear(self) -> None:
        """Forgets the sums that have begun."""
        self._begun.clear()

    def pending(self) -> list:
        """Keys of the sums that have begun and whose last micro-batch has not come."""
        return list(self._begun)

    def take(self, key: Hashable) -> torch.Tensor:
        """The sum so far, on the gradient's device; the next sum begins at zero."""
        self._begun.pop(key)
        return self._sums[key].to(self._device, non_blocking=True)
