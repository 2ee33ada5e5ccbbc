"""A run at the end of an optimizer step as a value: what each rank will write, for any number of ranks to load."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch

from grass_dist.checkpoint import files
from grass_dist.checkpoint.dcp import file_numbers, write
from grass_dist.checkpoint.per_rank import per_rank_pieces
from grass_dist.checkpoint.pieces import Holdings, Piece, dtype_name
from grass_dist.ranks import Ranks


class HostCopies:
    """Memory that a rank's pieces are copied to before training goes on; kept from one save to the next."""

    def __init__(self) -> None:
        self._copies: dict[str, torch.Tensor] = {}

    def __call__(self, piece: Piece) -> Piece:
        copy = self._copies.get(piece.key)
        if copy is None or copy.numel() != piece.tensor.numel() or copy.dtype != piece.tensor.dtype:
            copy = self._copies[piece.key] = torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype)
        copy.copy_(piece.tensor)
        return Piece(piece.key, piece.numel, piece.start, copy)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a checkpoint of one step will hold, on this rank. Its class is its format: here ``dcp``."""

    kind: ClassVar[Literal["dcp", "deepspeed"]] = "dcp"
    in_background: ClassVar[bool] = True
    """Whether it can be written while training goes on."""

    step: int
    backend: str
    state: Mapping[str, Any]
    """Content of state.json."""
    weights: Mapping[str, Any]
    """Shape and dtype of each weight and buffer, for checkpoint.json."""
    pieces: Sequence[Piece]
    """What this rank writes into safetensors files."""
    numbers: Mapping[str, int]
    """See `file_numbers`."""

    @classmethod
    def take(
        cls, holdings: Holdings, step: int, extra: Mapping[str, Any] | None = None, copies: HostCopies | None = None
    ) -> Self:
        """Collects what the ranks hold. Called on every rank, after an optimizer step.

        Args:
            extra: further state of the program, as JSON can hold it; equal on all ranks.
            copies: where the tensors are copied to. Without it they share the memory of the run, so the snapshot is
                written before training goes on.
        """
        weights, described = holdings.weights(), holdings.describe()
        sizes: dict[str, int] = {}
        mine: list[Piece] = []

        def collect(pieces: Sequence[Piece]) -> None:
            for piece in pieces:
                sizes[piece.key] = piece.numel * piece.tensor.element_size()
                if (written := piece.to_write(holdings.ranks)) is not None:
                    mine.append(copies(written) if copies else written)

        with torch.no_grad():
            collect(weights)
            units = {}
            for unit in holdings.states():
                collect(unit.tensors)
                units[unit.name] = unit.entries
            collect(per_rank_pieces(described["engine"], holdings.ranks))
        engine = {**described["engine"], "measured": {"layers": described["engine"]["measured"]["layers"]}}
        return cls(
            step,
            holdings.name,
            {"engine": _without_nan(engine), "groups": described["groups"], "units": units, "run": dict(extra or {})},
            _weight_entries(holdings, weights),
            mine,
            file_numbers(sizes, holdings.ranks.world_size),
        )

    def write_tensors(self, folder: Path, ranks: Ranks) -> None:
        """Writes the tensors of all ranks into the folder of a checkpoint. Called on every rank of ``ranks``.

        Raises:
            CheckpointError, OSError: they were not written.
        """
        write(folder / files.TENSORS, self.pieces, self.numbers, ranks.group)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that this rank writes; 0 where it is unknown."""
        return sum(piece.tensor.nbytes for piece in self.pieces)

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that write the tensors, besides torch."""
        return {}


def _weight_entries(holdings: Holdings, weights: Sequence[Piece]) -> dict[str, Any]:
    dtypes = {piece.key: dtype_name(piece.tensor.dtype) for piece in weights}
    return {key: {"shape": list(shape), "dtype": dtypes[key]} for key, shape in holdings.shapes().items()}


def _without_nan(engine: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: an importance that was not measured is null."""
    tracker = engine["tracker"]
    plain = [None if math.isnan(m) else m for m in tracker["importances"]]
    return {**engine, "tracker": {**tracker, "importances": plain}}
