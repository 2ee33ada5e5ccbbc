"""The folder of a checkpoint: which files are in it, and whether it is whole.

A save writes into ``.step-000200.writing`` and renames that to ``step-000200`` when every file is on the disk and
listed, with its size and SHA-256, in ``checkpoint.json``. A folder with that name is therefore complete, whenever the
power failed. `verify` finds damage that happened afterwards.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, FailFast, Field, model_validator

from grass_dist.checkpoint import disk, folders
from grass_dist.checkpoint.folders import MANIFEST
from grass_dist.config import StrictModel
from grass_dist.errors import CheckpointError, GrassError
from grass_dist.regular_files import open_regular

FORMAT, VERSION = "grass_dist checkpoint", 1
STATE, TENSORS, DEEPSPEED, MODEL = "state.json", "tensors", "deepspeed", "model"
LARGEST_JSON = 64 * 2**20
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


def up_to_a_wrong_one(right: Callable[[Any], bool]) -> BeforeValidator:
    """A validator that cuts a dict down to its first value that is not ``right``, which then makes the one error."""

    def first_wrong(value: Any) -> Any:
        entries = value.items() if isinstance(value, dict) else ()
        return next(({key: entry} for key, entry in entries if not right(entry)), value)

    return BeforeValidator(first_wrong)


def _can_be(kind: type[StrictModel]) -> Callable[[Any], bool]:
    def right(entry: Any) -> bool:
        try:
            return isinstance(entry, kind) or bool(kind(**entry))
        except (GrassError, TypeError):
            return False

    return right


class Stored(StrictModel):
    """A part of a JSON file of ours.

    Reading stops at the first thing that is wrong, here and with `FailFast` and `up_to_a_wrong_one`: a forged file can
    hold millions of wrong things, and each error takes a kilobyte.
    """

    @model_validator(mode="before")
    @classmethod
    def _up_to_an_unknown_key(cls, data: Any) -> Any:
        if not isinstance(data, dict) or all(key in cls.model_fields for key in data):
            return data
        odd = next(key for key in data if key not in cls.model_fields)
        return {key: data[key] for key in (*cls.model_fields, odd) if key in data}


class FileEntry(Stored):
    """A file as it was written."""

    bytes: int = Field(ge=0, lt=2**63)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class TensorEntry(Stored):
    """A weight or buffer of the model."""

    shape: Annotated[list[int], FailFast()]
    dtype: str


class Manifest(Stored):
    """``checkpoint.json``."""

    format: Literal["grass_dist checkpoint"]
    version: int
    kind: Literal["dcp", "deepspeed"]
    """The format of the tensors: safetensors by `torch.distributed.checkpoint`, or DeepSpeed's own files."""
    step: int = Field(ge=0, lt=2**53)
    """The number of global batches that it was trained on."""
    world_size: int = Field(ge=1)
    backend: str
    saved: str
    """The time of the save, in UTC, as ISO 8601."""
    versions: Annotated[dict[str, str], up_to_a_wrong_one(lambda text: isinstance(text, str))]
    weights: Annotated[dict[str, TensorEntry], up_to_a_wrong_one(_can_be(TensorEntry))]
    files: Annotated[dict[str, FileEntry], up_to_a_wrong_one(_can_be(FileEntry))]
    """All other files of the folder, by their paths in it."""


def digest(file: Path) -> FileEntry:
    """The size and SHA-256 of a regular file that is not a link.

    Raises:
        OSError: it is something else, or cannot be read.
    """
    with open_regular(file) as stream:
        return FileEntry(
            bytes=os.fstat(stream.fileno()).st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest()
        )


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file and flushes it to the disk."""
    with file.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, allow_nan=False)
        stream.flush()
        os.fsync(stream.fileno())


def read_json(file: Path) -> Any:
    """Reads a JSON file of at most `LARGEST_JSON` bytes.

    Raises:
        CheckpointError: it is missing, too large, or not JSON.
    """
    try:
        with open_regular(file) as stream:
            if (size := os.fstat(stream.fileno()).st_size) > LARGEST_JSON:
                raise CheckpointError(f"{file} has {size} bytes, more than a file of ours ever has.")
            return json.loads(stream.read(), parse_constant=_no_constant)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: it is not JSON ({printable(error)[:100]}).") from None


_Model = TypeVar("_Model", bound=StrictModel)


def parse(kind: type[_Model], body: Any, file: Path) -> _Model:
    """Validates what `read_json` read from ``file``, as an object of ``kind``.

    Raises:
        CheckpointError: the first thing that is wrong with it.
    """
    try:
        if isinstance(body, dict):
            return kind(**body)
        problem = "it holds no settings."
    except GrassError as error:
        problem = printable(error)
    except (TypeError, RecursionError):
        problem = "it holds something that is never written."
    raise CheckpointError(f"{file} is damaged: {problem}")


def printable(text: object) -> str:
    """``text`` as one line of at most 250 printable characters, for an error message."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))[:250]


def files_in(folder: Path) -> list[str]:
    """The sorted paths of all files and links in a folder, without the manifest."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    found = [path.relative_to(folder).as_posix() for path in paths]
    return sorted(name for name in found if name != MANIFEST)


def commit(writing: Path, manifest: Manifest) -> Path:
    """Writes the manifest of ``writing`` and renames the folder: from then on it is a checkpoint.

    It replaces an earlier checkpoint of the same step.

    Raises:
        CheckpointError: another process reads that earlier one.
    """
    body = manifest.model_dump(mode="json")
    write_json(writing / MANIFEST, {**body, "digest": _digest_of(body)})
    disk.sync_tree(writing)  # files that others have written, too
    final = writing.with_name(folders.folder_name(manifest.step))
    if final.exists() and not folders.put_away(final):
        raise CheckpointError(f"{final} is being read by another process, so it is not replaced.")
    writing.rename(final)
    disk.sync(final.parent)
    folders.clear(final.parent)
    return final


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks ``checkpoint.json``.

    Raises:
        CheckpointError: the folder is no checkpoint of ours, or its manifest is damaged.
    """
    file = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder.")
    if not file.exists():
        raise CheckpointError(f"{folder} is not a checkpoint of grass_dist: it has no {MANIFEST}.")
    body = read_json(file)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not of a checkpoint of grass_dist.")
    if body.get("version") != VERSION:
        raise CheckpointError(
            f"{file} is of version {body.get('version')!r:.40} of the format, and this grass_dist reads {VERSION}; "
            "load it with the release that wrote it."
        )
    if not _is_as_written(body):
        raise CheckpointError(f"{file} is damaged: its content is not what was written.")
    manifest = parse(Manifest, body, file)
    for name in manifest.files:
        _check_name(folder, name)
    return manifest


def verify(folder: Path, manifest: Manifest, part: tuple[int, int] = (0, 1)) -> None:
    """Compares the files of a checkpoint with its manifest.

    Args:
        part: (i, n) reads every n-th file, beginning with the i-th, so that n ranks share the work. Each of them
            compares the list of files and their sizes.

    Raises:
        CheckpointError: names the first file that is missing, of another size, changed, or not listed.
    """
    if unknown := sorted(set(files_in(folder)) - set(manifest.files)):
        raise CheckpointError(f"{folder} holds a file that was not saved with it: {unknown[0]!r:.80}.")
    for name in sorted(manifest.files):
        _check_regular(folder, name)
        size, wanted = (folder / name).stat().st_size, manifest.files[name].bytes
        if size != wanted:
            raise CheckpointError(f"{folder / name} is damaged: it has {size} bytes and was written with {wanted}.")
    for name in sorted(manifest.files)[part[0] :: part[1]]:
        try:
            found = digest(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error.strerror or error}.") from None
        if found != manifest.files[name]:
            raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not that of the file that was written.")


def total_bytes(manifest: Manifest, names: Iterable[str] | None = None) -> int:
    return sum(manifest.files[name].bytes for name in (manifest.files if names is None else names))


def numel(entry: TensorEntry) -> int:
    return math.prod(entry.shape)


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _is_as_written(body: dict[str, Any]) -> bool:
    """Whether the digest is that of the rest. Takes the digest out of ``body``."""
    try:
        return body.pop("digest", None) == _digest_of(body)
    except RecursionError:  # deeper than anything that was written
        return False


def _check_name(folder: Path, name: str) -> None:
    parts = name.split("/")
    if not 1 <= len(parts) <= 3 or not all(_NAME.fullmatch(part) for part in parts):
        raise CheckpointError(f"{folder / MANIFEST} lists {name!r:.80}, which is no name of a file in a checkpoint.")


def _check_regular(folder: Path, name: str) -> None:
    at = folder
    for part in name.split("/"):
        at = at / part
        if at.is_symlink():
            raise CheckpointError(f"{at} is a link; a checkpoint is made of files.")
    if not at.exists():
        raise CheckpointError(f"{at} is missing.")
    if not at.is_file():
        raise CheckpointError(f"{at} is not a file.")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
