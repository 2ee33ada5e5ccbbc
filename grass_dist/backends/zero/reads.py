"""Answers of `deepspeed.utils.safe_get_*` and `safe_set_*` for every layer at any time.

DeepSpeed's own answers cover what its optimizer trains now, from views that it takes when it is constructed. A layer
that rests has its master and moments in host memory, and the state of one that trains may still be on its way to the
device. So every question about a master or a moment is answered here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from grass_dist.backends.zero.groups import (
    Extent,
    Group,
    extents,
    numel_of,
    partition_numel,
    shard_changed,
    zero_shard,
)
from grass_dist.backends.zero.private import FRAGMENT, LINKED, MAPPING, OPTIMIZER, SECONDARY, check_linked
from grass_dist.backends.zero.states import GroupState, Made, ZeroStates
from grass_dist.errors import GrassError
from grass_dist.model.discovery import Unit

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Part:
    """This rank's entries of a parameter, in a flat partition."""

    param: nn.Parameter
    own: GroupState
    extent: Extent

    @property
    def name(self) -> str:
        return next(name for name, param in self.own.group.unit.params if param is self.param)


class Reads:
    """Masters, moments and gradients of single parameters, for a caller who asks between two steps.

    A read waits for the copies of the layer that it is about, and for no other. Whether there is a state to read is
    equal on all ranks, so all of them communicate or none does. Over the wire: for a full value one all-reduce of 4
    bytes an element; nothing for a local value, for one that is set, or where there is no state.

    Args:
        groups: all that ever train.
        states: those of all groups.
        order: returns the parameters of a group in the order in which its partition holds them.
        has_gradient: whether DeepSpeed has an averaged gradient of a group that trains.
        ranks: the data-parallel ranks.
        changed: told of a unit whose weights or masters are set.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        states: ZeroStates,
        order: Callable[[Group], Sequence[nn.Parameter]],
        has_gradient: Callable[[Group], bool],
        ranks: dist.ProcessGroup | None,
        changed: Callable[[Unit], None],
    ) -> None:
        self._states, self._order, self._has_gradient, self._ranks = states, order, has_gradient, ranks
        self._changed = changed
        self._rank, self._world_size = dist.get_rank(ranks), dist.get_world_size(ranks)
        self._group_of: dict[nn.Parameter, Group] = {p: g for g in groups for p in g.params}

    # --- what safe_get_* and safe_set_* ask

    def trains(self, param: nn.Parameter) -> bool:
        """Whether DeepSpeed's optimizer trains the parameter now, so that there is a gradient."""
        group = self._group_of.get(param)
        return group is not None and self._states.of[group.key].param is not None

    def full(self, param: nn.Parameter, optim_state_key: str | None = None) -> torch.Tensor | None:
        """Master (for the key None) or moment: fp32, of the parameter's whole shape, on its device; equal on all ranks.

        None for what never trains, and for a moment of a layer that has not been updated yet.

        Raises:
            GrassError: the optimizer keeps no such moment.
        """
        part = self._part(param)
        if part is None:
            return None
        if optim_state_key is None and not part.own.numel and not _sharded(param):
            return param.detach().float().clone()
        with self._states.at_hand(part.own):
            mine = self._entries(part, optim_state_key)
            if mine is None:
                return None
            whole = torch.zeros(numel_of(param), dtype=torch.float32, device=param.device)
            whole[part.extent.start :][: part.extent.length].copy_(mine[: part.extent.length])
        dist.all_reduce(whole, group=self._ranks)
        return whole.view(_shape_of(param))

    def local(self, param: nn.Parameter, key: str | None = None) -> torch.Tensor | None:
        """ZeRO-3: a copy of this rank's shard of master or moment; flat, with its padding."""
        return self._read(param, key, lambda mine: mine.to(param.device, torch.float32, copy=True))

    def device(self, param: nn.Parameter, key: str | None = None) -> torch.device | None:
        """ZeRO-3: the device that master or moment is on now."""
        return self._read(param, key, lambda mine: mine.device)

    @torch.no_grad()
    def set_full(self, param: nn.Parameter, value: torch.Tensor, optim_state_key: str | None = None) -> None:
        """Puts this rank's entries of ``value``, of the parameter's whole shape, where the layer trains from.

        A layer that trains gets its weights from the master at its next step, as in stock ZeRO. The weights of one
        that rests, which has no step soon, are set at once.

        Raises:
            GrassError: another number of elements, or a moment that there is not yet.
        """
        part = self._asked(param, value, numel_of(param), optim_state_key)
        if part is None:
            return
        flat, at = value.detach().reshape(-1), part.extent
        if optim_state_key is not None or part.own.numel or _sharded(param):
            self._write(part, flat[at.start : at.start + at.length], optim_state_key)
        if optim_state_key is None and part.own.param is None and param.numel() == flat.numel():
            param.data.copy_(flat.view(param.shape))  # replicated weights, or those that ZeRO-3 keeps gathered

    @torch.no_grad()
    def set_local(self, param: nn.Parameter, value: torch.Tensor, key: str | None = None) -> None:
        """ZeRO-3: sets this rank's shard of master or moment, with its padding, as `set_full` does.

        Raises:
            GrassError: as `set_full`; or the weights of a layer that rests are copied to a few ranks (hpZ), which do
                not know what one rank writes.
        """
        if key is None and not self.trains(param) and getattr(param, SECONDARY, None) is not None:
            raise GrassError(
                "safe_set_local_fp32_param cannot set a layer that rests while zero_hpz_partition_size is above 1: use "
                "safe_set_full_fp32_param, on all ranks."
            )
        part = self._asked(param, value, zero_shard(param).numel(), key)
        if part is not None:
            self._write(part, value.detach().reshape(-1), key)

    def refuse_gradient(self, param: nn.Parameter) -> None:
        """
        Raises:
            GrassError: the parameter has no gradient that could be set.
        """
        part = self._part(param)
        if part is not None and part.own.param is None:
            raise GrassError(
                f"The gradient of {part.name} cannot be set: the layer does not train in this step. "
                "Leave out the parameters whose safe_get_full_grad is None."
            )

    # --- ZeRO-1 and 2, whose parameters carry the methods that safe_* call

    def install(self, linked: nn.Parameter) -> None:
        """Binds our answers to all parameters, and so replaces those that DeepSpeed has bound to some of them.

        They refer to this object weakly. DeepSpeed's views of the masters that it has just made are dropped: they
        would hold that memory for the whole interval.

        Args:
            linked: a parameter that DeepSpeed trains now, and so has bound its own answers to.

        Raises:
            GrassError: this release of DeepSpeed binds others.
        """
        check_linked(linked)
        answers: weakref.ref[Reads] = weakref.ref(self)
        for param in self._group_of:
            mapping = getattr(param, MAPPING, None)
            setattr(param, MAPPING, mapping)
            if mapping is not None:
                setattr(mapping, FRAGMENT, None)
            for name, method in zip(LINKED, ("full", "set_full", "full_grad", "set_full_grad"), strict=True):
                setattr(param, name, partial(_answer, answers, method, param))

    def remove(self, params: Iterable[nn.Parameter]) -> None:
        """Takes all that leads to the optimizer off the parameters, which would keep it and its memory.

        Args:
            params: of the whole model: under ZeRO-3 DeepSpeed links those that never train, too.
        """
        for param in params:
            for name in vars(param).keys() & {*LINKED, MAPPING, OPTIMIZER}:
                delattr(param, name)

    def full_grad(self, param: nn.Parameter) -> torch.Tensor | None:
        """The averaged gradient of a parameter that trains; None for any other.

        Raises:
            ValueError: on all ranks, where DeepSpeed has none now. Stock ZeRO raises it on some of them.
        """
        from deepspeed.utils import get_full_hp_grad

        if not self.trains(param):
            return None
        if not self._has_gradient(self._group_of[param]):
            raise ValueError("Gradients are only available immediately after backward and before engine step")
        return get_full_hp_grad(param)

    def set_full_grad(self, param: nn.Parameter, value: torch.Tensor) -> None:
        from deepspeed.utils import set_full_hp_grad

        self.refuse_gradient(param)
        set_full_hp_grad(param, value)

    # --- where a value is

    def _part(self, param: nn.Parameter) -> _Part | None:
        group = self._group_of.get(param)
        if group is None:
            return None
        own, order = self._states.of[group.key], self._order(group)
        found = next(e for p, e in zip(order, extents(order, self._rank, own.numel), strict=True) if p is param)
        return _Part(param, own, found)

    def _read(self, param: nn.Parameter, key: str | None, of: Callable[[torch.Tensor], T]) -> T | None:
        part = self._part(param)
        if part is None:
            return None
        with self._states.at_hand(part.own):
            mine = self._entries(part, key)
            return None if mine is None else of(mine)

    def _asked(self, param: nn.Parameter, value: torch.Tensor, numel: int, key: str | None) -> _Part | None:
        """Finds the part to write to. A master must hold a value exactly: one is made where weights would round it."""
        part = self._part(param)
        if part is None:
            return None
        if value.numel() != numel:
            raise GrassError(f"A value of {value.numel()} elements was given for {part.name}, which takes {numel}.")
        if key is None and not part.own.numel and param.dtype != part.own.dtype:
            self._begin(part.own.group.unit.name)
            part = self._part(param)
        if key is None and part is not None:
            self._changed(part.own.group.unit)
        return part

    def _entries(self, part: _Part, key: str | None) -> torch.Tensor | None:
        """This rank's entries, where they are: at ZeRO-3 the padding as well."""
        own, at = part.own, part.extent
        length = zero_shard(part.param).numel() if _sharded(part.param) else at.length
        if key is not None:
            moment = self._moment(own, key)
            return None if moment is None else moment[at.at : at.at + length]
        master = own.current_master
        if master is not None:
            return master[at.at : at.at + length]
        return zero_shard(part.param).detach().reshape(-1)  # which are their own masters, or have none yet

    def _moment(self, own: GroupState, key: str) -> torch.Tensor | None:
        flat = {k: v for k, v in own.state.items() if torch.is_tensor(v) and v.shape == (own.numel,)}
        if key not in flat and own.state:
            raise GrassError(
                f"The optimizer keeps no {key!r} for each entry of a parameter; it keeps {', '.join(sorted(flat))}."
            )
        return flat.get(key)

    def _write(self, part: _Part, mine: torch.Tensor, key: str | None) -> None:
        own = part.own
        with self._states.at_hand(own):
            entries = self._entries(part, key)
            if entries is None:
                raise GrassError(
                    f"{key!r} of {part.name} cannot be set: the optimizer makes it when the layer is first updated. "
                    "Set it after that step."
                )
            entries[: mine.numel()].copy_(mine)
        own.changed |= own.master is not None
        if key is None and own.param is None and _sharded(part.param):
            zero_shard(part.param)[: mine.numel()].copy_(mine)
            shard_changed(part.param)

    def _begin(self, unit: str) -> None:
        groups = [own for own in self._states.of.values() if own.group.unit.name == unit]
        self._states.put(unit, [self._made(own) for own in groups])

    def _made(self, own: GroupState) -> Made:
        """A master as DeepSpeed will make it of the weights."""
        order = self._order(own.group)
        numel = own.foreseen = partition_numel(order, self._world_size)
        if not own.has_master:
            return own, numel, None, {}
        if _sharded(order[0]):
            return own, numel, torch.cat([zero_shard(p).reshape(-1) for p in order]).to(own.dtype), {}
        flat = torch.cat([p.reshape(-1) for p in order]).to(own.dtype)
        return own, numel, flat[self._rank * numel :][:numel], {}


def _sharded(param: nn.Parameter) -> bool:
    return hasattr(param, "ds_tensor")


def _shape_of(param: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, which ZeRO-3 leaves empty."""
    return getattr(param, "ds_shape", param.shape)


def _answer(reads: weakref.ref[Reads], method: str, param: nn.Parameter, *args: Any, **kwargs: Any) -> Any:
    """What a method of a ZeRO-1 or 2 parameter returns; None once the optimizer is gone."""
    return None if (found := reads()) is None else getattr(found, method)(param, *args, **kwargs)
