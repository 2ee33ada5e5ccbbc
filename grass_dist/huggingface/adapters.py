"""Adapters under a Trainer: added or woken before it makes its optimizer, and what it saves of a `PeftModel`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grass_dist.config import GrassConfig
from grass_dist.errors import CheckpointError, ConfigError
from grass_dist.huggingface.switch import TRAINING, Switch
from grass_dist.model.adapters import adapter_parameters, add_adapters, begin_adapters, names_of_adapters, split_in
from grass_dist.ranks import say, together, world

BASE = "grass_base.safetensors"
"""The weights under the adapters of a `PeftModel`, in a checkpoint of Trainer, which saves adapters alone."""


def ready_adapters(trainer: Any) -> None:
    """Adds adapters to the model of a trainer, or unfreezes the weights under those that it has. On every rank.

    Raises:
        ConfigError: on every rank: the configuration does not fit the model, or what Trainer saves would lack weights.
    """
    config = config_of(trainer)
    if config is None or not config.trains_adapters or trainer.model_wrapped is not trainer.model:
        return
    model: nn.Module = trainer.model

    def begin() -> str | None:
        add_adapters(model, config)
        _check_saves(trainer)
        return begin_adapters(model, config)

    if told := together(world(), begin):
        say(world(), told)
    if saves_adapters_alone(model):
        say(
            world(),
            "save_model() of a PeftModel writes its adapters alone: trainer.model.merge_and_unload() gives the model "
            "with all that has trained, whose save_pretrained writes an ordinary folder.",
        )


def create_with_adapters(stock: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """`Trainer.create_optimizer`, with the adapters in a parameter group of their own."""
    made = stock(trainer, *args, **kwargs)
    config = config_of(trainer)
    if config is not None and trainer in TRAINING and isinstance(made, torch.optim.Optimizer):
        split_in(made, trainer.model, config)
    return made


def check_added(model: nn.Module, config: GrassConfig) -> None:
    """
    Raises:
        ConfigError: in a loop over Accelerate, the adapters have not been added.
    """
    if config.adapters is not None and not names_of_adapters(model):
        problem = "the model has no adapters, which come before the optimizer"
        fix = "call grass_dist.add_adapters(model, config) before you make the optimizer and prepare both"
        raise ConfigError("grass.adapters", config.adapters.model_dump(), problem, fix)


def config_of(trainer: Any) -> GrassConfig | None:
    """How a trainer is to train; None where nothing, or nothing that can be read, says it."""
    accelerator = trainer.accelerator
    if accelerator.distributed_type == "DEEPSPEED":
        block = accelerator.deepspeed_plugin.deepspeed_config.get("grass", ())
        if isinstance(block, Mapping):
            return GrassConfig(**{str(key): value for key, value in block.items()})
        if block is None or block is False:
            return None
    return Switch.config


def saves_adapters_alone(model: nn.Module) -> bool:
    """Whether Trainer saves of this model only what peft has added."""
    return hasattr(model, "merge_and_unload") and bool(names_of_adapters(model))


def save_base(trainer: Any, folder: Path) -> None:
    """Saves, beside the adapters that Trainer saves, what trains of the weights under them. Called on every rank."""
    if not _lacks_base(trainer) or not trainer.args.should_save:
        return
    from safetensors.torch import save_file

    weights = {name: p.detach().to("cpu", copy=True).contiguous() for name, p in _base(trainer.model)}
    save_file(weights, folder / BASE, metadata={"format": "pt"})


def load_base(trainer: Any, folder: Path | None) -> None:
    """Loads what `save_base` has saved, when Trainer has loaded the rest. Called on every rank.

    Raises:
        CheckpointError: on every rank: it is not there, or is of another model.
    """
    if folder is None or not _lacks_base(trainer):
        return

    def load() -> None:
        from safetensors.torch import load_file

        if not (folder / BASE).is_file():
            raise CheckpointError(
                f"{folder} holds adapters alone and no {BASE}, so the weights under them are not those that had "
                "trained: go on from a checkpoint that a run with adapters in always_active has saved."
            )
        saved, own = load_file(folder / BASE), dict(_base(trainer.model))
        if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in own.items()}:
            raise CheckpointError(f"{folder / BASE} is of another model.")
        with torch.no_grad():
            for name, param in own.items():
                param.copy_(saved[name])

    together(world(), load)


def _lacks_base(trainer: Any) -> bool:
    config = config_of(trainer)
    if config is None or not config.trains_adapters or not saves_adapters_alone(trainer.model):
        return False
    return trainer.accelerator.distributed_type not in ("DEEPSPEED", "FSDP")  # the engine saves all that trains


def _base(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    added = {id(p) for _, p in adapter_parameters(model)}
    return [(name, p) for name, p in model.named_parameters() if id(p) not in added]


def _check_saves(trainer: Any) -> None:
    """
    Raises:
        ConfigError: Accelerate saves the adapters alone, of weights that are sharded.
    """
    if not saves_adapters_alone(trainer.model) or trainer.accelerator.distributed_type != "FSDP":
        return
    if trainer.args.save_strategy != "no":
        raise ConfigError(
            "save_strategy",
            str(getattr(trainer.args.save_strategy, "value", trainer.args.save_strategy)),
            "under FSDP Trainer saves the adapters of a PeftModel alone, and the weights under them train too",
            "use save_strategy='no', or give the plain model and set grass.adapters",
        )
