"""The state of all groups as DeepSpeed's checkpoint code writes and reads it: in a fixed order, whatever trains now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from grass_dist.backends.zero.groups import Group, shard_changed, zero_shard
from grass_dist.backends.zero.private import Names
from grass_dist.backends.zero.states import MASTER, GroupState, ZeroStates
from grass_dist.errors import GrassError

GROUPS_KEY, SIZES_KEY, CHANGED_KEY, GRASS_KEY = "grass_groups", "grass_sizes", "grass_changed", "grass"
UPDATED_KEY, UPDATED_PARAMS_KEY, TOTAL_KEY = "grass_updated", "grass_updated_params", "measured by all"
"""What we add to DeepSpeed's ZeRO state: names of the groups in order, elements of this rank's partitions with their
padding, whether each differs from what its weights say, the state of the method on this rank, and whether each has
been updated: the others have zeros for moments, for DeepSpeed's tools. A universal checkpoint that was converted from
another form has the names of the updated parameters instead of groups. Within the state of the method, what all ranks
have measured since the last refresh: a universal checkpoint keeps the state of one rank alone."""


def whole_state(
    state: Mapping[str, Any],
    names: Names,
    order: Sequence[GroupState],
    still: Sequence[GroupState],
    user_groups: Sequence[Mapping[str, Any]],
    grass: Mapping[str, Any],
) -> dict[str, Any]:
    """The ZeRO state of all groups.

    Args:
        state: the stock state_dict of what trains now; gives the entries that are no group's.
        order: the states of all groups, in the order of the checkpoint.
        still: those of groups that never train, which come after the others.
        grass: the state of the method.
    """
    every = [*order, *still]
    lists = {key: [own.lists[key] for own in every] for key in order[0].lists}
    lists[names.masters_key] = [_master(own) for own in every]
    base = {
        "state": {i: _moments(own) if own.state else _zeros(own, order) for i, own in enumerate(every)},
        "param_groups": [
            {**settings_in(user_groups[own.group.user_group]), "params": [i]} for i, own in enumerate(every)
        ],
    }
    ours = {
        GROUPS_KEY: [own.group.key for own in order],
        SIZES_KEY: [own.numel for own in order],
        CHANGED_KEY: [own.changed for own in order],
        UPDATED_KEY: [bool(own.state) for own in order],
        GRASS_KEY: grass,
    }
    return {**state, **lists, names.optimizer_key: base, **ours}


def take_over(
    saved: Mapping[str, Any],
    names: Names,
    every: Sequence[Group],
    states: ZeroStates,
    user_groups: Sequence[dict[str, Any]],
) -> None:
    """Puts what `whole_state` returned where states are kept, hyperparameters into the user's groups, and ZeRO-3's
    weights into their shards.

    Raises:
        GrassError: the saved state is of other layers or parameter groups; nothing has changed then.
    """
    keys, theirs = [group.key for group in every], [tuple(key) for key in saved[GROUPS_KEY]]
    if theirs != keys:
        odd = next((pair for pair in zip(theirs, keys, strict=False) if pair[0] != pair[1]), (theirs[-1], keys[-1]))
        raise GrassError(
            f"The checkpoint holds {len(theirs)} parameter groups and this run has {len(keys)}: {odd[0]} stands "
            f"where {odd[1]} is expected; load it with the model, parameter groups and grass.always_active of that run."
        )
    groups = len(saved[names.masters_key])  # with those that never train, at the end
    ours = (GROUPS_KEY, SIZES_KEY, CHANGED_KEY, UPDATED_KEY)
    lists = {k: v for k, v in saved.items() if isinstance(v, list) and len(v) == groups and k not in ours}
    masters, base = lists.pop(names.masters_key), saved[names.optimizer_key]
    moments = base["state"]
    sizes = saved.get(SIZES_KEY, [master.numel() for master in masters])
    changed = saved.get(CHANGED_KEY, [bool(moments.get(i)) for i in range(len(keys))])
    updated = saved.get(UPDATED_KEY, [True] * len(keys))
    states.forget()
    states.replace({k: (sizes[i], masters[i], moments.get(i, {}) if updated[i] else {}) for i, k in enumerate(keys)})
    for i, group in enumerate(every):
        own = states.of[group.key]
        own.lists, own.saved, own.noted = {k: v[i] for k, v in lists.items()}, masters[i].numel(), True
        own.changed = changed[i]
        _fill_shards(group, masters[i])
        user_groups[group.user_group].update(settings_in(base["param_groups"][i]))


def settings_in(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a parameter group."""
    return {k: v for k, v in group.items() if k != "params"}


def _master(own: GroupState) -> torch.Tensor:
    if (master := own.current_master) is not None:
        return _saved(own, master[: own.saved])
    # The weights are their own masters, or never train. The latter are widened for the file, in host memory.
    shards = [zero_shard(param).detach().reshape(-1) for param in own.group.params]
    return torch.cat([s if s.dtype == own.dtype else s.cpu().to(own.dtype) for s in shards])


def _moments(own: GroupState) -> dict[str, Any]:
    return {key: _saved(own, value, own.dtypes.get(key)) for key, value in own.state.items()}


def _zeros(own: GroupState, order: Sequence[GroupState]) -> dict[str, Any]:
    """Moments of a group that was never updated, which DeepSpeed's ``ds_to_universal`` asks for; a few bytes in a file.

    Step counts are those of some group that has them, at 0.
    """
    counts = next((other.state for other in order if other.state), {})
    moments = {k: torch.zeros((), dtype=dtype).expand(own.numel) for k, dtype in own.dtypes.items() if k != MASTER}
    return moments | {k: v * 0 for k, v in counts.items() if torch.is_tensor(v) and v.numel() == 1 and k not in moments}


def _saved(own: GroupState, value: Any, dtype: torch.dtype | None = None) -> Any:
    """A tensor as a file should hold it: in host memory that holds nothing but this layer's state, and not rounded."""
    if torch.is_tensor(value) and dtype not in (None, value.dtype):
        return value.to(dtype)
    if own.resident and own.homes and torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    return value


@torch.no_grad()
def _fill_shards(group: Group, master: torch.Tensor) -> None:
    start = 0
    for param in group.params:
        if hasattr(param, "ds_tensor"):
            shard = zero_shard(param)
            shard.copy_(master[start : start + shard.numel()].view_as(shard))
            start += shard.numel()
            shard_changed(param)


@contextmanager
def trainable(params: Sequence[nn.Parameter]) -> Iterator[None]:
    """While it lasts, all ``params`` have ``requires_grad``."""
    flags = [p.requires_grad for p in params]
    for p in params:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, flag in zip(params, flags, strict=True):
            p.requires_grad_(flag)
