"""The one gradient that a probe shows, for what judges a step by its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from grass_dist.model.discovery import Unit
from grass_dist.model.sharding import Sharding


class FiniteMark:
    """The one gradient that a probe shows: zeros, or NaN as soon as a gradient of the step is not finite.

    A scaler judges a step by the gradients that it finds, and fails if there is none. This one is on the smallest
    parameter, among roles if there are any, since these are frozen in a probe. It says on each rank whether that
    rank's parts of all gradients are finite, and takes the memory of the parameter. It is gone after the step.

    Args:
        units: roles, or layers.
    """

    def __init__(self, units: Sequence[Unit], sharding: Sharding) -> None:
        self._sharding, ranks = sharding, sharding.ranks.world_size
        params = [p for unit in units for _, p in unit.params]
        with_rows = [p for p in params if _all_ranks_have_rows(p, ranks)]
        self._param = min(with_rows, key=nn.Parameter.numel) if with_rows else max(params, key=nn.Parameter.numel)

    def show(self, norm: torch.Tensor) -> None:
        """Takes the norm of a gradient, a 0-dim tensor on the device; the host waits for nothing."""
        if self._param.grad is None:
            self._param.grad = torch.zeros_like(self._param)
        mark = self._sharding.local(self._param.grad)
        mark.add_((norm * 0).to(mark.device))  # a layer's parameter may rest in host memory

    def hide(self) -> None:
        self._param.grad = None


def _all_ranks_have_rows(param: torch.Tensor, ranks: int) -> bool:
    """Whether no rank's part is empty, if the first dimension is divided as FSDP2 does."""
    rows = param.shape[0] if param.ndim else 1
    return -(-rows // ranks) * (ranks - 1) < rows
