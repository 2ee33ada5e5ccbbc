"""What `enable` was last told, and the public functions of other libraries that it has wrapped."""

from __future__ import annotations

import functools
import importlib.util
import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grass_dist.config import GrassConfig
from grass_dist.errors import ConfigError
from grass_dist.events import Observer

log = logging.getLogger("grass_dist")


class Switch:
    """What `enable` was last told."""

    on = False
    config: GrassConfig | None = None
    observers: Sequence[Observer] = ()
    report = False


_WRAPPED: dict[tuple[Any, str], Callable[..., Any]] = {}
"""Our functions, by the owner and the name of the attribute that each replaces."""

TRAINING: list[Any] = []  # in Trainer.train, the innermost last

RESUMED: dict[int, Path] = {}
"""The checkpoint that a trainer, by its `id`, goes on from while it is in Trainer.train."""

_UNDO: list[Callable[[], Any]] = []
"""How each model that trains by GRASS since `enable` is given back."""


def give_back_later(holder: Any, method: str) -> None:
    """Has `give_back_all` call this method of an optimizer or engine, if it is alive by then."""
    known = weakref.ref(holder)
    _UNDO.append(lambda: getattr(known(), method, lambda: None)())


def give_back_all() -> None:
    while _UNDO:
        _UNDO.pop()()


def module_if_usable(name: str) -> Any:
    """The module; None where it is not installed, or where nothing could use it either."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except Exception as error:  # deepspeed raises its own kinds, for example without a compiler
        log.warning("%s is installed but cannot be imported (%s), so GRASS is not enabled for it.", name, error)
        return None


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    if (owner, name) in _WRAPPED:
        return
    stock = getattr(owner, name)

    @functools.wraps(stock)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(stock, *args, **kwargs) if Switch.on else stock(*args, **kwargs)

    setattr(owner, name, wrapper)
    _WRAPPED[owner, name] = wrapper


def configured() -> GrassConfig:
    """The configuration that `enable` was given.

    Raises:
        ConfigError: it was given none.
    """
    if Switch.config is None:
        problem = 'nothing would train by GRASS, since no ds_config with a block "grass" was given either'
        fix = (
            "call enable(GrassConfig(active_layers=4)), or start the script by grass_dist.run --active-layers 4 (or "
            "--config FILE, or with GRASS_CONFIG set), or train with DeepSpeed and write "
            '"grass": {"active_layers": 4} into the ds_config'
        )
        raise ConfigError("enable(config)", None, problem, fix)
    return Switch.config


def compare_with_block(config: GrassConfig, written: GrassConfig) -> None:
    """
    Raises:
        ConfigError: `enable` and the ds_config do not say the same.
    """
    block = written.model_dump()
    for field, value in config.model_dump().items():
        if value != (there := block[field]):
            problem = f"enable() was given {value!r}, and under DeepSpeed the block in the ds_config rules"
            raise ConfigError(
                f"grass.{field}", there, problem, "write it there, or call enable() without a GrassConfig"
            )


def unwrap_all() -> None:
    for (owner, name), wrapper in list(_WRAPPED.items()):
        if getattr(owner, name) is wrapper:  # else another library has wrapped ours, which only passes on from now
            setattr(owner, name, wrapper.__wrapped__)  # type: ignore[attr-defined]
            del _WRAPPED[owner, name]
