"""The states of the groups that do not train, in this rank's host memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

Record = dict[str, Any]
"""State of one group as DeepSpeed saves it: its entry of every per-group list, and the base optimizer's ``state``."""


class HostStore:
    """One flat buffer a group (and dtype), pinned where there is a CUDA device; made when the group first comes.

    Args:
        pin: whether to pin.
    """

    def __init__(self, pin: bool) -> None:
        self._pin = pin
        self._records: dict[tuple[str, int], Record] = {}
        self._buffers: dict[tuple[tuple[str, int], torch.dtype], torch.Tensor] = {}

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._records

    def __getitem__(self, key: tuple[str, int]) -> Record:
        return self._records[key]

    def get(self, key: tuple[str, int]) -> Record | None:
        return self._records.get(key)

    def put(self, key: tuple[str, int], record: Record) -> None:
        """Copies the tensors of ``record`` into the group's buffer, queued on the current stream."""
        held = {}
        for dtype, vectors in _by_dtype(record).items():
            needed = sum(t.numel() for t in vectors.values())
            buffer = self._buffers.get((key, dtype))
            if buffer is None or buffer.numel() != needed:
                buffer = self._buffers[key, dtype] = torch.empty(needed, dtype=dtype, pin_memory=self._pin)
            for (name, tensor), view in zip(
                vectors.items(), buffer.split([t.numel() for t in vectors.values()]), strict=True
            ):
                held[name] = view.view(tensor.shape)
                held[name].copy_(tensor, non_blocking=True)
        self._records[key] = _replaced(record, held)

    def drop(self, key: tuple[str, int]) -> None:
        """Forgets a group's record, which has gone to the device; its buffer stays."""
        self._records.pop(key, None)

    def clear(self) -> None:
        self._records.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of state that lie here and nowhere else."""
        return sum(t.nbytes for record in self._records.values() for _, t in _vectors(record))


def _by_dtype(record: Record) -> dict[torch.dtype, dict[str, torch.Tensor]]:
    found: dict[torch.dtype, dict[str, torch.Tensor]] = {}
    for name, tensor in _vectors(record):
        found.setdefault(tensor.dtype, {})[name] = tensor
    return found


def _vectors(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of more than one element; step counts stay what they are."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _vectors(value, f"{prefix}{name}/")
        elif torch.is_tensor(value) and value.numel() > 1:
            yield f"{prefix}{name}", value.detach()


def _replaced(record: Mapping[str, Any], by: Mapping[str, torch.Tensor], prefix: str = "") -> Record:
    out: Record = {}
    for name, value in record.items():
        if isinstance(value, dict):
            out[name] = _replaced(value, by, f"{prefix}{name}/")
        elif torch.is_tensor(value):
            out[name] = by.get(f"{prefix}{name}", value.detach().clone() if value.numel() <= 1 else value)
        else:
            out[name] = value
    return out
