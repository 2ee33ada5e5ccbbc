"""Decides where the states of a ZeRO optimizer's groups are, and makes them, before it is constructed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from grass_dist.backends.zero.backend import ZeroSharding
from grass_dist.backends.zero.groups import Group
from grass_dist.backends.zero.states import GroupState, ZeroStates, capacity
from grass_dist.config import GrassConfig
from grass_dist.errors import GrassError
from grass_dist.model.discovery import Unit
from grass_dist.model.groups import hyperparameters
from grass_dist.states.fields import Counts, Kept, Step, counts_for, kept_for
from grass_dist.states.layer_state import LayerState
from grass_dist.states.placement import place
from grass_dist.states.unit_optimizer import step_over
from grass_dist.states.update_rule import ELEMENTWISE


def place_states(
    user: torch.optim.Optimizer,
    every: Sequence[Group],
    still: Sequence[Group],
    sharding: ZeroSharding,
    stage: int,
    config: GrassConfig,
    layers: Sequence[Unit],
    roles: Sequence[Unit],
    *,
    on_host: bool = False,
    dtype: torch.dtype = torch.float32,
) -> ZeroStates:
    """Chooses the mode and takes the memory for it; on all ranks alike.

    Args:
        user: the user's optimizer.
        every: all groups that ever train.
        still: what never trains, and has a state in a checkpoint only.
        on_host: whether ZeRO-3 keeps its shards of the weights in host memory (``offload_param``).
        dtype: of masters, and in which the user's optimizer makes moments.

    Raises:
        ConfigError, GrassError: the states cannot be where the configuration wants them.
    """
    device = layers[0].params[0][1].device
    own_masters = stage == 3 and (device.type == "cpu" or not on_host)  # weights of `dtype` are then
    world_size, like = sharding.ranks.world_size, torch.empty(1, dtype=dtype, device=device)
    first = {group.user_group: group for group in reversed([*every, *still])}  # of each of the user's groups
    counts = {index: _counts(user, group, world_size, like) for index, group in first.items()}
    fallback: str | None = None
    kept: dict[int, Kept] = {}
    try:
        kept = {index: _kept(user, group, world_size, like) for index, group in first.items()}
    except GrassError as error:
        fallback = str(error)

    def state_of(group: Group) -> GroupState:
        in_place = own_masters and group.params[0].dtype == dtype
        own, of = kept.get(group.user_group, []), counts[group.user_group]
        return GroupState(group, own, of, world_size, has_master=not in_place, dtype=dtype)

    made: dict[str, list[GroupState]] = {unit.name: [] for unit in (*layers, *roles)}
    for group in every:
        made[group.unit.name].append(state_of(group))
    moving, staying = ([LayerState(unit.name, made[unit.name]) for unit in units] for units in (layers, roles))
    mode = place(
        moving,
        config,
        sharding.ranks,
        device,
        resident=sum(state.layout.device_bytes for state in staying),
        fallback=fallback,
        last_first=False,
        inline=True,
    )
    return ZeroStates(moving, staying, mode, device, [state_of(group) for group in still])


def _kept(user: torch.optim.Optimizer, group: Group, world_size: int, like: torch.Tensor) -> Kept:
    """What the user's optimizer keeps for a flat partition of the device and dtype of ``like``.

    Raises:
        GrassError: it does not say, or keeps it in another shape.
    """
    name, (step, own, like, elementwise) = type(user).__name__, _stand_in(user, group, world_size, like)
    try:
        kept = kept_for(step, own, like, elementwise=elementwise)
    except Exception as error:
        raise GrassError(f"{name} does not say what it keeps: {error}") from error
    if odd := [key for key, shape, _ in kept if shape != like.shape]:
        raise GrassError(f"{name} keeps {odd[0]} in another shape than a partition's")
    return kept


def _counts(user: torch.optim.Optimizer, group: Group, world_size: int, like: torch.Tensor) -> Counts:
    step, own, like, elementwise = _stand_in(user, group, world_size, like)
    return counts_for(step, own, like, elementwise=elementwise)


def _stand_in(
    user: torch.optim.Optimizer, group: Group, world_size: int, like: torch.Tensor
) -> tuple[Step, dict[str, Any], torch.Tensor, bool]:
    """What `kept_for` and `counts_for` take to ask the user's optimizer about a flat partition."""

    def step(groups: list[dict[str, Any]]) -> Mapping[Any, Mapping[str, Any]]:
        state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        step_over(user, groups, state)
        return state

    whole = like.expand(capacity(group, world_size))
    return step, hyperparameters(user.param_groups[group.user_group]), whole, type(user) in ELEMENTWISE
