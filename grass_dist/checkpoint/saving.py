"""Saving: decides the format of a run's snapshots, and writes them, at once or by a thread while training goes on."""

from __future__ import annotations

import datetime
import platform
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from grass_dist.checkpoint import disk, files, folders
from grass_dist.checkpoint.deepspeed_save import DeepSpeedSnapshot
from grass_dist.checkpoint.pieces import Holdings
from grass_dist.checkpoint.snapshot import HostCopies, Snapshot
from grass_dist.checkpoint.together import together
from grass_dist.checkpoint.zero_run import ZeroHoldings
from grass_dist.errors import CheckpointError
from grass_dist.ranks import Ranks, describe_error
from grass_dist.version import __version__

Format = Literal["auto", "dcp", "deepspeed"]


def snapshot_class(holdings: Holdings, format: Format) -> type[Snapshot]:
    """The class that takes a run's snapshots, which is their format; "auto" is DeepSpeed's own for its engines."""
    own = isinstance(holdings, ZeroHoldings)
    return DeepSpeedSnapshot if format == "deepspeed" or (format == "auto" and own) else Snapshot


def write_snapshot(
    parent: Path, snapshot: Snapshot, ranks: Ranks, keep: int, add_files: Callable[[Path], None] | None = None
) -> Path:
    """Writes a checkpoint below ``parent``. If that fails, nothing of it is left. Called on every rank of ``ranks``.

    Over the wire: the plans of `torch.distributed.checkpoint`, and eight gathers of a few bytes.

    Args:
        keep: how many checkpoints stay, with this one.
        add_files: puts further files into the folder; called on rank 0.

    Raises:
        CheckpointError: on every rank, if one rank fails.
    """
    writing = parent / f".{folders.folder_name(snapshot.step)}.writing"
    main = ranks.rank == 0
    try:
        together(ranks, lambda: _begin(writing) if main else None)
        together(ranks, lambda: snapshot.write_tensors(writing, ranks))
        together(ranks, lambda: _add(writing, snapshot, add_files) if main else None)
        names = together(ranks, lambda: files.files_in(writing))
        mine = together(ranks, lambda: {n: files.digest(writing / n) for n in names[ranks.rank :: ranks.world_size]})
        entries: dict[str, files.FileEntry] = {}
        for found in ranks.gather_objects(mine):
            entries |= found
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


def _begin(writing: Path) -> None:
    folders.clear(writing.parent, "writing")
    writing.mkdir(parents=True)


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
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "grass_dist": __version__,
            **snapshot.versions,
        },
        weights=dict(snapshot.weights),
        files=dict(entries),
    )


class Saver:
    """Writes the checkpoints of a run, one at a time, by a thread if asked to.

    Every method is called on every rank at the same steps.

    Args:
        parent: the folder of the run's checkpoints.
        ranks: that write, in a process group of their own, since the background thread communicates.
        keep: see `write_snapshot`.
        background: whether training goes on while a checkpoint is written, if its format allows that.
        format: see `snapshot_class`.
        add_files: see `write_snapshot`.
    """

    def __init__(
        self,
        parent: Path,
        holdings: Holdings,
        ranks: Ranks,
        *,
        keep: int,
        background: bool,
        format: Format = "dcp",
        add_files: Callable[[Path], None] | None = None,
    ) -> None:
        self._parent, self._holdings, self._ranks, self._keep = parent, holdings, ranks, keep
        self._add_files, self._class = add_files, snapshot_class(holdings, format)
        self.background = background and self._class.in_background
        self._copies = HostCopies() if self.background else None
        self._thread: threading.Thread | None = None
        self._outcome: Saved | None = None

    @property
    def done(self) -> bool:
        """Whether this rank knows the outcome of the save."""
        return self._outcome is not None and (self._thread is None or not self._thread.is_alive())

    def save(self, step: int, extra: Mapping[str, Any]) -> None:
        """Begins a save; without the background it is finished on return. `outcome` says how it went.

        The outcome of an earlier save must have been taken.
        """
        assert self._thread is None and self._outcome is None
        began = time.perf_counter()
        try:
            snapshot = self._class.take(self._holdings, step, extra, self._copies)
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
        """Waits for the save that is under way, if there is one, and returns once how it went."""
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
    """Seconds for which training waited."""
    seconds: float
    """Seconds that writing took, in the background or not."""
    nbytes: int
    """Bytes of the tensors that this rank wrote."""


def _as_checkpoint_error(error: Exception) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    problem = CheckpointError(describe_error(error))
    problem.__cause__ = error
    return problem


def _raise(error: Exception) -> None:
    raise error
