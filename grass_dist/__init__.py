"""Full-weight fine-tuning at the memory of LoRA: GRASS layer sampling over FSDP2, HSDP, DDP and one process."""

from grass_dist.api import GrassOptimizer
from grass_dist.config import GrassConfig
from grass_dist.errors import ConfigError, GrassError, RanksDisagree, UnsupportedModel
from grass_dist.events import Refreshed, Sampled
from grass_dist.samplers import RoundGenerator, register_sampler

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "GrassConfig",
    "GrassError",
    "GrassOptimizer",
    "RanksDisagree",
    "Refreshed",
    "RoundGenerator",
    "Sampled",
    "UnsupportedModel",
    "register_sampler",
]
