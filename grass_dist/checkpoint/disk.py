"""Differences between file systems: some cannot flush a folder, lock a file or remove a folder at once."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger("grass_dist")

_CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)
"""The error numbers of a file system that does not have the operation."""
_told: set[Hashable] = set()


def tell_once(what: Hashable, sentence: str) -> None:
    """Warns, unless this process has warned of ``what`` before."""
    if what not in _told:
        _told.add(what)
        log.warning(sentence)


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk.

    Some network file systems cannot flush a folder; a warning says so once for each of them.

    Raises:
        OSError: it was not written.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        about = os.fstat(descriptor)
        if error.errno not in _CANNOT or not stat.S_ISDIR(about.st_mode):
            raise
        tell_once(
            ("sync", about.st_dev),
            f"{path}: its file system cannot flush a folder ({error.strerror}), so what was just written there may be "
            "gone after a loss of power; a checkpoint or model that is there is whole all the same.",
        )
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flushes everything in a folder, and the folder."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def remove(path: Path) -> None:
    """Removes a folder and its content. If something cannot be removed, a warning says so once, with the reason."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        if path.exists():  # somebody else removes it too
            shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)  # as much of it as goes
        if os.path.lexists(path):
            reason = f"{error.filename or path}: {error.strerror or error}"
            tell_once(("remove", path), f"{path} cannot be removed ({reason}): it takes space until you remove it.")


def lock(descriptor: int, how: int) -> bool:
    """Locks an open file by ``fcntl.LOCK_SH`` or ``LOCK_EX`` until it is closed, or the process ends.

    Where the file system has no locks, the file counts as locked, and a warning says so once.

    Returns:
        Whether it is locked; False if another process has locked it.
    """
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in _CANNOT:
            raise
        where = os.readlink(f"/proc/self/fd/{descriptor}") if os.path.isdir("/proc/self/fd") else "a file"
        tell_once(
            ("lock", os.fstat(descriptor).st_dev),
            f"{where}: its file system has no locks ({error.strerror}), so nothing keeps two starts of one run apart "
            "there, nor a checkpoint that is read from being removed; see to it that a run is started once.",
        )
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has that name."""
    with suppress(OSError):
        mine, there = os.fstat(descriptor), path.lstat()
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
    return False


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to write into, which replaces ``folder`` when all of it is on the disk.

    If the writing fails, nothing of it is left and an earlier ``folder`` stays. If ``folder`` is a link, its target is
    replaced.

    Raises:
        OSError: it cannot be written.
    """
    place = folder.resolve()
    writing = place.with_name(f".{place.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        yield writing
        sync_tree(writing)
        put_in_place(writing, place, place.with_name(f".{place.name}.replaced"))
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def put_in_place(new: Path, place: Path, old: Path | None) -> None:
    """Renames the folder ``new`` to ``place``. An earlier ``place`` becomes ``old`` first, and is removed at the end.

    Args:
        old: None replaces nothing but an empty folder.

    Raises:
        OSError: it could not be done; the earlier ``place`` is there as before.
    """
    replaces = old if old is not None and place.exists() else None
    if replaces is not None:
        shutil.rmtree(replaces, ignore_errors=True)  # of one that was killed here
        place.rename(replaces)
    try:
        new.rename(place)
    except BaseException:
        if replaces is not None:
            replaces.rename(place)
        raise
    sync(place.parent)
    if old is not None:
        remove(old)
