"""A run as a checkpoint sees it: runs of consecutive entries of flattened tensors, or blocks, on any rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from grass_dist.errors import CheckpointError
from grass_dist.model.sharding import Block
from grass_dist.ranks import Ranks

MARK = "@"
"""Separates the FQN of a parameter from the name of one of its states, as in ``lm_head.weight@exp_avg``. A key without
it is a weight or a buffer of the model."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive entries of a flattened tensor, or a `Block` of it, that this rank holds.

    ``tensor`` is flat. That of a weight shares the model's memory, so reading into it loads the weight.
    """

    key: str
    numel: int
    """The number of entries of the whole tensor."""
    start: int | Block
    """The index in the whole tensor at which ``tensor`` begins, or the block that it is."""
    tensor: torch.Tensor
    writes: bool = True
    """Whether this rank saves the entries; of replicas one rank does."""
    shared: bool = False
    """Whether all ranks hold the same entries; then each rank saves a part of them."""

    def to_write(self, ranks: Ranks) -> Piece | None:
        """The part that this rank saves; None if it saves nothing."""
        if not self.shared:
            return self if self.writes and self.tensor.numel() else None
        size = -(-self.tensor.numel() // ranks.world_size)
        begin = min(ranks.rank * size, self.tensor.numel())
        assert isinstance(self.start, int)  # the whole, or consecutive entries of it
        part = self.tensor[begin : begin + size]
        return Piece(self.key, self.numel, self.start + begin, part) if part.numel() else None


@dataclass(frozen=True, slots=True)
class UnitPieces:
    """The optimizer state of a layer or role on this rank.

    ``tensors`` are the states with one entry for each entry of the parameter. ``entries`` has all states by parameter
    and key, as `encode` makes JSON of them.
    """

    name: str
    tensors: Sequence[Piece]
    entries: Entries


Entries = Mapping[str, Mapping[str, Any]]

Read = Callable[[str, int | Block, torch.Tensor], torch.Tensor]
"""(key, start, out) → out: fills the flat ``out`` with entries of a tensor of the checkpoint, beginning with entry
``start``, or with those of a block."""


class Holdings(Protocol):
    """The weights, states and description that the ranks of a run hold; one class for each kind of optimizer."""

    name: str
    """The name of the backend."""
    active: int
    """The number of layers that train at a time."""

    @property
    def ranks(self) -> Ranks:
        """The ranks that train one model together."""
        ...

    def unit_names(self) -> list[str]:
        """The names of all units that may have a state."""
        ...

    def weights(self) -> list[Piece]:
        """All weights and persistent buffers, each tied weight once. They share the model's memory."""
        ...

    def states(self) -> Iterable[UnitPieces]:
        """The states of all units that have one."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all weights and buffers by their keys."""
        ...

    def describe(self) -> dict[str, Any]:
        """The method ("engine") and the parameter groups ("groups") as JSON can hold them. They are equal on all ranks,
        except for the measurements in "engine"."""
        ...

    def check(
        self, engine: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], units: Mapping[str, Entries]
    ) -> None:
        """Raises a `CheckpointError` if this run cannot go on from the contents of a checkpoint. Changes nothing."""
        ...

    def restore(self, saved: Mapping[str, Any], units: Mapping[str, Entries], read: Read) -> None:
        """Restores what `describe` returned, and the states of ``units``, which ``read`` reads. The weights are loaded
        before. Called on every rank."""
        ...


def encode(value: Any) -> Any:
    """A state of a parameter as JSON. Of a tensor as large as the parameter it is the dtype alone."""
    if not torch.is_tensor(value):
        return value
    dtype = str(value.dtype).removeprefix("torch.")
    return {"dtype": dtype} if value.ndim else {"dtype": dtype, "value": value.item()}


def decode(value: Any) -> Any:
    """The inverse of `encode`; for a tensor that lies in the files, its dtype.

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
