"""Optimizer classes that are known not to work layer by layer, where a trial of the class could not say why."""

from __future__ import annotations

import torch

from grass_dist.errors import ConfigError

_LOW_RANK = "it projects gradients by objects in its state, which can neither move nor be saved layer by layer"
_IN_BACKWARD = "it updates parameters in hooks of the backward, before gradients are measured"
_XLA = "it is made for XLA, on which GRASS does not run"
_ADAMW = "AdamW (optim='adamw_torch'), which has states of the active layers alone"
_ADAMW_8BIT = "AdamW of bitsandbytes with optim_bits=8 (optim='adamw_8bit')"

_PACKAGES = {
    "apollo_torch": (_LOW_RANK, {}, _ADAMW),
    "galore_torch": (_LOW_RANK, {"AdamW8bit": _ADAMW_8BIT, "Adafactor": "Adafactor (optim='adafactor')"}, _ADAMW),
    "lomo_optim": (_IN_BACKWARD, {}, "AdamW with offload.update_in_backward, or Adafactor (optim='adafactor')"),
    "torch_xla": (_XLA, {}, "AdamW"),
}
"""By the package, whose classes may have the names of torch's: the problem, and the nearest class that works."""


def check_class(optimizer_class: type[torch.optim.Optimizer]) -> None:
    """
    Raises:
        ConfigError: the class is known not to work, with the nearest one that does.
    """
    name, package = optimizer_class.__name__, optimizer_class.__module__.partition(".")[0]
    if name == "LayerWiseDummyOptimizer":  # what transformers gives a Trainer whose hooks update the parameters
        raise ConfigError("optimizer_class", name, _IN_BACKWARD, "use AdamW (optim='adamw_torch')")
    if package in _PACKAGES:
        problem, nearest, other = _PACKAGES[package]
        raise ConfigError("optimizer_class", f"{package}.{name}", problem, f"use {nearest.get(name, other)}")


def refusal(optimizer_class: type, problem: str) -> ConfigError:
    """What is raised for a class of which a trial has shown that it does not work."""
    fix = "use a class that updates each parameter from its own gradient and state, such as AdamW"
    return ConfigError("optimizer_class", optimizer_class.__name__, problem, fix)
