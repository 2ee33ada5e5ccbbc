"""What trains and what must be equal on all ranks: what every front door works out first."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from grass_dist.config import GrassConfig, check_competing
from grass_dist.errors import UnsupportedModel
from grass_dist.model.discovery import LayerMap, Unit
from grass_dist.model.sharding import Sharding


class GradientHook:
    """A post-accumulate-grad hook of the method; calls ``method(name, slot, param)`` for as long as its object lives.

    Python's collector does not see hooks of tensors: what they referred to would live as long as the process, and the
    parameter with it.
    """

    def __init__(self, method: Callable[[str, int, nn.Parameter], None], name: str, slot: int) -> None:
        self._method, self._name, self._slot = weakref.WeakMethod(method), name, slot

    def __call__(self, param: torch.Tensor) -> None:
        if (call := self._method()) is not None:
            call(self._name, self._slot, cast(nn.Parameter, param))


def refuse_second(model: nn.Module) -> None:
    """
    Raises:
        UnsupportedModel: a parameter of the model has a `GradientHook`.
    """
    for param in model.parameters():
        if not param.requires_grad:
            continue
        handle = param.register_post_accumulate_grad_hook(_nothing)  # whose handle shows the other hooks
        others = handle.hooks_dict_ref() or {}
        handle.remove()
        if any(isinstance(hook, GradientHook) for hook in others.values()):
            raise UnsupportedModel(
                "The model has a GrassOptimizer already, whose hooks are in its parameters; detach that one "
                "(optimizer.detach(), or engine.destroy() under DeepSpeed), load a state into it, or build a new model."
            )


def _nothing(_: torch.Tensor) -> None:
    pass


def always_active_roles(found: LayerMap, config: GrassConfig) -> tuple[Unit, ...]:
    """The roles of a model that train at every step.

    Tied embeddings are one parameter, in the role embeddings: they train if either of their two roles is to.
    """
    wanted = set(config.always_active)
    if "lm_head" in wanted and "lm_head" not in {unit.name for unit in found.roles}:
        wanted.add("embeddings")
    return tuple(unit for unit in found.roles if unit.name in wanted)


def choose_units(
    model: nn.Module, found: LayerMap, config: GrassConfig, groups: Sequence[Mapping[str, Any]]
) -> tuple[tuple[Unit, ...], tuple[Unit, ...]]:
    """The layers that compete and the always-active roles, each with those of its parameters that the groups train.

    A layer of which the user has frozen or left out every parameter does not compete; the others keep their numbers.
    Every other parameter of the model is frozen for good.

    Raises:
        UnsupportedModel: no layer has a parameter to train.
        ConfigError: fewer layers compete than are to train at a time, or a fixed layer does not.
    """
    trained = {id(p) for g in groups for p in g["params"] if p.requires_grad}

    def narrowed(unit: Unit) -> Unit:
        return dataclasses.replace(unit, params=tuple((n, p) for n, p in unit.params if id(p) in trained))

    competing = [unit for unit in map(narrowed, found.layers) if unit.params]
    if not competing:
        raise UnsupportedModel(
            f"None of the {len(found.layers)} layers of {found.stack or 'the model'} has a parameter to train; leave "
            "requires_grad on for those that are to compete for sampling, and pass them to the optimizer."
        )
    check_competing(config, [unit.index for unit in competing if unit.index is not None], len(found.layers))
    layers = tuple(dataclasses.replace(unit, index=position) for position, unit in enumerate(competing))
    roles = tuple(unit for unit in map(narrowed, always_active_roles(found, config)) if unit.params)
    trains = {id(p) for unit in (*layers, *roles) for _, p in unit.params}
    for param in model.parameters():
        if id(param) not in trains:
            param.requires_grad_(False)
    return layers, roles


def frozen_layers(found: LayerMap, layers: Sequence[Unit]) -> str | None:
    """A sentence on the layers that do not compete, if there are any."""
    compete = {unit.name for unit in layers}
    if not (frozen := [unit.name for unit in found.layers if unit.name not in compete]):
        return None
    shown = ", ".join(frozen) if len(frozen) <= 8 else f"{frozen[0]}, {frozen[1]}, ... {frozen[-1]}"
    return (
        f"{len(frozen)} of {len(found.layers)} layers stay frozen, since none of their parameters has requires_grad "
        f"and is in the optimizer: {shown}; the other {len(layers)} compete."
    )


def check_one_device(units: Sequence[Unit], sharding: Sharding) -> None:
    """
    Raises:
        UnsupportedModel: what trains is on several devices of this rank.
    """
    on: dict[torch.device, str] = {}
    for unit in units:
        for name, param in unit.params:
            on.setdefault(sharding.shard_of(param).device, name)
    if len(on) > 1:
        shown = ", ".join(f"{name} on {device}" for device, name in on.items())
        raise UnsupportedModel(
            f"Parameters that train are on several devices ({shown}); grass_dist trains layers that are all on one "
            "device of each rank: load the model without device_map, and if it does not fit there, shard it by "
            "fully_shard or ZeRO-3."
        )


def fingerprint(
    config: GrassConfig,
    found: LayerMap,
    competing: Sequence[Unit],
    groups: Sequence[Mapping[str, Any]],
    optimizer_class: type,
    kwargs: Mapping[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """What must be equal on all ranks, by the names that an error shows; ``more`` is what one front door has."""
    layers = [(u.name, u.numel, len(u.params)) for u in (*found.layers, *found.roles)]
    return {
        **{f"grass.{name}": value for name, value in config.model_dump().items()},
        "model layers": layers,
        "layers that compete": [unit.name for unit in competing],
        "optimizer": (optimizer_class.__name__, sorted(kwargs.items(), key=repr)),
        "parameter groups": [len(group["params"]) for group in groups],
        "torch version": torch.__version__,
        **more,
    }
