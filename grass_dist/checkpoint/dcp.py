"""`torch.distributed.checkpoint` over `Piece`s: safetensors files that say which entries of which tensor they hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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

FILE_BYTES = 512 * 2**20
"""Bytes after which a rank begins another file: writing a file takes its size in memory once more."""


class PieceSavePlanner(DefaultSavePlanner):
    """Saves each `Piece` as a chunk of a one-dimensional tensor. No two ranks save the same entries."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(piece) for piece in self.state_dict.values()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].tensor


def _write_item(piece: Piece) -> WriteItem:
    start, size = torch.Size([piece.start]), piece.tensor.size()
    return WriteItem(
        index=MetadataIndex(piece.key, start),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=start, sizes=size),
            properties=TensorProperties.create_from_tensor(piece.tensor),
            size=torch.Size([piece.numel]),
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
        start, length = read_item.dest_offsets[0], read_item.lengths[0]
        return self._targets[read_item.dest_index.fqn][start : start + length]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...


class TensorReader:
    """Reads any run of entries of any tensor of a checkpoint into given memory.

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

    def read(self, key: str, start: int, out: torch.Tensor) -> torch.Tensor:
        """Entries ``start`` to ``start + out.numel()`` of ``key`` into the flat tensor ``out``.

        Raises:
            CheckpointError: they are not all there, or of another dtype.
        """
        return self.read_all([(key, start, out)])[0]

    def read_all(self, wanted: Sequence[tuple[str, int, torch.Tensor]]) -> list[torch.Tensor]:
        """Does what `read` does for several keys at once, each of which is there once. Each file is opened once."""
        items = [item for key, start, out in wanted for item in self._items(key, start, out)]
        self._read(items, {key: out for key, _, out in wanted})
        return [out for _, _, out in wanted]

    def try_all(self, part: tuple[int, int]) -> None:
        """Reads one entry of every part of every tensor. With ``part`` (i, n), rank i of n tries every n-th part.

        Raises:
            CheckpointError: a file cannot be read.
        """
        held = {key: dtype for key, (numel, dtype) in self.tensors.items() if numel}
        chunks = [(key, chunk, dtype) for key, dtype in held.items() for chunk in self._chunks(key, dtype)]
        items, targets = [], {}
        for key, chunk, dtype in chunks[part[0] :: part[1]]:
            at = chunk.offsets[0]
            name = f"{key} from {at}"
            items.append(_read_item(key, chunk, at, at + 1, at, name))
            targets[name] = torch.empty(1, dtype=dtype)
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
        found = sum(chunk.sizes[0] for chunk in self._chunks(key, dtype)) if numel else 0
        if found != numel:
            raise CheckpointError(f"{self._where} holds {found} entries of {key!r:.80} where there are {numel}.")

    def _items(self, key: str, start: int, out: torch.Tensor) -> list[ReadItem]:
        items, end = [], start + out.numel()
        for chunk in self._chunks(key, out.dtype) if out.numel() else ():
            low, high = max(start, chunk.offsets[0]), min(end, chunk.offsets[0] + chunk.sizes[0])
            if low < high:
                items.append(_read_item(key, chunk, low, high, start))
        if sum(item.lengths[0] for item in items) != out.numel():
            raise CheckpointError(f"{self._where} does not hold entries {start} to {end} of {key!r:.80}.")
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
            at, chunks = 0, sorted(found.chunks, key=lambda chunk: tuple(chunk.offsets))
            for chunk in chunks:
                flat = len(chunk.offsets) == len(chunk.sizes) == 1
                if not flat or chunk.offsets[0] != at or not chunk.sizes[0]:
                    raise CheckpointError(f"{self._where} does not hold entry {at} of {key!r:.80}, or holds it twice.")
                at += chunk.sizes[0]
            self._whole[key] = chunks
        return self._whole[key]


def _read_item(
    key: str, chunk: ChunkStorageMetadata, low: int, high: int, start: int, target: str | None = None
) -> ReadItem:
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(target or key),
        dest_offsets=torch.Size([low - start]),
        storage_index=MetadataIndex(key, chunk.offsets),
        storage_offsets=torch.Size([low - chunk.offsets[0]]),
        lengths=torch.Size([high - low]),
    )


def open_tensors(folder: Path) -> TensorReader:
    """Opens the tensors that `write` has written into ``folder``."""
    return TensorReader(dcp.HuggingFaceStorageReader(str(folder)), folder)


def _line(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {error}")[:200].rstrip(".")
