"""The host's side: one flat buffer for each layer of this rank, cut out of one span of memory."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from grass_dist.errors import ConfigError, GrassError

PAGE = 4096


class LayerStateStore:
    """Host memory for the states of all layers, made at once and before training communicates.

    On a CUDA device it is pinned: registered as it is, since torch's pinned allocator rounds a size up to a power of
    two. With a ``folder`` it is a memory-mapped file instead, which the operating system writes out as it needs to.
    The file is scratch: it has no name from the moment on that it is mapped, so it is gone with the process however
    that ends, and it is never flushed. A checkpoint reads the states, not the file.

    Args:
        sizes: bytes of each layer.
        device: where the states come from.
        folder: for the host tier on disk; None is memory.

    Raises:
        ConfigError: the folder cannot hold the file.
        GrassError: the memory cannot be had.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device, folder: str | None = None) -> None:
        spans = [-(-size // PAGE) * PAGE for size in sizes]
        self.nbytes = sum(spans)
        try:
            self._memory = _mapped(self.nbytes, Path(folder)) if folder else torch.empty(self.nbytes, dtype=torch.uint8)
        except (RuntimeError, MemoryError) as error:
            raise GrassError(
                f"{self.nbytes:,} bytes of host memory for the layers' states cannot be had: {error}"
            ) from None
        if device.type == "cuda" and not folder:
            pin(self._memory)
            weakref.finalize(self, unpin, self._memory).atexit = False
        self._buffers = [part[:size] for part, size in zip(self._memory.split(spans), sizes, strict=True)]

    def __getitem__(self, layer: int) -> torch.Tensor:
        """The buffer of ``layer``: uint8."""
        return self._buffers[layer]


def pin(memory: torch.Tensor) -> None:
    """Registers host memory with CUDA until `unpin`.

    Raises:
        GrassError: CUDA refuses, for example because a container may not lock so much.
    """
    if not memory.numel():
        return
    torch.cuda.synchronize()  # registration while a collective runs can block it
    status = int(_cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if status != 0:
        raise GrassError(
            f"{memory.nbytes:,} bytes of host memory cannot be pinned (CUDA error {status}); allow this process to "
            "lock that much, or use grass.offload.folder, or grass.offload.mode='none'."
        )


def unpin(memory: torch.Tensor) -> None:
    """Lets go of what `pin` registered, once no copy uses it."""
    if memory.numel():
        torch.cuda.synchronize()
        _cudart().cudaHostUnregister(memory.data_ptr())


def _cudart() -> Any:
    return torch.cuda.cudart()


def _mapped(nbytes: int, folder: Path) -> torch.Tensor:
    path = folder / f"grass_states.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(nbytes, 1))  # a full disk shows now, not as a signal later
            except OSError:
                path.unlink()
                raise
        memory = torch.from_file(str(path), shared=True, size=max(nbytes, 1), dtype=torch.uint8)[:nbytes]
        path.unlink()
    except OSError as error:
        fix = f"free {nbytes:,} bytes there for each rank" if error.errno == errno.ENOSPC else "choose another folder"
        raise ConfigError("offload.folder", str(folder), f"{error.strerror}", fix) from None
    return memory
