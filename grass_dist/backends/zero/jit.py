"""DeepSpeed compiles operators when they are first used. No such build may start without a word, or wait for ever."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STALE_SECONDS = 1800
"""A build that has written nothing for so many seconds was killed."""

_FUSED = {"adam": "fused_adam", "adamw": "fused_adam", "lion": "fused_lion"}


def accelerator() -> Any:
    """DeepSpeed's accelerator: the CPU, CUDA, or another device."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def on_cpu() -> bool:
    return accelerator().device_name() == "cpu"


def spare_the_compiler(ds_config: dict[str, Any]) -> list[str]:
    """Keeps DeepSpeed from builds that bring nothing, and tells of the others.

    Call it before `deepspeed.init_distributed`. On a CPU it turns the shared-memory collectives off, so that gloo
    communicates, and sets ``optimizer.params.torch_adam`` in ``ds_config`` itself.

    Returns:
        Sentences for the log.
    """
    said = [*_clear_stale_locks()]
    optimizer = ds_config.get("optimizer") or {}
    operator = _FUSED.get(str(optimizer.get("type", "")).lower())
    params = optimizer.get("params") or {}
    if on_cpu():
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if operator == "fused_adam" and "torch_adam" not in params:
            params = optimizer["params"] = {**params, "torch_adam": True}
            said.append(
                "optimizer.params.torch_adam is set to true: on a CPU DeepSpeed's own Adam would be compiled first."
            )
    if operator and not params.get("torch_adam") and not any(_extensions().rglob(f"{operator}/{operator}.so")):
        said.append(
            f"DeepSpeed may now compile its operator {operator} into {_extensions()}, once, which can take minutes; "
            "an optimizer of torch.optim needs none."
        )
    return said


def _extensions() -> Path:
    """The folder in which torch builds C++ extensions, as documented for ``TORCH_EXTENSIONS_DIR``."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _clear_stale_locks() -> Iterator[str]:
    """Removes the file ``lock`` that a killed build leaves, for which every later build would wait without end."""
    for lock in _extensions().glob("**/lock") if _extensions().is_dir() else ():
        newest = max((f.stat().st_mtime for f in lock.parent.iterdir()), default=0.0)
        idle = time.time() - newest
        if idle > STALE_SECONDS:
            lock.unlink(missing_ok=True)
            yield f"Removed {lock}: the build of {lock.parent.name} was killed {idle / 60:.0f} minutes ago."
        else:
            yield (
                f"Another process seems to build {lock.parent.name}, and DeepSpeed would wait for it; "
                f"if none does, delete {lock}."
            )
