"""Files that somebody else may have made: read only where they are plain files, and written beside what is there."""

from __future__ import annotations

import errno
import io
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path


def open_regular(path: str | os.PathLike[str], *, follow: bool = False) -> io.BufferedReader:
    """Opens a file for reading, without waiting for anybody to write into a pipe.

    Args:
        follow: whether ``path`` itself may be a link: True for a path that the user gives, False for a name that is
            looked up in a folder.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe, a device or (unless ``follow``) a link; ``strerror`` says
            which.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "it is a link, which is not followed", os.fspath(path)) from None
        if error.errno == errno.ENXIO:  # a socket
            raise OSError(errno.ENXIO, "it is not a file", os.fspath(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file", os.fspath(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | os.PathLike[str], largest: int, *, follow: bool = False) -> bytes:
    """The content of a file of at most ``largest`` bytes.

    Raises:
        OSError: as `open_regular`, or it is larger.
    """
    content = bytearray()
    with open_regular(path, follow=follow) as stream:
        while len(content) <= largest and (part := stream.read(min(2**20, largest + 1))):
            content += part
    if len(content) > largest:
        raise OSError(errno.EFBIG, f"it has more than {largest} bytes", os.fspath(path))
    return bytes(content)


def make_folder(path: Path) -> None:
    """Makes a folder, unless it is there.

    Raises:
        OSError: it cannot be made, or a link or something else has its name.
    """
    with suppress(FileExistsError):
        path.mkdir(parents=True)
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        kind = "a link, which is not followed" if path.is_symlink() else "not a folder"
        raise OSError(errno.ENOTDIR, f"it is {kind}; remove it", os.fspath(path))


def give_usual_modes(folder: Path) -> None:
    """Lets every file of a folder be read by whom the umask lets: safetensors keeps its files to their owner.

    Raises:
        OSError: the folder cannot be written into.
    """
    probe = folder / f".{secrets.token_hex(4)}.mode"
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    mode = stat.S_IMODE(probe.stat().st_mode)  # the umask itself can be read by changing it alone, for all threads
    probe.unlink()
    for entry in os.scandir(folder):
        if entry.is_file(follow_symlinks=False):
            os.chmod(entry.path, mode)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a new file and gives it the name ``path``: what had that name is replaced, and a link is not followed.

    Raises:
        OSError: it cannot be written; nothing is left then.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.writing")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
