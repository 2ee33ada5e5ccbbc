"""The host's side: one flat buffer for each layer of this rank."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from grass_dist.errors import ConfigError, GrassError

PAGE = 4096


class Use(NamedTuple):
    """What host memory is for, and how to do without it: parts of a sentence."""

    what: str
    else_: str


OF_STATES = Use("a layer's state", "use grass.offload.folder, or grass.offload.mode='none'")


class LayerStateStore:
    """Host memory for the states of all layers, made at once and before training communicates.

    On a CUDA device it is pinned: registered as it is, since torch's pinned allocator rounds a size up to a power of
    two. With a ``folder`` each buffer is a memory-mapped file instead, which the operating system writes out as it
    needs to. The files are scratch: they have no name from the moment on that they are mapped, so they are gone with
    the process however that ends, and they are never flushed. A checkpoint reads the states, not the files.

    Each buffer has a storage of its own, so that a file that is saved of one layer holds that layer alone.

    Args:
        sizes: bytes of each layer.
        device: where the states come from.
        folder: for the host tier on disk; None is memory.
        use: what the memory is for, and the ways out where it cannot be had.

    Raises:
        ConfigError: the folder cannot hold the files.
        GrassError: the memory cannot be had.
    """

    def __init__(
        self, sizes: Sequence[int], device: torch.device, folder: str | None = None, use: Use = OF_STATES
    ) -> None:
        self.nbytes = sum(sizes)
        self._buffers: list[torch.Tensor] = []
        for layer, size in enumerate(sizes):
            if folder:
                self._buffers.append(_mapped(size, Path(folder), layer))
                continue
            self._buffers.append(_pages(size, use))
            if device.type == "cuda":
                pin(self._buffers[-1], device, use)
                weakref.finalize(self, unpin, self._buffers[-1], device).atexit = False

    def __getitem__(self, layer: int) -> torch.Tensor:
        """The buffer of ``layer``: uint8."""
        return self._buffers[layer]


def _pages(size: int, use: Use) -> torch.Tensor:
    """Memory that shares no page with another's, so that each can be registered."""
    try:
        raw = torch.empty(-(-size // PAGE) * PAGE + PAGE, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as error:
        raise GrassError(f"{size:,} bytes of host memory for {use.what} cannot be had: {error}") from None
    return raw[-raw.data_ptr() % PAGE :][:size]


def pin(memory: torch.Tensor, device: torch.device, use: Use = OF_STATES) -> None:
    """Registers host memory with CUDA until `unpin`, for copies from and to ``device``.

    Raises:
        GrassError: CUDA refuses, for example because a container may not lock so much memory.
    """
    if not memory.numel():
        return
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # registration while a collective runs can block it
        status = int(_cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if status != 0:
            _drain(device)
            raise GrassError(
                f"{memory.nbytes:,} bytes of host memory for {use.what} cannot be pinned (CUDA error {status}); allow "
                f"this process to lock that much, or {use.else_}."
            )


def unpin(memory: torch.Tensor, device: torch.device) -> None:
    """Releases what `pin` has registered, once no copy uses it."""
    if memory.numel():
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            if int(_cudart().cudaHostUnregister(memory.data_ptr())) != 0:
                _drain(device)


def _drain(device: torch.device) -> None:
    """Takes the error of a failed call away, which CUDA keeps, and which torch raises at the next launch of any kernel.

    That would be in the collective which tells the other ranks of it. A kernel is launched for a torch that has no
    binding of cudaGetLastError (it came with pull request 165990).
    """
    if (last := getattr(_cudart(), "cudaGetLastError", None)) is not None:
        last()
        return
    with suppress(RuntimeError):
        torch.zeros(1, device=device)


def _cudart() -> Any:
    return torch.cuda.cudart()


def _mapped(size: int, folder: Path, layer: int) -> torch.Tensor:
    path = folder / f"grass_states.{os.getpid()}.{layer}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(size, 1))  # a full disk shows now, not as a signal later
                memory = torch.from_file(str(path), shared=True, size=max(size, 1), dtype=torch.uint8)
            finally:
                path.unlink()
    except RuntimeError as error:  # torch's, of mmap
        raise ConfigError("offload.folder", str(folder), f"it cannot be mapped ({error})", "choose another") from None
    except OSError as error:
        fix = "free space for the states of all layers" if error.errno == errno.ENOSPC else "choose another folder"
        raise ConfigError("offload.folder", str(folder), f"{error.strerror}", fix) from None
    return memory[:size]
