"""What a run holds, as a checkpoint sees it: runs of entries of flattened tensors, whoever holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from grass_dist.errors import CheckpointError
from grass_dist.ranks import Ranks

MARK = "@"
"""Parts the FQN of a parameter from the name of one of its states, as in ``lm_head.weight@exp_avg``; a key without it
is a weight or a buffer of the model."""

MASTER = "master"


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive entries of a flattened tensor that this rank holds.

    ``tensor`` is flat and, of weights, shares the model's memory: to read into it is to load.
    """

    key: str
    numel: int
    """Entries of the whole tensor."""
    start: int
    """Where the entries of ``tensor`` begin in it."""
    tensor: torch.Tensor
    writes: bool = True
    """Whether this rank saves them: replicas are saved once."""
    shared: bool = False
    """Whether all ranks hold them, so that each saves a part."""

    def to_write(self, ranks: Ranks) -> Piece | None:
        """What this rank saves of it."""
        if not self.shared:
            return self if self.writes and self.tensor.numel() else None
        size = -(-self.tensor.numel() // ranks.world_size)
        begin = min(ranks.rank * size, self.tensor.numel())
        part = self.tensor[begin : begin + size]
        return Piece(self.key, self.numel, self.start + begin, part) if part.numel() else None


@dataclass(frozen=True, slots=True)
class UnitPieces:
    """The optimizer state of a layer or role on this rank.

    ``tensors`` are the states that have an entry for each of the parameter's. ``entries`` has all states by parameter
    and key as JSON can hold them: `encode`.
    """

    name: str
    tensors: Sequence[Piece]
    entries: Entries


Entries = Mapping[str, Mapping[str, Any]]

Read = Callable[[str, int, torch.Tensor], torch.Tensor]
"""(key, start, out) → out, filled with the entries of a tensor of the checkpoint from ``start`` on."""


class Holdings(Protocol):
    """What the ranks of a run hold, asked for by `save` and `load`; a class for each kind of optimizer."""

    name: str
    """Of the backend."""
    active: int
    """Layers that train at a time."""

    @property
    def ranks(self) -> Ranks:
        """That train one model together."""
        ...

    def unit_names(self) -> list[str]:
        """All units that may have a state."""
        ...

    def weights(self) -> list[Piece]:
        """All weights and persistent buffers, a tied one once; they share the model's memory."""
        ...

    def states(self) -> Iterable[UnitPieces]:
        """The states of all units that have one."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights and buffers by their keys."""
        ...

    def describe(self) -> dict[str, Any]:
        """What JSON can hold of the method ("engine") and the parameter groups ("groups"); the same on all ranks, but
        for the measurements in "engine"."""
        ...

    def check(
        self, engine: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], units: Mapping[str, Entries]
    ) -> None:
        """Raises a `CheckpointError` if this run could not go on from what a checkpoint says. Changes nothing."""
        ...

    def restore(self, saved: Mapping[str, Any], units: Mapping[str, Entries], read: Read) -> None:
        """Takes over what `describe` gave, and the states that ``read`` gives of ``units``; the weights have been
        loaded. Called on every rank."""
        ...


def encode(value: Any) -> Any:
    """A state of a parameter as JSON: of a tensor with an entry for each of the parameter's its dtype alone."""
    if not torch.is_tensor(value):
        return value
    dtype = str(value.dtype).removeprefix("torch.")
    return {"dtype": dtype} if value.ndim else {"dtype": dtype, "value": value.item()}


def decode(value: Any) -> Any:
    """The other way; the dtype of a tensor that is in the files.

    Raises:
        CheckpointError: it is not what `encode` gives.
    """
    if not isinstance(value, dict):
        return value
    dtype = getattr(torch, str(value.get("dtype")), None)
    if not set(value) <= {"dtype", "value"} or not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"state.json is damaged: {value!r:.60} is no state of an optimizer.")
    return torch.tensor(value["value"], dtype=dtype) if "value" in value else dtype


def state_key(name: str, key: str) -> str:
    return f"{name}{MARK}{key}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
