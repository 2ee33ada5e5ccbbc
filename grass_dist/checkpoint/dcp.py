"""Writes `Piece`s by `torch.distributed.checkpoint`: safetensors files that say which entries of a tensor they hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from grass_dist.checkpoint.files import printable
from grass_dist.checkpoint.pieces import Piece
from grass_dist.errors import CheckpointError
from grass_dist.model.sharding import Block

FILE_BYTES = 512 * 2**20
"""Bytes after which a rank begins another file: writing a file takes its size in memory once more."""


class PieceSavePlanner(DefaultSavePlanner):
    """Saves each `Piece` as a chunk of a one-dimensional tensor, or a block as one of the tensor in its own shape.

    No two ranks save the same entries.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(piece) for piece in self.state_dict.values()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        piece = self.state_dict[index.fqn]
        return piece.tensor.view(_place(piece).sizes)


def _place(piece: Piece) -> Block:
    if isinstance(piece.start, Block):
        return piece.start
    return Block((piece.numel,), (piece.start,), (piece.tensor.numel(),))


def _write_item(piece: Piece) -> WriteItem:
    place = _place(piece)
    start = torch.Size(place.offsets)
    return WriteItem(
        index=MetadataIndex(piece.key, start),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=start, sizes=torch.Size(place.sizes)),
            properties=TensorProperties.create_from_tensor(piece.tensor),
            size=torch.Size(place.shape),
        ),
    )


def write(folder: Path, pieces: Sequence[Piece], files: Mapping[str, int], group: dist.ProcessGroup | None) -> None:
    """Writes the pieces of all ranks into ``folder``; each rank writes its own files. Called on every rank.

    Args:
        pieces: those of this rank; over all ranks they cover each tensor exactly once.
        files: the number of the file of each key, beginning with 1, equal on all ranks; see `file_numbers`.

    Raises:
        CheckpointError: on every rank if one fails.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=dict(files), save_distributed=True)
    given = {piece.key: piece for piece in pieces if piece.tensor.numel()}
    alone = group is None
    try:
        dcp.save(given, storage_writer=writer, planner=PieceSavePlanner(), process_group=group, no_dist=alone)
    except CheckpointException as error:  # no subclass of Exception
        raise CheckpointError(_of_ranks(error)) from error


def _of_ranks(error: CheckpointException) -> str:
    """The error of the first rank that failed."""
    rank = min(error.failures)
    cause = error.failures[rank][0]
    what = cause.strerror if isinstance(cause, OSError) and cause.strerror else _line(cause)
    return f"rank {rank}: {what}."


def file_numbers(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """The number of the file for each tensor, so that no file of a rank is much larger than `FILE_BYTES`.

    Args:
        sizes: the bytes of each whole tensor.
    """
    number, filled, found = 1, 0, {}
    for key in sorted(sizes):
        share = sizes[key] / world_size
        if filled and filled + share > FILE_BYTES:
            number, filled = number + 1, 0
        filled += share
        found[key] = number
    return found


class _Targets(LoadPlanner):
    """Reads into given tensors."""

    def __init__(self, targets: Mapping[str, torch.Tensor]) -> None:
        self._targets = targets

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError  # `TensorReader` makes the plan

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise CheckpointError(f"{read_item.storage_index.fqn} is not a tensor.")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = self._targets[read_item.dest_index.fqn]
        return Block(tuple(target.shape), tuple(read_item.dest_offsets), tuple(read_item.lengths)).of(target)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...


class TensorReader:
    """Reads any run of entries, or any block, of any tensor of a checkpoint into given memory.

    There is no collective: each rank reads what it needs, however many ranks have saved the checkpoint.

    Args:
        reader: reads the files.
        where: the checkpoint's folder, for errors.

    Raises:
        CheckpointError: the files are damaged.
    """

    def __init__(self, reader: dcp.StorageReader, where: Path) -> None:
        self._reader, self._where = reader, where
        self._whole: dict[str, list[ChunkStorageMetadata]] = {}
        try:
            self._metadata = reader.read_metadata()
            reader.set_up_storage_reader(self._metadata, True)
            self.tensors: dict[str, tuple[int, torch.dtype]] = {
                key: (math.prod(tensor.size), tensor.properties.dtype)
                for key, tensor in self._metadata.state_dict_metadata.items()
                if isinstance(tensor, TensorStorageMetadata)
            }
        except CheckpointError:
            raise
        except Exception as error:  # whatever a damaged file makes its reader raise
            raise CheckpointError(f"{where} cannot be read: {_line(error)}.") from error

    def read(self, key: str, start: int | Block, out: torch.Tensor) -> torch.Tensor:
        """Entries ``start`` to ``start + out.numel()`` of ``key``, or those of a block, into the flat tensor ``out``.

        Raises:
            CheckpointError: they are not all there, or of another dtype.
        """
        return self.read_all([(key, start, out)])[0]

    def read_all(self, wanted: Sequence[tuple[str, int | Block, torch.Tensor]]) -> list[torch.Tensor]:
        """Does what `read` does for several keys at once, each of which is there once.

        Each file is opened once, and once more for each tensor that was saved in other parts than are read here (rows
        of one that was saved in blocks, or a block of one that was saved in rows). These need memory for the whole
        rows that have the entries, one tensor at a time.
        """
        items: list[ReadItem] = []
        targets: dict[str, torch.Tensor] = {}
        others = []
        for key, at, out in wanted:
            if not out.numel():
                continue
            shape = self._shape(key, out.dtype)
            place = self._place_in(key, shape, at, out.numel())
            if math.prod(place.sizes) == out.numel():
                targets[key] = out.view(place.sizes)
                items += self._items(key, place, out.dtype)
            else:
                others.append((key, place, at, out))
        self._read(items, targets)
        for key, place, at, out in others:
            rows = torch.empty(place.sizes, dtype=out.dtype)
            self._read(list(self._items(key, place, out.dtype)), {key: rows})
            out.copy_(_taken(rows.view(-1), place, at, out.numel()))
        return [out for _, _, out in wanted]

    def _shape(self, key: str, dtype: torch.dtype) -> tuple[int, ...]:
        """The shape in which ``key`` was saved: flat, or its own."""
        last = self._chunks(key, dtype)
        return tuple(max(c.offsets[dim] + c.sizes[dim] for c in last) for dim in range(len(last[0].sizes)))

    def _place_in(self, key: str, shape: tuple[int, ...], at: int | Block, numel: int) -> Block:
        """The smallest block of a tensor of ``shape``, as it was saved, that has all entries which are wanted."""
        if isinstance(at, Block):
            if math.prod(at.shape) != math.prod(shape) or (len(shape) > 1 and shape != at.shape):
                raise CheckpointError(f"{self._where} holds {key!r:.80} in the shape {shape} and not in {at.shape}.")
            if len(shape) > 1:
                return at
            row = math.prod(at.shape[1:])
            return Block(shape, (at.offsets[0] * row,), (at.sizes[0] * row,))
        row = math.prod(shape[1:])
        first, last = at // row, -(-(at + numel) // row)
        return Block(shape, (first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))

    def try_all(self, part: tuple[int, int]) -> None:
        """Reads one entry of every part of every tensor. With ``part`` (i, n), rank i of n tries every n-th part.

        Raises:
            CheckpointError: a file cannot be read.
        """
        held = {key: dtype for key, (numel, dtype) in self.tensors.items() if numel}
        chunks = [(key, chunk, dtype) for key, dtype in held.items() for chunk in self._chunks(key, dtype)]
        items, targets = [], {}
        for key, chunk, dtype in chunks[part[0] :: part[1]]:
            name, one = f"{key} from {tuple(chunk.offsets)}", (1,) * len(chunk.sizes)
            items.append(_read_item(key, chunk, chunk.offsets, one, chunk.offsets, name))
            targets[name] = torch.empty(one, dtype=dtype)
        self._read(items, targets)

    def _read(self, items: list[ReadItem], targets: Mapping[str, torch.Tensor]) -> None:
        try:
            self._reader.read_data(LoadPlan(items), _Targets(targets)).wait()
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self._where} cannot be read: {_line(error)}.") from error

    def require(self, key: str, numel: int, dtype: torch.dtype) -> None:
        """Checks, before anything is read, that there are ``numel`` entries of ``key``.

        Raises:
            CheckpointError: there are not, or they are of another dtype.
        """
        found = sum(math.prod(chunk.sizes) for chunk in self._chunks(key, dtype)) if numel else 0
        if found != numel:
            raise CheckpointError(f"{self._where} holds {found} entries of {key!r:.80} where there are {numel}.")

    def _items(self, key: str, place: Block, dtype: torch.dtype) -> list[ReadItem]:
        items, numel = [], 0
        for chunk in self._chunks(key, dtype):
            ends = [(o + s, p + n) for o, s, p, n in zip(*_corners(chunk), *_corners(place), strict=True)]
            low = [max(pair) for pair in zip(chunk.offsets, place.offsets, strict=True)]
            lengths = [min(pair) - at for pair, at in zip(ends, low, strict=True)]
            if min(lengths) > 0:
                items.append(_read_item(key, chunk, low, lengths, place.offsets))
                numel += math.prod(lengths)
        if numel != math.prod(place.sizes):
            first = place.offsets[0]
            raise CheckpointError(
                f"{self._where} does not hold entries {first} to {first + place.sizes[0]} of {key!r:.80}."
            )
        return items

    def _chunks(self, key: str, dtype: torch.dtype) -> list[ChunkStorageMetadata]:
        """The parts of ``key`` in their order.

        Raises:
            CheckpointError: they leave a gap or overlap, or are of another dtype.
        """
        found = self._metadata.state_dict_metadata.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise CheckpointError(f"{self._where} holds no tensor {key!r:.80}.")
        if found.properties.dtype != dtype:
            raise CheckpointError(f"{self._where} holds {key!r:.80} in {found.properties.dtype} and not in {dtype}.")
        if key not in self._whole:
            chunks = sorted(found.chunks, key=lambda chunk: tuple(chunk.offsets))
            if (gap := _gap(chunks)) is not None:
                raise CheckpointError(f"{self._where} does not hold entry {gap} of {key!r:.80}, or holds it twice.")
            self._whole[key] = chunks
        return self._whole[key]


def _gap(chunks: Sequence[ChunkStorageMetadata]) -> str | None:
    """The first entry that chunks do not hold exactly once; None if they make up a whole."""
    dims = {len(corner) for chunk in chunks for corner in _corners(chunk)}
    if len(dims) != 1 or dims == {0} or any(not size for chunk in chunks for size in chunk.sizes):
        return "0"
    if dims == {1}:
        at = 0
        for chunk in chunks:
            if chunk.offsets[0] != at:
                return str(at)
            at += chunk.sizes[0]
        return None
    for one, other in combinations(chunks, 2):
        if all(p < o + s and o < p + n for o, s, p, n in zip(*_corners(one), *_corners(other), strict=True)):
            return str(tuple(other.offsets))
    ends = [max(c.offsets[dim] + c.sizes[dim] for c in chunks) for dim in range(dims.pop())]
    return None if sum(math.prod(c.sizes) for c in chunks) == math.prod(ends) else "0, or a later one,"


def _corners(place: ChunkStorageMetadata | Block) -> tuple[Sequence[int], Sequence[int]]:
    return place.offsets, place.sizes


def _taken(rows: torch.Tensor, place: Block, at: int | Block, numel: int) -> torch.Tensor:
    """The entries that were wanted at ``at``, flat, of the flat ``rows`` that were read at ``place``."""
    if isinstance(at, int):
        start = at - place.offsets[0] * math.prod(place.shape[1:])
        return rows[start : start + numel]
    inner = Block((at.sizes[0], *at.shape[1:]), (0, *at.offsets[1:]), at.sizes)
    return inner.of(rows.view(inner.shape)).reshape(-1)


def _read_item(
    key: str,
    chunk: ChunkStorageMetadata,
    low: Sequence[int],
    lengths: Sequence[int],
    start: Sequence[int],
    target: str | None = None,
) -> ReadItem:
    """
    Args:
        low: where the entries that are read begin in the whole tensor.
        start: where the target begins in it.
    """
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(target or key),
        dest_offsets=torch.Size([at - first for at, first in zip(low, start, strict=True)]),
        storage_index=MetadataIndex(key, chunk.offsets),
        storage_offsets=torch.Size([at - first for at, first in zip(low, chunk.offsets, strict=True)]),
        lengths=torch.Size(lengths),
    )


def open_tensors(folder: Path) -> TensorReader:
    """Opens the tensors that `write` has written into ``folder``."""
    return TensorReader(dcp.HuggingFaceStorageReader(str(folder)), folder)


def _line(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {error}")[:200].rstrip(".")
