"""GRASS is switched on in a process when it first calls what `enable` wraps, and nothing is done before.

`grass_dist.run` arms its own process, and ``sitecustomize.py`` beside this file arms each Python that the run starts.
Most of these never train. So arming imports the standard library alone: a finder in `sys.meta_path` puts a function
around `Trainer.train`, `Accelerator.prepare` and `deepspeed.initialize` when their modules are imported, and the first
call of one of them calls `enable`. By then all these modules are complete, which they are not within an import.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from typing import Any

VARIABLE = "GRASS_DIST_RUN"
"""Names the environment variable with the settings of a run: JSON of a `GrassConfig`, ``null`` without one. Where it is
empty, a process is left alone."""

FOLDER = os.path.dirname(os.path.abspath(__file__))
"""The folder of ``sitecustomize.py``, for PYTHONPATH."""

_DOORS = {
    "transformers.trainer": ("Trainer", "train"),
    "accelerate.accelerator": ("Accelerator", "prepare"),
    "deepspeed": (None, "initialize"),
}
_OPTIMIZERS, _CONTROLLER = "torch.optim.optimizer", "grass_dist.method.controller"

_NOT_USED = (
    "GRASS: an optimizer ({}) has taken a step here without GRASS, although grass_dist.run switched it on. It reaches "
    "Trainer.train, Accelerator.prepare and deepspeed.initialize, and none has been called. In a loop of your own, use "
    "GrassOptimizer."
)


def arm(settings: str | None) -> None:
    """Lets the first call of what `enable` wraps call `enable`. A second call replaces the settings.

    Args:
        settings: as in the variable; None if it is missing, which that first call raises as an error.
    """
    known = next((finder for finder in sys.meta_path if isinstance(finder, _Arming)), None)
    if known is not None:
        known.settings = settings
        return
    arming = _Arming(settings)
    sys.meta_path.insert(0, arming)
    for name in (*_DOORS, _OPTIMIZERS):
        if name in sys.modules:
            arming.imported(sys.modules[name])


def leader() -> bool:
    """Whether this process is the one of its job that speaks to the user, by the variables of the launchers."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


class _Arming:
    """A finder that finds nothing itself: it changes modules when another finder has found them and they are loaded."""

    def __init__(self, settings: str | None) -> None:
        self.settings = settings
        self._done = self._told = False
        self._armed: list[tuple[Any, str, Any, Any]] = []  # owner, name, stock, ours
        self._watched: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if self._done or (name not in _DOORS and name != _OPTIMIZERS):
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader, stock = spec.loader, spec.loader.exec_module

            def exec_module(module: Any) -> None:
                del loader.exec_module  # the loader is its own again
                stock(module)
                self.imported(module)

            loader.exec_module = exec_module
        return spec

    def imported(self, module: Any) -> None:
        if self._done:
            return
        if module.__name__ == _OPTIMIZERS:
            self._watched = module.register_optimizer_step_post_hook(self._stepped)
            return
        owner_name, name = _DOORS[module.__name__]
        owner = module if owner_name is None else getattr(module, owner_name)
        stock = getattr(owner, name)

        @functools.wraps(stock)
        def first(*args: Any, **kwargs: Any) -> Any:
            now = not self._done and self._switch_on()
            return (getattr(owner, name) if now else stock)(*args, **kwargs)

        setattr(owner, name, first)
        self._armed.append((owner, name, stock, first))

    def _switch_on(self) -> bool:
        """Calls `enable`, unless the script has done so itself; returns whether it did."""
        from grass_dist.config import GrassConfig
        from grass_dist.errors import ConfigError
        from grass_dist.huggingface import enable, is_enabled

        if self.settings is None:
            problem = "it is missing here, although PYTHONPATH has the folder by which grass_dist.run reaches processes"
            raise ConfigError(VARIABLE, None, problem, "start each rank by python -m grass_dist.run, or set it to ''")
        self._done = True
        for owner, name, stock, ours in self._armed:
            if getattr(owner, name) is ours:
                setattr(owner, name, stock)
        if self._watched is not None:
            self._watched.remove()
        settings = json.loads(self.settings)
        if is_enabled():
            if settings is not None and leader():
                print("GRASS: the script calls enable itself, so its settings count.", file=sys.stderr, flush=True)
            return False
        enable(None if settings is None else GrassConfig(**settings))
        return True

    def _stepped(self, optimizer: Any, *_: Any) -> None:
        """Tells, once, of an optimizer that steps without GRASS; it cannot remove itself within a step."""
        if not self._told and not self._done and _CONTROLLER not in sys.modules:
            self._told = True
            if leader():
                print(_NOT_USED.format(type(optimizer).__name__), file=sys.stderr, flush=True)
