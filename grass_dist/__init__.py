"""Full-weight fine-tuning at the memory of LoRA: GRASS layer sampling over DeepSpeed ZeRO, FSDP2, HSDP and DDP."""

from grass_dist.api import GrassOptimizer
from grass_dist.checkpoint.api import load_checkpoint, save_checkpoint
from grass_dist.config import GrassConfig, OffloadConfig
from grass_dist.discovery import find_layers
from grass_dist.engine import GrassEngine as GrassController
from grass_dist.errors import CheckpointError, ConfigError, GrassError, RanksDisagree, UnsupportedModel
from grass_dist.events import Observer, Refreshed, Sampled
from grass_dist.samplers import RoundGenerator, register_sampler
from grass_dist.trainer import disable, enable
from grass_dist.version import __version__ as __version__
from grass_dist.zero.initialize import initialize

__all__ = [
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
