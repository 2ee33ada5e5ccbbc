"""Full-weight fine-tuning at the memory of LoRA: GRASS layer sampling over DeepSpeed ZeRO, FSDP2, HSDP and DDP."""

from grass_dist.checkpoint.api import AsyncCheckpointer, load_checkpoint, save_checkpoint
from grass_dist.config import GrassConfig, OffloadConfig
from grass_dist.deepspeed import initialize
from grass_dist.errors import CheckpointError, ConfigError, GrassError, RanksDisagree, UnsupportedModel
from grass_dist.events import Observer, Refreshed, Sampled
from grass_dist.huggingface import disable, enable
from grass_dist.method.controller import GrassController as GrassController
from grass_dist.method.samplers import RoundGenerator, register_sampler
from grass_dist.model.discovery import find_layers
from grass_dist.optimizer import GrassOptimizer
from grass_dist.version import __version__ as __version__

__all__ = [
    "AsyncCheckpointer",
    "CheckpointError",
    "ConfigError",
    "GrassConfig",
    "GrassController",
    "GrassError",
    "GrassOptimizer",
    "Observer",
    "OffloadConfig",
    "RanksDisagree",
    "Refreshed",
    "RoundGenerator",
    "Sampled",
    "UnsupportedModel",
    "disable",
    "enable",
    "find_layers",
    "initialize",
    "load_checkpoint",
    "register_sampler",
    "save_checkpoint",
]


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
