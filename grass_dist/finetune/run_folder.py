"""The folder of a run: whose it is while a run goes on, what may lie in it at the start, and how it is begun."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from grass_dist.checkpoint import disk, folders
from grass_dist.checkpoint.files import printable
from grass_dist.checkpoint.loading import Checkpoint
from grass_dist.errors import ConfigError
from grass_dist.finetune.checkpoints import check_shared
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.config_file import dump_config
from grass_dist.job.world import World
from grass_dist.regular_files import open_regular

LOCK, MODEL, RECORD = ".lock", "model", "metrics.jsonl"
OUTLIVES_ITS_HOST = 120.0
"""Seconds for which a server of files may keep the lock of a host that has lost its power (NFS: 90)."""
_LONGEST_LINE = 2**24
_OF_A_RUN = (
    *(folders.CHECKPOINTS, MODEL, f".{MODEL}.writing", f".{MODEL}.replaced"),
    *("plots", "tensorboard", "logs", "run.json", "report.html", RECORD),
)
"""The parts of a run that is replaced, in the order in which they go: the record says longest that there was one."""


class RunFolder:
    """``output_dir/name`` for one start of the ranks. Every method is called on every rank; a context manager.

    From the first call on that finds the folder there, or from `begin`, no other start can have it: rank 0 holds a lock
    on a file in it, which ends with the process, however that ends.

    Args:
        resume: ``--resume``; with "auto" a run that was stopped before its first checkpoint makes room.
    """

    def __init__(self, config: RunConfig, world: World, resume: str | None) -> None:
        self.path = Path(config.output_dir) / config.name
        self._config, self._world, self._resume = config, world, resume
        self._lock = _Lock(self.path / LOCK, config.name)

    def __enter__(self) -> RunFolder:
        self._world.together(lambda: self._take() if self._world.is_main and self.path.is_dir() else None)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def goes_on(self, checkpoint: Checkpoint | None) -> bool:
        """Says whether the run is that of the checkpoint; else it begins, maybe from another run's."""
        if checkpoint is None:
            return False
        return checkpoint.folder.resolve().parent == (self.path / folders.CHECKPOINTS).resolve()

    def check(self, checkpoint: Checkpoint | None) -> None:
        """Looks whether the run can have the folder. Changes nothing.

        Raises:
            ConfigError: on every rank: an earlier run lies there and ``overwrite`` is off, or something is in the way.
        """
        self._world.together(lambda: self._check(self.goes_on(checkpoint)) if self._world.is_main else None)

    def begin(self, checkpoint: Checkpoint | None, step: int) -> None:
        """Makes the folder, empty of an earlier run unless this one goes on with that, after a last look at it.

        Args:
            step: that the run begins with.

        Raises:
            ConfigError: on every rank: as `check`, or the folder cannot be made, or not all hosts see it.
            CheckpointError: on every rank: another process reads a checkpoint that is in the way.
        """
        main, going_on = self._world.is_main, self.goes_on(checkpoint)
        self._world.together(lambda: self._make(going_on, step) if main else None)
        check_shared(self._config, self.path, self._world)
        self._world.together(lambda: self._clear(going_on) if main else None)

    def _take(self) -> None:
        self._lock.take(OUTLIVES_ITS_HOST if self._resume == "auto" else 0.0)

    def _make(self, going_on: bool, step: int) -> None:
        with self._told():
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
        self._check(going_on)  # another start may have had it while this one loaded its model
        if going_on:
            folders.check_sweep(self.path / folders.CHECKPOINTS, step)

    def _clear(self, going_on: bool) -> None:
        with self._told():
            if not going_on and _holds_a_run(self.path):
                for part in _OF_A_RUN:
                    _remove(self.path / part)
            (self.path / "config.yaml").write_text(dump_config(self._config), encoding="utf-8")
            self._lock.keep()

    def _check(self, going_on: bool) -> None:
        config, model = self._config, self.path / MODEL
        for part in (model, self.path / folders.CHECKPOINTS, self.path, *self.path.parents):
            if part.is_symlink() and not part.exists():
                problem = f"{part} is a link to {part.readlink()}, which does not exist"
                raise ConfigError("output_dir", config.output_dir, problem, "make that folder, or choose another")
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError("output_dir", config.output_dir, f"{self.path} is not a folder", "choose another")
        replaces = not going_on and config.overwrite and _holds_a_run(self.path)
        if config.save_model and model.exists() and not model.is_dir() and not replaces:
            problem = f"{model} is a file, and the model is to be written as a folder of that name"
            raise ConfigError("name", config.name, problem, "remove that file, or choose another name")
        if going_on or replaces or not _holds_a_run(self.path):
            return
        if self._resume != "auto":
            fix = "choose another name, go on with it by --resume auto, or set overwrite=true"
            raise ConfigError("name", config.name, f"{self.path} holds an earlier run", fix)
        if why := _why_kept(self.path):
            problem = f"the run in {self.path} {why}, and --resume auto finds no checkpoint to go on from"
            fix = "bring the checkpoints back, choose another name, or set overwrite=true to throw that run away"
            raise ConfigError("name", config.name, problem, fix)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"{error.filename or self.path}: {error.strerror or error}"
            raise ConfigError("output_dir", self._config.output_dir, problem, "choose another") from None


class _Lock:
    """A file that one process has at a time; in it stands who that is."""

    def __init__(self, file: Path, name: str) -> None:
        self._file, self._name = file, name
        self._descriptor: int | None = None
        self._made = False

    def take(self, patience: float = 0.0) -> None:
        """Takes the file for this process, and writes into it who that is.

        Args:
            patience: seconds for which a process of another host is waited for, which may be gone with its host.

        Raises:
            ConfigError: another process has it, which is named.
            OSError: the file cannot be made.
        """
        until = time.monotonic() + patience
        while self._descriptor is None:
            self._made = not self._file.exists()
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            if not disk.lock(descriptor, fcntl.LOCK_EX):
                holder = printable(os.pread(descriptor, 200, 0).decode(errors="replace")) or "another process"
                os.close(descriptor)
                problem = f"{self._file.parent} is in use by {holder}"
                if f" on host {socket.gethostname()}," not in holder and time.monotonic() < until:
                    disk.tell_once(self._file, f"{problem}: waiting up to {patience:g} s, since that may be gone.")
                    time.sleep(0.5)
                    continue
                fix = f"wait for that to end, or choose another name; if its host is gone, remove {self._file}"
                raise ConfigError("name", self._name, problem, fix)
            if disk.is_at(descriptor, self._file):
                self._descriptor = descriptor
            else:  # a start that was refused has removed it meanwhile
                os.close(descriptor)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on host {socket.gethostname()}, since {now}\n".encode(), 0)

    def keep(self) -> None:
        """The file stays when it is released."""
        self._made = False

    def release(self) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            if self._made:
                self._file.unlink()
        os.close(self._descriptor)
        self._descriptor = None


def _holds_a_run(folder: Path) -> bool:
    if os.path.lexists(folder / RECORD) or folders.checkpoints_in(folder / folders.CHECKPOINTS):
        return True
    return _has_model(folder)


def _has_model(folder: Path) -> bool:
    model = folder / MODEL
    return model.is_dir() and any(model.iterdir())


def _why_kept(folder: Path) -> str | None:
    """Says what a run has that a new start must not replace; None if it was stopped before there was anything."""
    if _has_model(folder):
        return f"has ended (its model is in {folder / MODEL})"
    why = None
    with contextlib.suppress(OSError), open_regular(folder / RECORD) as record:
        while line := record.readline(_LONGEST_LINE):
            if b'"end"' not in line and b'"checkpoint"' not in line:
                continue
            with contextlib.suppress(ValueError, RecursionError):
                event = json.loads(line)
                kind = event.get("event") if isinstance(event, dict) else None
                if kind == "end":
                    return f"has ended ({RECORD} says so)"
                if kind == "checkpoint" and event.get("error") is None:
                    why = f"was saved ({RECORD} says so)"
    return why


def _remove(path: Path) -> None:
    """Removes a file, or a folder; of one that is a link or a disk of its own, what is in it.

    Raises:
        OSError: something of it stays.
    """
    if not path.is_dir():
        path.unlink(missing_ok=True)
    elif path.is_symlink() or path.is_mount():
        for inside in path.iterdir():
            _remove(inside) if inside.is_dir() and not inside.is_symlink() else inside.unlink()
    else:
        shutil.rmtree(path)
