"""Reads a checkpoint in DeepSpeed's own files like one of ours: any entries of any weight or state.

`state.json` says where DeepSpeed's partitions lie (`FileLayout`), so a file is only opened when entries are
read from it. Files are mapped into memory, not read whole, and nothing in them is executed: DeepSpeed's own classes
become empty objects, and a file that mentions any other class is refused.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from pydantic import FailFast, Field
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from grass_dist.backends.zero.groups import Extent, extents_of
from grass_dist.backends.zero.private import STAGE_1_AND_2, STAGE_3
from grass_dist.checkpoint import files
from grass_dist.checkpoint.dcp import TensorReader
from grass_dist.checkpoint.files import Stored
from grass_dist.checkpoint.model import fqn
from grass_dist.checkpoint.pieces import Entries, decode, state_key
from grass_dist.checkpoint.torch_files import check_file
from grass_dist.errors import CheckpointError
from grass_dist.states.layer_state import MASTER

TAG = "state"
"""The tag, and so the folder, of DeepSpeed's files."""

MODEL_FILE, STATES_FILE = "mp_rank_00_model_states.pt", "mp_rank_00_optim_states.pt"
OPEN_FILES = 16
"""The number of files that stay mapped: the next entries are often in one of the last files."""


Way = tuple[str | int, ...]
"""The keys that lead to a tensor within a file."""


class Placed(Stored):
    """A parameter in a partition."""

    name: str
    numel: int = Field(ge=0)
    shard: int = Field(ge=0)
    """At stage 3 the elements of a rank's shard, padding included; else 0."""


class GroupLayout(Stored):
    """The partitions of a parameter group of DeepSpeed's."""

    unit: str
    partition: int = Field(ge=0)
    """The elements of each rank's partition, padding included."""
    params: Annotated[list[Placed], FailFast()]


class FileLayout(Stored):
    """The places of DeepSpeed's partitions; part of state.json of a checkpoint in its format."""

    stage: Literal[1, 2, 3]
    groups: Annotated[list[GroupLayout], FailFast()]
    """The groups, in the order of DeepSpeed's files."""
    frozen: Annotated[list[Placed], FailFast()]
    """The parameters that never train."""
    masters: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the masters in the files: bf16 with `bf16_master_weights_and_grads`."""


@dataclass(frozen=True, slots=True)
class Source:
    """The place of consecutive entries of a tensor."""

    start: int
    length: int
    file: str
    keys: Way
    at: int
    """The index at which the entries begin in the file's tensor."""
    dtype: torch.dtype
    """The dtype of the file's tensor."""


def open_deepspeed(
    checkpoint: Path, manifest: files.Manifest, layout: Mapping[str, Any] | None, units: Mapping[str, Entries]
) -> TensorReader:
    """Opens the tensors of a checkpoint of kind "deepspeed", under the keys of one of kind "dcp".

    Args:
        checkpoint: the folder of the checkpoint.
        layout: the `FileLayout` in its state.json.
        units: the states in its state.json.

    Raises:
        CheckpointError: state.json does not describe them, or what each rank has for itself cannot be read.
    """
    placed = files.parse(FileLayout, layout, checkpoint / files.STATE)
    sources = _Sources(checkpoint, manifest, placed).collect(units)
    return TensorReader(
        DeepSpeedReader(checkpoint / files.DEEPSPEED / TAG, sources, checkpoint / files.TENSORS), checkpoint
    )


class _Sources:
    """Finds the place of each tensor."""

    def __init__(self, checkpoint: Path, manifest: files.Manifest, layout: FileLayout) -> None:
        self._checkpoint, self._manifest, self._layout = checkpoint, manifest, layout
        self._names = STAGE_3 if layout.stage == 3 else STAGE_1_AND_2
        self._found: dict[str, tuple[int, torch.dtype, list[Source]]] = {}

    def collect(self, units: Mapping[str, Entries]) -> dict[str, tuple[int, torch.dtype, list[Source]]]:
        """Gives (number of entries, dtype, sources) of each weight and state.

        Raises:
            CheckpointError: the layout is not of this model, or a file is missing.
        """
        groups = self._layout.groups
        if unknown := sorted(set(units) - {group.unit for group in groups}):
            raise self._damaged(f"{unknown[0]!r:.80} has a state and lies nowhere")
        for rank in range(self._manifest.world_size):
            file = self._file(rank, STATES_FILE)
            for index, group in enumerate(groups):
                for extent in self._extents(group, rank):
                    self._add_states(file, index, extent, units.get(group.unit, {}).get(extent.name, {}))
        trained = {param.name for group in groups for param in group.params} if self._layout.stage == 3 else set()
        self._add_weights({name for name in self._manifest.weights if name not in trained})
        return self._found

    def _add_states(self, file: str, index: int, extent: Extent, entries: Mapping[str, Any]) -> None:
        masters: Way = ("optimizer_state_dict", self._names.masters_key, index)
        found: list[tuple[str, torch.dtype, Way]] = []
        if self._layout.stage == 3:
            found.append((extent.name, self._dtype(extent.name), masters))
        for key, entry in entries.items():
            if isinstance(dtype := decode(entry), torch.dtype):
                moments: Way = ("optimizer_state_dict", self._names.optimizer_key, "state", index, key)
                found.append((state_key(extent.name, key), dtype, masters if key == MASTER else moments))
        for key, dtype, way in found:
            kept = getattr(torch, self._layout.masters) if way == masters else dtype
            self._add(key, extent.numel, dtype, Source(extent.start, extent.length, file, way, extent.at, kept))

    def _add_weights(self, names: set[str]) -> None:
        """Adds the weights in the model's files; at stage 3 these are buffers and weights that never train."""
        frozen = {param.name: param for param in self._layout.frozen} if self._layout.stage == 3 else {}
        for name in sorted(names):
            dtype, size = self._dtype(name), files.numel(self._manifest.weights[name])
            if name not in frozen:
                self._add(name, size, dtype, Source(0, size, self._file(0, MODEL_FILE), ("module", name), 0, dtype))
                continue
            self._check(frozen[name])
            for rank in range(self._manifest.world_size):
                file, way = self._file(rank, MODEL_FILE), ("frozen_param_fragments", name)
                [extent] = extents_of([(name, size)], rank, 0, [frozen[name].shard])
                self._add(name, size, dtype, Source(extent.start, extent.length, file, way, 0, dtype))

    def _add(self, key: str, numel: int, dtype: torch.dtype, source: Source) -> None:
        of = self._found.setdefault(key, (numel, dtype, []))
        if source.length:
            of[2].append(source)

    def _extents(self, group: GroupLayout, rank: int) -> Iterator[Extent]:
        for param in group.params:
            self._check(param)
        shards = [param.shard for param in group.params] if self._layout.stage == 3 else None
        return extents_of([(param.name, param.numel) for param in group.params], rank, group.partition, shards)

    def _check(self, param: Placed) -> None:
        entry = self._manifest.weights.get(param.name)
        if entry is None or files.numel(entry) != param.numel:
            raise self._damaged(f"{param.name!r:.80} is no weight of {param.numel} elements")

    def _dtype(self, name: str) -> torch.dtype:
        dtype = getattr(torch, self._manifest.weights[name].dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{self._checkpoint / files.MANIFEST} is damaged: {name} is of no known dtype.")
        return dtype

    def _file(self, rank: int, kind: str) -> str:
        """The name of a file of ``rank``, which depends on the stage and the dtype; see `DeepSpeedEngine`."""
        names = [f"{low}zero_pp_rank_{rank}_{kind}" for low in ("", "bf16_")]
        for name in [kind] if kind == MODEL_FILE and self._layout.stage < 3 else names:
            if f"{files.DEEPSPEED}/{TAG}/{name}" in self._manifest.files:
                return name
        raise CheckpointError(f"{self._checkpoint} has no {kind} of rank {rank} among DeepSpeed's files.")

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._checkpoint / files.STATE} is damaged: {what}.")


class DeepSpeedReader(dcp.HuggingFaceStorageReader):
    """Reads the tensors that DeepSpeed's files hold from them, and all others from safetensors files.

    Args:
        folder: the folder of DeepSpeed's files.
        sources: (number of entries, dtype, places) of each tensor in them.
        rest: the folder of the safetensors files.
    """

    def __init__(self, folder: Path, sources: Mapping[str, tuple[int, torch.dtype, list[Source]]], rest: Path) -> None:
        super().__init__(str(rest))
        self._folder, self._sources = folder, sources
        self._of = {(key, source.start): source for key, (_, _, parts) in sources.items() for source in parts}
        self._files: OrderedDict[str, Any] = OrderedDict()

    def read_metadata(self) -> Metadata:
        found = super().read_metadata()
        of_theirs = {
            key: TensorStorageMetadata(
                properties=TensorProperties(dtype=dtype),
                size=torch.Size([numel]),
                chunks=[ChunkStorageMetadata(torch.Size([s.start]), torch.Size([s.length])) for s in parts],
            )
            for key, (numel, dtype, parts) in self._sources.items()
        }
        return Metadata(state_dict_metadata={**found.state_dict_metadata, **of_theirs}, storage_data=found.storage_data)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        theirs = [item for item in plan.items if item.storage_index.fqn in self._sources]
        if rest := [item for item in plan.items if item.storage_index.fqn not in self._sources]:
            super().read_data(LoadPlan(rest), planner).wait()
        for item in sorted(theirs, key=lambda item: self._source(item).file):
            self._copy(item, planner)
        (done := Future[None]()).set_result(None)
        return done

    def _source(self, item: ReadItem) -> Source:
        assert item.storage_index.offset is not None
        return self._of[item.storage_index.fqn, item.storage_index.offset[0]]

    def _copy(self, item: ReadItem, planner: LoadPlanner) -> None:
        source = self._source(item)
        flat = self._tensor(source)
        begin = source.at + item.storage_offsets[0]
        target = planner.resolve_tensor(item)
        target.copy_(flat[begin : begin + item.lengths[0]])
        planner.commit_tensor(item, target)

    def _tensor(self, source: Source) -> torch.Tensor:
        value = _at(self._opened(source.file), source.keys)
        if not _is_plain(value, source):
            way = "/".join(str(key) for key in source.keys)
            raise CheckpointError(f"{self._folder / source.file} does not hold {way} as {files.STATE} says.")
        return value.detach().reshape(-1)

    def _opened(self, name: str) -> Any:
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        content = read_file(self._folder / name)
        if isinstance(module := content.get("module"), Mapping):
            content["module"] = {fqn(str(key)): value for key, value in module.items()}
        self._files[name] = content
        while len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)
        return content


def _at(content: Any, keys: Way) -> Any:
    """The value to which ``keys`` lead through nested dicts and lists; None if they lead nowhere."""
    for key in keys:
        if not isinstance(content, dict | list):
            return None
        try:
            content = content[key]  # pyright: ignore[reportArgumentType, reportCallIssue]
        except (KeyError, IndexError, TypeError):
            return None
    return content


def _is_plain(value: Any, source: Source) -> bool:
    """Whether ``value`` is a tensor of which ``source`` can be a part; it may have other strides if it is all of it."""
    if not torch.is_tensor(value) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    size, needed = value.numel(), source.at + source.length
    return value.dtype == source.dtype and size >= needed and (value.is_contiguous() or size == source.length)


class _Unused:
    """Stands for an object of one of DeepSpeed's classes, which nobody uses."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> _Unused:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""The classes in DeepSpeed's files, in all supported releases, besides tensors and what JSON can hold."""


def read_file(file: Path, allowed: Sequence[str] = _CLASSES) -> dict[str, Any]:
    """Maps a file of DeepSpeed's into memory. Of objects that are no tensors, only the names of their classes are used.

    Raises:
        CheckpointError: it cannot be read, or not without executing something in it, or it would take more memory than
            it has bytes.
    """
    try:
        check_file(file, allowed)
        with torch.serialization.safe_globals([(_Unused, name) for name in allowed]):
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"an object of {named[1]:.100}" if named else "something else than tensors"
        raise CheckpointError(
            f"{file} holds {what}, and is not read, since that could execute anything: a file of DeepSpeed's needs "
            "no such object; leave it out of the engine's client state, scheduler and configuration."
        ) from None
    except Exception as error:  # `Unreadable`, or whatever a damaged file makes torch raise
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{file} cannot be read: {files.printable(reason)}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a file of DeepSpeed's.")
    return content
