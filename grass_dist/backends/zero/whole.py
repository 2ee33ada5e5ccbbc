"""A ZeRO optimizer's state as a checkpoint needs it: of all groups, in a fixed order, whatever trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grass_dist.backends.zero.groups import Group, zero_shard
from grass_dist.backends.zero.states import MASTER, GroupState
from grass_dist.errors import GrassError

if TYPE_CHECKING:
    from grass_dist.backends.zero.narrow import NarrowZero

GROUPS_KEY, SIZES_KEY, CHANGED_KEY, GRASS_KEY = "grass_groups", "grass_sizes", "grass_changed", "grass"
UPDATED_KEY = "grass_updated"
"""What we add to DeepSpeed's ZeRO state: names of the groups in order, elements of this rank's partitions with their
padding, whether each differs from what its weights say, the state of the method on this rank, and whether each has
been updated: the others have zeros for moments, for DeepSpeed's tools."""


@contextmanager
def whole(zero: NarrowZero) -> Iterator[None]:
    """For DeepSpeed's checkpoint code: every group is in its place, and trainable if it ever trains.

    The state is of all groups.
    """
    narrow = {name: getattr(zero, name) for name in zero.names.shapes}
    every = {name: [zero.saved_order(group) for group in zero.every] for name in zero.names.shapes}
    still = {own.group.key for own in zero.states.still}
    with trainable([p for group in zero.every if group.key not in still for p in group.params]):
        zero.__dict__.update(every)
        zero.hidden = narrow
        try:
            yield
        finally:
            zero.hidden = None
            zero.__dict__.update(narrow)


@contextmanager
def narrow_again(zero: NarrowZero) -> Iterator[None]:
    """Within `whole`: for DeepSpeed's code over what trains."""
    shown = {name: getattr(zero, name) for name in zero.names.shapes}
    zero.__dict__.update(zero.hidden or {})
    try:
        yield
    finally:
        zero.__dict__.update(shown)


@contextmanager
def with_still(zero: NarrowZero) -> Iterator[None]:
    """While it lasts, what the user's optimizer has and never trains is groups like the others.

    Under ZeRO-3 DeepSpeed's tools find in a checkpoint what is in groups, and a full fine-tune that goes on from it
    asks for all that the optimizer has. Loading needs nothing of them: DeepSpeed saves frozen weights besides.
    """
    every, still = zero.every, zero.states.still
    zero.every = [*every, *(own.group for own in still)]
    zero.states.of.update({own.group.key: own for own in still})
    try:
        yield
    finally:
        zero.every = every
        for own in still:
            del zero.states.of[own.group.key]
            own.forget()


def complete(zero: NarrowZero) -> None:
    """Makes masters of the layers that were never drawn, one layer at a time, and takes them where states are kept."""
    current = list(zero.groups)
    known = {group.key for group in current} | {key for key, own in zero.states.of.items() if own.noted}
    missing = [group for group in zero.every if group.key not in known]
    for _, groups in groupby(missing, key=lambda group: group.unit.name):
        make(zero, [*current, *groups])
    if missing:
        resume(zero, current)
    zero.keep_lists()
    zero.states.settle()


def make(zero: NarrowZero, groups: Sequence[Group]) -> None:
    """Narrows to groups that may be frozen, and leaves them frozen."""
    with trainable([p for group in groups for p in group.params]):
        zero.narrow(groups)


def resume(zero: NarrowZero, groups: Sequence[Group]) -> None:
    """Goes back to what trained before."""
    if groups:
        zero.narrow(groups)
        zero.states.enter(zero.grass.active_layers)
    else:
        zero.rest(zero.stand_in)


def whole_state(zero: NarrowZero, state: dict[str, Any]) -> dict[str, Any]:
    """``state``, the stock state_dict of what trains, with every other group in its place."""
    names, order = zero.names, [zero.states.of[group.key] for group in zero.every]
    lists = {key: [own.lists[key] for own in order] for key in order[0].lists}
    lists[names.masters_key] = [_master(own) for own in order]
    user = zero.user_optimizer.param_groups
    base = {
        "state": {i: _moments(own) if own.state else _zeros(own, order) for i, own in enumerate(order)},
        "param_groups": [
            {**{k: v for k, v in user[g.user_group].items() if k != "params"}, "params": [i]}
            for i, g in enumerate(zero.every)
        ],
    }
    still = {own.group.key for own in zero.states.still}
    order = [own for own in order if own.group.key not in still]
    keys, sizes = [own.group.key for own in order], [own.numel for own in order]
    ours = {
        **{GROUPS_KEY: keys, SIZES_KEY: sizes, GRASS_KEY: zero.grass.state_dict()},
        CHANGED_KEY: [own.changed for own in order],
        UPDATED_KEY: [bool(own.state) for own in order],
    }
    return {**state, **lists, names.optimizer_key: base, **ours}


def _master(own: GroupState) -> torch.Tensor:
    if (master := own.current_master) is not None:
        return _saved(own, master[: own.saved])
    return torch.cat([zero_shard(param).detach().reshape(-1) for param in own.group.params])


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


def take_over(zero: NarrowZero, saved: Mapping[str, Any]) -> None:
    """Puts what `whole_state` gave where states are kept, and ZeRO-3's weights into their shards.

    Raises:
        GrassError: the state is of other layers or parameter groups.
    """
    keys = [group.key for group in zero.every]
    if [tuple(key) for key in saved[GROUPS_KEY]] != keys:
        theirs = [tuple(key) for key in saved[GROUPS_KEY]]
        odd = next((pair for pair in zip(theirs, keys, strict=False) if pair[0] != pair[1]), (theirs[-1], keys[-1]))
        raise GrassError(
            f"The checkpoint holds {len(theirs)} parameter groups and this run has {len(keys)}: {odd[0]} stands "
            f"where {odd[1]} is expected; load it with the model, parameter groups and grass.always_active of that run."
        )
    zero.loss_scaler, zero.dynamic_loss_scale = saved["loss_scaler"], saved["dynamic_loss_scale"]
    groups = len(saved[zero.names.masters_key])  # with those of `with_still`, at the end
    lists = {
        k: v
        for k, v in saved.items()
        if isinstance(v, list) and len(v) == groups and k not in (GROUPS_KEY, SIZES_KEY, CHANGED_KEY, UPDATED_KEY)
    }
    masters = lists.pop(zero.names.masters_key)
    states = saved[zero.names.optimizer_key]["state"]
    sizes = saved.get(SIZES_KEY, [master.numel() for master in masters])
    changed = saved.get(CHANGED_KEY, [bool(states.get(i)) for i in range(len(keys))])
    updated = saved.get(UPDATED_KEY, [True] * len(keys))
    zero.forget()
    zero.states.replace(
        {key: (sizes[i], masters[i], states.get(i, {}) if updated[i] else {}) for i, key in enumerate(keys)}
    )
    for i, group in enumerate(zero.every):
        own = zero.states.of[group.key]
        own.lists, own.saved, own.noted = {k: v[i] for k, v in lists.items()}, masters[i].numel(), True
        own.changed = changed[i]
        _fill_shards(group, masters[i])
    for mine, theirs in zip(zero.user_optimizer.param_groups, _user_groups(zero, saved), strict=True):
        mine.update(theirs)


def _user_groups(zero: NarrowZero, saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hyperparameters of the user's groups; a group of hers in which nothing trains keeps its own."""
    by_index = {group.user_group: i for i, group in enumerate(zero.every)}
    groups = saved[zero.names.optimizer_key]["param_groups"]
    return [
        {k: v for k, v in groups[by_index[u]].items() if k != "params"} if u in by_index else {}
        for u in range(len(zero.user_optimizer.param_groups))
    ]


@torch.no_grad()
def _fill_shards(group: Group, master: torch.Tensor) -> None:
    start = 0
    for param in group.params:
        if hasattr(param, "ds_tensor"):
            shard = zero_shard(param)
            shard.copy_(master[start : start + shard.numel()].view_as(shard))
            start += shard.numel()


@contextmanager
def trainable(params: Sequence[nn.Parameter]) -> Iterator[None]:
    flags = [p.requires_grad for p in params]
    for p in params:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, flag in zip(params, flags, strict=True):
            p.requires_grad_(flag)
