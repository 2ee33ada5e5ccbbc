"""One optimizer parameter group for each (layer, group of the user's)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from grass_dist.backends.zero.private import SECONDARY
from grass_dist.model.discovery import Unit
from grass_dist.model.groups import hyperparameters
from grass_dist.states.unit_optimizer import step_over

ALIGNED = 2
"""ZeRO-1 and 2 pad a rank's partition to a multiple of so many elements."""


@dataclass(frozen=True, slots=True)
class Group:
    """The parameters of ``unit`` that one of the user's groups holds; they get a flat buffer of their own."""

    unit: Unit
    slot: int  # number of the group within its unit
    user_group: int  # index among the user's parameter groups
    params: tuple[nn.Parameter, ...] = field(repr=False)

    @property
    def key(self) -> tuple[str, int]:
        return self.unit.name, self.slot


def groups_of(units: Iterable[Unit], user_groups: Sequence[Mapping[str, Any]]) -> list[Group]:
    """The groups of ``units``, in their order and within a unit in that of the user's groups."""
    index_of = {id(p): i for i, group in enumerate(user_groups) for p in group["params"]}
    found = []
    for unit in units:
        by_index: dict[int, list[nn.Parameter]] = {}
        for _, param in unit.params:
            by_index.setdefault(index_of[id(param)], []).append(param)
        found += [Group(unit, slot, i, tuple(by_index[i])) for slot, i in enumerate(sorted(by_index))]
    return found


Around = Callable[[Sequence[torch.Tensor]], AbstractContextManager[None]]


class GroupsOptimizer(torch.optim.Optimizer):
    """Has the user's optimizer step over other parameter groups than its own.

    DeepSpeed puts its flat partitions into the groups of the optimizer that it is given. The user's optimizer keeps
    its groups, which schedulers hold on to, and gets those of the interval for the length of a step. So any class
    works, whatever its constructor takes.

    Args:
        user: the user's optimizer, without state.
        groups: what trains in the interval.
        around: entered for each step with the flat partitions that it updates.
    """

    def __init__(self, user: torch.optim.Optimizer, groups: Sequence[Group], around: Around) -> None:
        self._user, self._around = user, around
        self._of_user = [group.user_group for group in groups]
        own = [{**hyperparameters(user.param_groups[g.user_group]), "params": list(g.params)} for g in groups]
        super().__init__(own, user.defaults)

    def follow_user(self) -> None:
        """Takes over learning rates and other hyperparameters from the user's groups as they are now."""
        for group, index in zip(self.param_groups, self._of_user, strict=True):
            group.update(hyperparameters(self._user.param_groups[index]))

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """DeepSpeed calls it once for each group, after it has set the gradient of that group's master."""
        with self._around([param for group in self.param_groups for param in group["params"]]):
            step_over(self._user, self.param_groups, self.state)

    def step_nothing(self) -> None:
        """Makes the step that schedulers see; see `step_over`."""
        step_over(self._user, [], {})


def zero_shard(param: nn.Parameter) -> torch.Tensor:
    """This rank's flat shard of a ZeRO-3 parameter, with its padding."""
    return param.ds_tensor  # type: ignore[attr-defined]


def shard_changed(param: nn.Parameter) -> None:
    """Says that a ZeRO-3 shard was written to, on all ranks: a copy of the weights beside it (hpZ) is old."""
    if getattr(param, SECONDARY, None) is not None:
        setattr(param, SECONDARY, None)


@torch.no_grad()
def set_weight(param: nn.Parameter, value: torch.Tensor) -> None:
    """Sets a whole parameter on all ranks, which call it together at ZeRO-3; the first rank's value counts there."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([param], modifier_rank=0, enabled=hasattr(param, "ds_id")):
        if param.numel():
            param.copy_(value.to(param.dtype))


def weights_on_host(arguments: Mapping[str, Any]) -> bool:
    """Says whether ZeRO-3 keeps its shards of the weights in host memory, by the arguments of its optimizer."""
    device = getattr(arguments.get("offload_param_config"), "device", None)
    return str(getattr(device, "value", device)) == "cpu"


def dtype_of_masters(arguments: Mapping[str, Any]) -> torch.dtype:
    """The dtype of masters, moments and gradients, by the arguments of a ZeRO optimizer (``bf16_optimizer_states``)."""
    return torch.bfloat16 if arguments.get("bf16_master_weights_and_gradients") else torch.float32


def numel_of(param: nn.Parameter) -> int:
    """The number of elements of the whole parameter, which ZeRO-3 leaves empty."""
    return getattr(param, "ds_numel", param.numel())


def capacity(group: Group, world_size: int) -> int:
    """The most elements that a rank's partition of ``group`` may have: stages and releases pad in different ways."""
    numel = sum(numel_of(param) for param in group.params)
    return -(-numel // world_size) + 8 * len(group.params) + 64


def partition_numel(order: Sequence[nn.Parameter], world_size: int) -> int:
    """The number of elements, with padding, that DeepSpeed will give a rank's partition of these parameters."""
    if hasattr(order[0], "ds_tensor"):
        return sum(zero_shard(param).numel() for param in order)
    numel = sum(numel_of(param) for param in order)
    return ALIGNED * -(-numel // (ALIGNED * world_size))


@dataclass(frozen=True, slots=True)
class Extent:
    """The entries of a parameter that a partition holds; ``length`` may be 0."""

    name: str
    numel: int
    start: int
    length: int
    at: int
    """The positions at which they begin in the partition."""


def extents(order: Sequence[nn.Parameter], rank: int, partition: int) -> Iterator[Extent]:
    """Does what `extents_of` does, for parameters in the order of their partition; the extents have no names."""
    shards = [zero_shard(p).numel() for p in order] if order and hasattr(order[0], "ds_tensor") else None
    return extents_of([("", numel_of(p)) for p in order], rank, partition, shards)


def extents_of(
    sizes: Sequence[tuple[str, int]], rank: int, partition: int, shards: Sequence[int] | None
) -> Iterator[Extent]:
    """Yields what the partition of ``rank`` holds of each parameter of a group.

    Stages 1 and 2 cut the group, its parameters one after the other, into equal partitions; stage 3 cuts each
    parameter, and a partition is a rank's shards one after the other.

    Args:
        sizes: name and elements of each parameter.
        partition: elements of a partition, with padding.
        shards: stage 3: elements of a shard of each parameter, with padding.
    """
    if shards is not None:
        at = 0
        for (name, numel), shard in zip(sizes, shards, strict=True):
            start = min(rank * shard, numel)
            yield Extent(name, numel, start, min(shard, numel - start), at)
            at += shard
        return
    begin, offset = rank * partition, 0
    for name, numel in sizes:
        low, high = max(begin, offset), min(begin + partition, offset + numel)
        length = max(0, high - low)
        yield Extent(name, numel, (low - offset) if length else 0, length, (low - begin) if length else 0)
        offset += numel
