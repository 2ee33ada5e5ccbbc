"""The parameter groups that a user passes, in each form that torch's optimizers take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.errors import ConfigError

ParamGroups = Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]] | Iterable[dict[str, Any]]

NOT_HYPERPARAMETERS = ("params", "param_names", "initial_lr")
"""Entries of a parameter group that an update does not need."""

_LARGEST_STAND_IN = 1 << 14


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a user's parameter group that an update needs."""
    return {k: v for k, v in group.items() if k not in NOT_HYPERPARAMETERS}


def full_groups(
    model: nn.Module,
    params: ParamGroups | None,
    optimizer_class: type[torch.optim.Optimizer],
    kwargs: Mapping[str, Any],
    split: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = list,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The user's groups with every hyperparameter filled in by the optimizer class, and its defaults.

    The class is made over small stand-ins with as many dimensions as the parameters, since some classes make their
    state when they are made, and some take matrices alone. Where parameters come with names, as from
    ``model.named_parameters()``, each group has them as its ``param_names``.

    Args:
        split: makes other groups of the user's.

    Raises:
        ConfigError: there is nothing to train, or something that is no parameter of the model.
        Exception: what the optimizer class raises for such groups or arguments.
    """
    groups = _listed(model, params)
    _refuse_strangers(model, groups)
    groups = split(groups)
    stand_ins = [{**g, "params": [_stand_in(p) for p in g["params"]]} for g in groups]
    template = optimizer_class([g for g in stand_ins if g["params"]], **kwargs)
    filled = iter(template.param_groups)
    full = [{**next(filled), "params": [_tensor(p) for p in g["params"]]} if g["params"] else g for g in groups]
    return full, dict(template.defaults)


def _listed(model: nn.Module, params: ParamGroups | None) -> list[dict[str, Any]]:
    """Groups whose ``params`` are lists: of parameters, or of pairs of name and parameter."""
    if torch.is_tensor(params) or not isinstance(params, Iterable | None):
        given = type(params).__name__
        raise ConfigError("params", given, "it is no list of parameters or groups", "pass model.parameters(), say")
    given = list(params) if params is not None else list(model.parameters())
    if not given:
        raise ConfigError("params", given, "there is no parameter to train", "pass the model's parameters")
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(given if isinstance(given[0], Mapping) else [{"params": given}]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), Iterable):
            problem = "it is no dict with the parameters of a group under 'params'"
            raise ConfigError(f"params[{index}]", type(group).__name__, problem, "pass a dict, or parameters alone")
        if isinstance(group["params"], set | frozenset):
            problem = "a set has no order, and the order of parameters has to be that of all ranks and runs"
            raise ConfigError(f"params[{index}]", "a set", problem, "pass a list")
        own = group["params"]
        groups.append({**group, "params": [own] if torch.is_tensor(own) else list(own)})
    return groups


def _tensor(entry: Any) -> Any:
    """The parameter of an entry of a group, which may be a pair of name and parameter."""
    return entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry


def _refuse_strangers(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """
    Raises:
        ConfigError: groups hold something that is no parameter of the model.
    """
    mine = {id(p) for p in model.parameters()}
    shown = []
    for index, group in enumerate(groups):
        for position, entry in enumerate(group["params"]):
            tensor = _tensor(entry)
            if not torch.is_tensor(tensor):
                problem = f"entry {position} is a {type(tensor).__name__} and no parameter"
                raise ConfigError(f"params[{index}]", shortly(tensor), problem, "pass parameters of the model")
            if id(tensor) not in mine:
                named = entry[0] if entry is not tensor else f"number {position} of group {index}"
                shown.append(f"{named} of shape {tuple(tensor.shape)}")
    if shown:
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        raise ConfigError(
            "params",
            ", ".join(shown[:3]) + more,
            "the model that GrassOptimizer was given has no such parameters, so nothing would train them",
            "pass the model that contains them, wrapped as it trains, or give them to another optimizer",
        )


def shortly(value: Any) -> str:
    """A value that a user passed, without the contents of a tensor."""
    return f"{type(value).__name__} of shape {tuple(value.shape)}" if torch.is_tensor(value) else repr(value)[:60]


def _stand_in(entry: Any) -> Any:
    """A parameter for the optimizer class to be made over: of the same shape, or a smaller one."""
    tensor = _tensor(entry)
    shape = tuple(tensor.shape)
    small = shape if math.prod(shape) <= _LARGEST_STAND_IN else tuple(min(size, 8) for size in shape)
    own = nn.Parameter(torch.zeros(small, device="cpu"))
    return own if entry is tensor else (entry[0], own)
