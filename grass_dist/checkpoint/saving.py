"""Saving: what the ranks hold is copied to host memory, and written from there while training goes on."""

from __future__ import annotations

import datetime
import math
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from grass_dist.checkpoint import disk, files, folders
from grass_dist.checkpoint.dcp import file_numbers, write
from grass_dist.checkpoint.per_rank import per_rank_pieces
from grass_dist.checkpoint.pieces import Holdings, Piece, dtype_name
from grass_dist.errors import CheckpointError
from grass_dist.ranks import Ranks, describe_error
from grass_dist.ranks import together as all_together
from grass_dist.version import __version__

T = TypeVar("T")

WriteTensors = Callable[[Path], None]
"""Writes the tensors of all ranks into a folder; called on every rank."""


@dataclass
class Snapshot:
    """A run at the end of an optimizer step, as it is to be written."""

    step: int
    kind: Literal["dcp", "deepspeed"]
    state: dict[str, Any]
    """For state.json."""
    weights: dict[str, Any]
    backend: str
    write_tensors: WriteTensors
    nbytes: int = 0
    """Of this rank's tensors; unknown, 0, where DeepSpeed writes them."""
    versions: dict[str, str] = field(default_factory=dict)


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


def take_snapshot(
    holdings: Holdings, ranks: Ranks, step: int, extra: Mapping[str, Any], copy: Callable[[Piece], Piece] | None = None
) -> Snapshot:
    """Collects what this rank writes, in the format that any number of ranks can load.

    Args:
        ranks: over whose group the tensors are written.
        extra: of the program, as JSON can hold it; equal on all ranks.
        copy: of each piece, where training goes on before it is written.
    """
    weights, described = holdings.weights(), holdings.describe()
    sizes: dict[str, int] = {}
    mine: list[Piece] = []

    def take(pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            sizes[piece.key] = piece.numel * piece.tensor.element_size()
            if (written := piece.to_write(holdings.ranks)) is not None:
                mine.append(written if copy is None else copy(written))

    with torch.no_grad():
        take(weights)
        units = {}
        for unit in holdings.states():
            take(unit.tensors)
            units[unit.name] = unit.entries
        take(per_rank_pieces(described["engine"], holdings.ranks))
    engine = {**described["engine"], "measured": {"layers": described["engine"]["measured"]["layers"]}}
    state = {"engine": _without_nan(engine), "groups": described["groups"], "units": units, "run": dict(extra)}
    numbers = file_numbers(sizes, holdings.ranks.world_size)
    return Snapshot(
        step,
        "dcp",
        state,
        _weight_entries(holdings, weights),
        holdings.name,
        lambda folder: write(folder / files.TENSORS, mine, numbers, ranks.group),
        sum(piece.tensor.nbytes for piece in mine),
    )


def _weight_entries(holdings: Holdings, weights: Sequence[Piece]) -> dict[str, Any]:
    dtypes = {piece.key: dtype_name(piece.tensor.dtype) for piece in weights}
    return {key: {"shape": list(shape), "dtype": dtypes[key]} for key, shape in holdings.shapes().items()}


def _without_nan(engine: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: an importance that was not measured is null."""
    tracker = engine["tracker"]
    plain = [None if math.isnan(m) else m for m in tracker["importances"]]
    return {**engine, "tracker": {**tracker, "importances": plain}}


def write_snapshot(
    parent: Path, snapshot: Snapshot, ranks: Ranks, keep: int, add_files: Callable[[Path], None] | None = None
) -> Path:
    """Writes a checkpoint below ``parent``, or leaves no trace of it. Called on every rank of ``ranks``.

    Over the wire: what `torch.distributed.checkpoint` plans by, and five gathers of a few bytes.

    Args:
        keep: checkpoints that stay, this one included.
        add_files: puts further files into the folder; called on rank 0.

    Raises:
        CheckpointError: on every rank, if one fails.
    """
    writing = parent / f".{folders.folder_name(snapshot.step)}.writing"
    main = ranks.rank == 0
    try:
        together(ranks, lambda: _begin(writing, snapshot.kind) if main else None)
        together(ranks, lambda: snapshot.write_tensors(writing))
        together(ranks, lambda: _add(writing, snapshot, add_files) if main else None)
        names = together(ranks, lambda: files.files_in(writing))
        mine = together(ranks, lambda: {n: files.digest(writing / n) for n in names[ranks.rank :: ranks.world_size]})
        entries: dict[str, files.FileEntry] = {}
        for found in ranks.gather_objects(mine):
            entries |= found  # type: ignore[operator]
        final = together(ranks, lambda: files.commit(writing, _manifest(snapshot, ranks, entries)) if main else None)
    except CheckpointError as error:
        if main:
            disk.remove(writing)
        raise CheckpointError(f"The checkpoint of step {snapshot.step} was not written: {error}") from error
    try:
        together(ranks, lambda: folders.prune(parent, keep) if main else None)
    except CheckpointError as error:
        raise CheckpointError(
            f"The checkpoint of step {snapshot.step} is there, and older ones could not be removed: {error}"
        ) from error
    return final or parent / folders.folder_name(snapshot.step)


def _begin(writing: Path, kind: str) -> None:
    folders.clear(writing.parent, "writing")
    (writing / (files.TENSORS if kind == "dcp" else files.DEEPSPEED)).mkdir(parents=True)


def _add(writing: Path, snapshot: Snapshot, add_files: Callable[[Path], None] | None) -> None:
    files.write_json(writing / files.STATE, snapshot.state)
    if add_files is not None:
        add_files(writing)


def _manifest(snapshot: Snapshot, ranks: Ranks, entries: Mapping[str, files.FileEntry]) -> files.Manifest:
    return files.Manifest(
        format=files.FORMAT,
        version=files.VERSION,
        kind=snapshot.kind,
        step=snapshot.step,
        world_size=ranks.world_size,
        backend=snapshot.backend,
        saved=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={**_versions(), **snapshot.versions},
        weights=snapshot.weights,
        files=dict(entries),
    )


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "grass_dist": __version__,
    }


def together(ranks: Ranks, work: Callable[[], T]) -> T:
    """Does ``work`` on every rank; see `grass_dist.ranks.together`.

    Raises:
        CheckpointError: on every rank, with the sentence of the first that failed.
    """
    return all_together(ranks, work, raise_as=CheckpointError)


class Saver:
    """Writes checkpoints of a run, one at a time, in the background if asked to.

    Every method is called on every rank at the same steps.

    Args:
        parent: folder of the run's checkpoints.
        ranks: with a process group of their own, since the background thread communicates.
        take: makes the snapshot of (step, extra, copy of a piece).
        add_files: see `write_snapshot`.
    """

    def __init__(
        self,
        parent: Path,
        ranks: Ranks,
        take: Callable[[int, Mapping[str, Any], Callable[[Piece], Piece] | None], Snapshot],
        *,
        keep: int,
        background: bool,
        add_files: Callable[[Path], None] | None = None,
    ) -> None:
        self._parent, self._ranks, self._take, self._keep = parent, ranks, take, keep
        self.background, self._add_files = background, add_files
        self._copies = HostCopies() if background else None
        self._thread: threading.Thread | None = None
        self._outcome: Saved | None = None

    @property
    def busy(self) -> bool:
        """Whether there is a save whose outcome has not been taken."""
        return self._thread is not None or self._outcome is not None

    @property
    def done(self) -> bool:
        """Whether this rank knows the outcome."""
        return self._outcome is not None and (self._thread is None or not self._thread.is_alive())

    def save(self, step: int, extra: Mapping[str, Any]) -> None:
        """Begins a save, and ends it unless it is for the background. `outcome` says how it went.

        An earlier save must have been waited for.
        """
        assert not self.busy
        began = time.perf_counter()
        try:
            snapshot = self._take(step, extra, self._copies)
            problem = None
        except Exception as error:  # the other ranks are told below
            snapshot, problem = None, error

        def work() -> None:
            begun = time.perf_counter()
            try:
                together(self._ranks, lambda: _raise(problem) if problem else None)
                assert snapshot is not None
                path = write_snapshot(self._parent, snapshot, self._ranks, self._keep, self._add_files)
                seconds = time.perf_counter() - begun
                self._outcome = Saved(step, path, None, stall, seconds, snapshot.nbytes)
            except Exception as error:
                self._outcome = Saved(step, None, _as_checkpoint_error(error), stall, time.perf_counter() - begun, 0)

        if self.background:
            stall = time.perf_counter() - began
            self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            stall = 0.0
            work()
            assert self._outcome is not None
            self._outcome.stall_seconds = time.perf_counter() - began

    def outcome(self) -> Saved | None:
        """Waits for the save that is under way, if there is one, and says once how it went."""
        if self._thread is not None:
            self._thread.join()
        self._thread, outcome, self._outcome = None, self._outcome, None
        return outcome


@dataclass
class Saved:
    """How a save went."""

    step: int
    folder: Path | None
    error: CheckpointError | None
    stall_seconds: float
    """That training waited."""
    seconds: float
    """Of writing, in the background or not."""
    nbytes: int
    """Bytes of tensors that this rank wrote."""


def _as_checkpoint_error(error: Exception) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    problem = CheckpointError(describe_error(error))
    problem.__cause__ = error
    return problem


def _raise(error: Exception) -> None:
    raise error
