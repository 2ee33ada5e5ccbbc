"""The optimizer class that ``train.optimizer`` names, with its arguments from `TrainConfig`."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from grass_dist.backends.muon import MuonAdamW
from grass_dist.errors import ConfigError
from grass_dist.finetune.config import TrainConfig


def optimizer_of(train: TrainConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class and its arguments, except the weight decay, which depends on the parameter group.

    Raises:
        ConfigError: the package of the class is not installed.
    """
    given, lr = train.optimizer, {"lr": train.learning_rate}
    own = {k: v for k in ("momentum", "nesterov", "ns_steps") if (v := getattr(given, k)) is not None}
    both = {"betas": train.betas, "eps": train.eps}
    if given.name == "adamw":
        return torch.optim.AdamW, lr | both
    if given.name == "adamw-8bit":
        return _bitsandbytes(given.name, "AdamW"), lr | both | {"optim_bits": 8}
    if given.name in ("lion", "lion-8bit"):
        bits = 8 if given.name == "lion-8bit" else 32
        return _bitsandbytes(given.name, "Lion"), lr | {"betas": train.betas, "optim_bits": bits}
    if given.name == "adafactor":
        return torch.optim.Adafactor, lr
    if given.name == "sgd":
        return torch.optim.SGD, lr | own
    return MuonAdamW, lr | both | own


def _bitsandbytes(name: str, kind: str) -> type[torch.optim.Optimizer]:
    try:
        module = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        fix = "install it (pip install bitsandbytes), or use adamw"
        raise ConfigError("train.optimizer.name", name, "bitsandbytes is not installed", fix) from error
    return getattr(module, kind)
