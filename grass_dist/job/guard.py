"""Keeps what only watches a run from ending it: its errors are told once, and the run goes on."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from grass_dist.record.once import Once

READER_SECONDS = 1.0
"""Seconds that are waited for a terminal which takes nothing for the moment."""


class Guard(Once):
    """Stands around writers and displays of a program of our own, whose threads it may watch too."""

    @contextlib.contextmanager
    def around(self, what: str, then: str) -> Iterator[None]:
        """Ends the block at its first error. Threads that were begun in it, and their errors, belong to ``what``.

        Args:
            what: a name, e.g. "TensorBoard".
            then: what comes of it, without a full stop, e.g. "the run goes on, and its curves have gaps".
        """
        block = _Block(set(threading.enumerate()), lambda error: self.note(what, then, error))
        threading.excepthook = _on_thread_error
        _BLOCKS.append(block)
        try:
            yield
        # SystemExit: how libraries that expect to be the program leave, rich at a broken pipe for one.
        except (Exception, SystemExit) as error:
            block.note(error)
        finally:
            _OWNERS.update(dict.fromkeys(set(threading.enumerate()) - block.before, block))
            _BLOCKS.remove(block)


def steady_streams() -> None:
    """Lets stdout and stderr fail without an error: full, closed, of a terminal that is gone, without some characters.

    The first failure of one is told on the other. Each later text is tried again, since a disk may have room by then.
    They are replaced by streams of the same encoding, over the same descriptors. A descriptor that was closed is opened
    on nothing: else the next file or connection would get its number, and what is printed.
    """
    streams = {1: sys.stdout, 2: sys.stderr}
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            continue
        os.open(os.devnull, os.O_RDWR)  # gets the lowest number
    for descriptor, stream in streams.items():
        if stream is None:
            steady: TextIO = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and _number_of(stream) == descriptor:
            with contextlib.suppress(OSError):
                stream.flush()
            _REPLACED.append(stream)  # or it might close its descriptor when nobody has it
            steady = steady_text(descriptor, stream.encoding)
        else:
            continue
        if descriptor == 1:
            sys.stdout = steady
        else:
            sys.stderr = steady


_REPLACED: list[TextIO] = []


def steady_text(descriptor: int, encoding: str | None = None) -> io.TextIOWrapper:
    """Makes a stream of lines over ``descriptor`` like those of `steady_streams`, and leaves it open at its own end."""
    file = io.BufferedWriter(_SteadyFile(descriptor, "w", closefd=False))
    return io.TextIOWrapper(file, encoding=encoding, errors="backslashreplace", line_buffering=True)


class _SteadyFile(io.FileIO):
    """A descriptor to which everything can be written, whether it arrives or not."""

    _told = False

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
            if written is None:  # a terminal that does not block
                select.select([], [self], [], READER_SECONDS)
                written = super().write(data)
            if written is not None:
                return written
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except OSError as error:
            if not self._told:
                self._told = True
                name = {1: "stdout", 2: "stderr"}.get(self.fileno(), "the terminal")
                text = f"warning: {name} cannot be written ({error.strerror}); the run goes on.\n"
                with contextlib.suppress(OSError):  # it is maybe the same
                    os.write(1 if self.fileno() == 2 else 2, text.encode())
        return len(data)


@dataclass(eq=False, slots=True)
class _Block:
    """A block that runs under a guard."""

    before: set[threading.Thread]
    """Threads that existed before it."""
    note: Callable[[BaseException], None]


_BLOCKS: list[_Block] = []
"""The blocks that run now."""
_OWNERS: weakref.WeakKeyDictionary[threading.Thread, _Block] = weakref.WeakKeyDictionary()
"""The block in which each living thread was begun."""


def _on_thread_error(args: threading.ExceptHookArgs) -> None:
    thread = args.thread
    owner = _OWNERS.get(thread) if thread else None
    owner = owner or next((block for block in reversed(_BLOCKS) if thread not in block.before), None)
    if owner is None or args.exc_value is None:
        threading.__excepthook__(args)
    else:
        owner.note(args.exc_value)


def _number_of(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None
