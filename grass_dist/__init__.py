"""Full-weight fine-tuning at the memory of LoRA: GRASS layer sampling over DeepSpeed ZeRO, FSDP2, HSDP and DDP.

A name is imported when it is first used, so that the ``grass-dist`` command, the planner and the doctor load no more
than they need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grass_dist.version import __version__ as __version__

if TYPE_CHECKING:
    from grass_dist.backends.muon import MuonAdamW
    from grass_dist.checkpoint.api import AsyncCheckpointer, load_checkpoint, save_checkpoint
    from grass_dist.config import GrassConfig, OffloadConfig
    from grass_dist.deepspeed import initialize
    from grass_dist.errors import CheckpointError, ConfigError, GrassError, RanksDisagree, StateError, UnsupportedModel
    from grass_dist.events import Observer, Refreshed, Sampled, Started
    from grass_dist.huggingface import disable, enable
    from grass_dist.huggingface.report import GrassReport
    from grass_dist.huggingface.sync import WeightSync
    from grass_dist.method.controller import GrassController
    from grass_dist.method.samplers import RoundGenerator, register_sampler
    from grass_dist.model.chunked_loss import chunk_loss
    from grass_dist.model.discovery import find_layers
    from grass_dist.optimizer import GrassOptimizer

__all__ = [
    "AsyncCheckpointer",
    "CheckpointError",
    "ConfigError",
    "GrassConfig",
    "GrassController",
    "GrassError",
    "GrassOptimizer",
    "GrassReport",
    "MuonAdamW",
    "Observer",
    "OffloadConfig",
    "RanksDisagree",
    "Refreshed",
    "RoundGenerator",
    "Sampled",
    "Started",
    "StateError",
    "UnsupportedModel",
    "WeightSync",
    "chunk_loss",
    "disable",
    "enable",
    "find_layers",
    "initialize",
    "load_checkpoint",
    "register_sampler",
    "save_checkpoint",
]

_MODULES = {
    "checkpoint.api": ("AsyncCheckpointer", "load_checkpoint", "save_checkpoint"),
    "config": ("GrassConfig", "OffloadConfig"),
    "deepspeed": ("initialize",),
    "errors": ("CheckpointError", "ConfigError", "GrassError", "RanksDisagree", "StateError", "UnsupportedModel"),
    "events": ("Observer", "Refreshed", "Sampled", "Started"),
    "huggingface": ("disable", "enable"),
    "huggingface.report": ("GrassReport",),
    "huggingface.sync": ("WeightSync",),
    "method.controller": ("GrassController",),
    "method.samplers": ("RoundGenerator", "register_sampler"),
    "model.chunked_loss": ("chunk_loss",),
    "model.discovery": ("find_layers",),
    "optimizer": ("GrassOptimizer",),
    "backends.muon": ("MuonAdamW",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"grass_dist.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
