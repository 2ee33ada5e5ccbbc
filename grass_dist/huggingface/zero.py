"""`deepspeed.initialize` while GRASS is enabled, which Accelerate looks up when it prepares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from grass_dist.backends.zero.ds_config import has_grass, load_ds_config
from grass_dist.backends.zero.private import RECOMPUTES_FROZEN, deepspeed_version
from grass_dist.config import GrassConfig
from grass_dist.deepspeed import config_of, initialize_with
from grass_dist.errors import ConfigError
from grass_dist.huggingface.arguments import is_reentrant
from grass_dist.huggingface.switch import Switch, compare_with_block, configured, give_back_later


def check_recomputation(trainer: Any) -> None:
    """Checks that this release of DeepSpeed can recompute the activations of frozen layers as the trainer is to.

    Raises:
        ConfigError: it cannot.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if accelerator.distributed_type != "DEEPSPEED" or not args.gradient_checkpointing:
        return
    from packaging.specifiers import SpecifierSet

    fits = SpecifierSet(RECOMPUTES_FROZEN).contains(version := deepspeed_version(), prereleases=True)
    plugin = accelerator.deepspeed_plugin
    if plugin.zero_stage == 3 and not is_reentrant(args) and not fits and trains_by_grass(plugin.deepspeed_config):
        problem = f"stage 3 of DeepSpeed {version} cannot recompute frozen layers without reentrance"
        fix = f'install DeepSpeed {RECOMPUTES_FROZEN}, or set gradient_checkpointing_kwargs={{"use_reentrant": True}}'
        raise ConfigError("gradient_checkpointing", True, problem, fix)


def trains_by_grass(ds_config: Mapping[str, Any]) -> bool:
    """Whether an engine of this ds_config is made one of GRASS, if it has an optimizer."""
    return has_grass(ds_config) or (Switch.config is not None and "grass" not in ds_config)


def initialize_engine(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(stock).bind(*args, **kwargs).arguments
    try:
        config = load_ds_config(config_of(given) or {})
        block = config["grass"] if has_grass(config) else None
        written = None if block is None else GrassConfig(**{str(key): value for key, value in block.items()})
    except ConfigError:
        return initialize_with(stock, args, kwargs, ())  # says so on all ranks
    section = config.get("optimizer")
    if given.get("optimizer") is None and not (isinstance(section, Mapping) and section.get("type")):
        return stock(*args, **kwargs)  # nothing is trained: a reference model, or an evaluation
    if (switch := config.get("grass", ())) is None or switch is False:
        if Switch.config is None:
            return stock(*args, **kwargs)
        problem = "enable() was given a GrassConfig, and the ds_config switches GRASS off"
        raise ConfigError("grass", switch, problem, "leave one of them out")
    if written is not None:
        if Switch.config is not None:
            compare_with_block(Switch.config, written)
        return _made(initialize_with(stock, args, kwargs, Switch.observers))
    added = {**config, "grass": configured().model_dump()}
    given = {name: value for name, value in given.items() if name != "config_params"}
    return _made(initialize_with(stock, (), {**given, "config": added}, Switch.observers))


def _made(parts: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
    give_back_later(parts[0], "destroy")
    return parts
