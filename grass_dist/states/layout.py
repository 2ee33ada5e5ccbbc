"""A layer's state as one flat run of bytes, on the device and on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

ALIGNMENT = 64
"""Bytes: a cache line, and what vectorised kernels want."""


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of a state: a master, exp_avg, or whatever the optimizer class keeps for each entry."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    narrow: bool = False
    """Whether the host may keep it in a smaller dtype: it is a moment in fp32."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Layout:
    """Says where each field lies in the flat buffers: first what is exact, then what the host keeps in ``host_dtype``.

    Args:
        fields: of one layer, in the order in which `device_views` gives them.
        host_dtype: of the fields that are `narrow`; None keeps all of them exact.
    """

    def __init__(self, fields: Sequence[Field], host_dtype: torch.dtype | None = None) -> None:
        self.fields = tuple(fields)
        self._host_dtype = host_dtype
        self._starts: list[tuple[bool, int]] = []
        ends = {False: 0, True: 0}
        for field in fields:
            narrow = host_dtype is not None and field.narrow
            self._starts.append((narrow, ends[narrow]))
            ends[narrow] += -(-field.nbytes // ALIGNMENT) * ALIGNMENT
        self._exact = ends[False]
        self.device_bytes = ends[False] + ends[True]
        shrink = 1 if host_dtype is None else torch.float32.itemsize // host_dtype.itemsize
        self.host_bytes = ends[False] + ends[True] // shrink

    def device_views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The fields as they lie in ``flat``: uint8, at least `device_bytes` long."""
        return [
            _view(flat, start + (self._exact if narrow else 0), field.shape, field.dtype)
            for field, (narrow, start) in zip(self.fields, self._starts, strict=True)
        ]

    def host_views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The same on the host: uint8, at least `host_bytes` long."""
        views = []
        for field, (narrow, start) in zip(self.fields, self._starts, strict=True):
            dtype = self._host_dtype if narrow and self._host_dtype is not None else field.dtype
            at = self._exact + start * dtype.itemsize // field.dtype.itemsize if narrow else start
            views.append(_view(flat, at, field.shape, dtype))
        return views

    def runs(self, device: torch.Tensor, host: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of (device, host) that a transfer copies: one, and a second that converts if the host rounds."""
        pairs = [(device[: self._exact], host[: self._exact])]
        if self._host_dtype is not None and self.device_bytes > self._exact:
            wide = device[self._exact : self.device_bytes].view(torch.float32)
            pairs.append((wide, host[self._exact : self.host_bytes].view(self._host_dtype)))
        return [pair for pair in pairs if pair[0].numel()]


def _view(flat: torch.Tensor, start: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return flat[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
