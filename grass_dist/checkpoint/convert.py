"""Converts a checkpoint in DeepSpeed's own files into one of safetensors files, in one process on the CPU."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex

from grass_dist.checkpoint import files
from grass_dist.checkpoint.dcp import PieceSavePlanner, TensorReader, file_numbers
from grass_dist.checkpoint.folders import folder_name
from grass_dist.checkpoint.loading import Checkpoint, open_checkpoint
from grass_dist.checkpoint.pieces import Piece
from grass_dist.errors import CheckpointError
from grass_dist.ranks import describe_error


def to_dcp(source: Path, out: Path) -> Path:
    """Writes the content of ``source``, of kind "deepspeed", as a checkpoint of kind "dcp" below the folder ``out``.

    It takes memory for about four files (of `dcp.FILE_BYTES`, or of the largest tensor). As many ranks as saved the
    source go on from the new checkpoint to the bit; any other number can load it.

    Raises:
        CheckpointError: the source is damaged or of kind "dcp", there is such a checkpoint already, or writing fails;
            then nothing is left.
    """
    with open_checkpoint(source) as checkpoint:
        return _rewrite(checkpoint, out)


def _rewrite(checkpoint: Checkpoint, out: Path) -> Path:
    if checkpoint.manifest.kind == "dcp":
        raise CheckpointError(f"{checkpoint.folder} is in that format already.")
    with new_folder(out, checkpoint.step) as writing:
        (writing / files.TENSORS).mkdir()
        _write_tensors(checkpoint.tensors(), writing / files.TENSORS)
        _copy_rest(checkpoint, writing)
        return files.commit(writing, _manifest(checkpoint, writing))


@contextmanager
def new_folder(out: Path, step: int) -> Iterator[Path]:
    """Makes a folder to write the checkpoint of ``step`` into, which the block renames; it is gone if the block fails.

    Raises:
        CheckpointError: there is such a checkpoint in ``out``, or the block has failed.
    """
    final = out / folder_name(step)
    if final.exists():
        raise CheckpointError(f"{final} exists already; give another folder.")
    writing = out / f".{final.name}.writing"
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        yield writing
    except CheckpointException as error:  # no subclass of Exception
        raise CheckpointError(f"{final} was not written: {describe_error(error.failures[0][0])}") from error
    except Exception as error:
        raise CheckpointError(f"{final} was not written: {describe_error(error)}") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)


class _ReadWhenWritten(PieceSavePlanner):
    """Reads each tensor when the file that it belongs to is written."""

    def __init__(self, reader: TensorReader) -> None:
        super().__init__()
        self._reader = reader

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        like = self.state_dict[index.fqn].tensor
        return self._reader.read(index.fqn, 0, torch.empty(like.shape, dtype=like.dtype))


def _write_tensors(reader: TensorReader, folder: Path) -> None:
    like = {key: torch.empty(numel, dtype=dtype, device="meta") for key, (numel, dtype) in reader.tensors.items()}
    pieces = {key: Piece(key, tensor.numel(), 0, tensor) for key, tensor in like.items() if tensor.numel()}
    numbers = file_numbers({key: piece.tensor.nbytes for key, piece in pieces.items()}, 1)
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=numbers, save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be here
        dcp.save(dict(pieces), storage_writer=writer, planner=_ReadWhenWritten(reader), no_dist=True)


def _copy_rest(checkpoint: Checkpoint, writing: Path) -> None:
    """Writes state.json without the layout of DeepSpeed's files, and copies all files besides the tensors."""
    files.write_json(writing / files.STATE, checkpoint.state.model_dump(exclude={"deepspeed"}))
    for name in checkpoint.manifest.files:
        if name.split("/")[0] not in (files.DEEPSPEED, files.TENSORS, files.STATE):
            (writing / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.folder / name, writing / name)


def _manifest(checkpoint: Checkpoint, writing: Path) -> files.Manifest:
    """The new manifest. ``world_size`` stays: generators and measurements have a row for each rank that saved."""
    entries = {name: files.digest(writing / name) for name in files.files_in(writing)}
    return checkpoint.manifest.model_copy(update={"kind": "dcp", "files": entries})
