"""The states of the layers across the ZeRO optimizers that are constructed one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from grass_dist.backends.zero.groups import Group, capacity
from grass_dist.errors import GrassError
from grass_dist.events import Traffic
from grass_dist.states.fields import Counts, Kept
from grass_dist.states.layer_state import MASTER, LayerState, TargetState, materialize
from grass_dist.states.moving import MovingStates
from grass_dist.states.resident import ResidentStates


class GroupState(TargetState):
    """Master and moments of this rank's partition of one group; lives as long as the run.

    A partition is at most as long as the memory that is bound; DeepSpeed says how long when it first makes one.

    Attributes:
        lists: the group's entries in DeepSpeed's state, of the time when it last trained.
        saved: elements of the master that DeepSpeed saves, without padding.
        numel: elements of the partition; 0 if the group has no state yet.
        dtype: of the master; weights of this dtype may be their own.
        changed: whether there is more to the state than copies of the weights as they are.
        noted: whether ``lists`` and ``saved`` are of this state.
        foreseen: elements that a partition must have which a state was made for before DeepSpeed made one; else 0.
    """

    def __init__(
        self,
        group: Group,
        kept: Kept,
        counts: Counts,
        world_size: int,
        *,
        has_master: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.group, self.has_master, self._counts, self.dtype = group, has_master, counts, dtype
        self.lists: dict[str, Any] = {}
        self.numel = self.saved = self.foreseen = 0
        self.changed = self.noted = False
        self._absent = torch.empty(0)
        self._capacity = capacity(group, world_size)
        shape = torch.Size([self._capacity])
        own = [(key, shape, dtype) for key, _, dtype in kept]
        super().__init__(group.unit.name, [(MASTER, shape, dtype), *own] if has_master else own)

    def adopt(self, param: torch.Tensor, state: dict[Any, dict[str, Any]]) -> None:
        """A new ZeRO optimizer has made ``param`` for this group: takes it over, or gives it what there is."""
        if param.numel() > self._capacity:
            raise GrassError(
                f"A ZeRO partition of {self.group.unit.name} has {param.numel()} elements where at most "
                f"{self._capacity} were expected: this DeepSpeed pads in another way."
            )
        if self.foreseen not in (0, param.numel()):
            raise GrassError(
                f"A ZeRO partition of {self.group.unit.name} has {param.numel()} elements where {self.foreseen} were "
                "expected, when a value was set by safe_set_full_fp32_param: this DeepSpeed pads in another way."
            )
        has_state, self.param, self.numel = self.numel > 0, param, param.numel()
        self._absent = param.new_full((1,), math.nan).expand(self.numel)
        if not has_state:
            self.state, self.resident = state[param], True
            self.master = param.data if self.has_master else None
            return
        state[param] = self.state
        if self.master is not None:
            self.show(self.master)

    @property
    def device(self) -> torch.device:
        return self.group.params[0].device

    def used(self, view: torch.Tensor) -> torch.Tensor:
        return view[: self.numel]

    def show(self, master: torch.Tensor) -> None:
        """Gives DeepSpeed the master; while that is on the host, NaN of its shape, dtype and device without memory."""
        super().show(master if self.resident else self._absent)

    @property
    def current_master(self) -> torch.Tensor | None:
        """The master, wherever it is. While a group trains whose weights are their own masters, DeepSpeed has one."""
        return self.param.data if self.master is None and self.param is not None else self.master

    def stay(self, device: torch.device) -> None:
        """Binds memory of its own on the device."""
        self.bind([torch.empty(own.shape, dtype=own.dtype, device=device) for own in self.fields], resident=True)

    def replace(self, numel: int, master: torch.Tensor | None, state: Mapping[str, Any]) -> None:
        """Takes over copies of a state whose partition has ``numel`` elements."""
        self.numel = numel
        self.state.clear()  # it may be the one that the ZeRO optimizer of now has
        self.fill(state, self._counts)
        if self.has_master and master is not None:
            self.master = self.placed(MASTER, master, {})

    def forget(self) -> None:
        self.state, self.lists, self._bound = {}, {}, {}
        self.master = self.param = None  # or the optimizer of now would seem to train what the next one does not
        self.numel = self.foreseen = 0
        self.changed = self.noted = False

    def tensors(self) -> list[torch.Tensor]:
        """Master and moments, without step counts."""
        return [tensor for tensor in super().tensors() if tensor.numel() > 1]


class ZeroStates:
    """`LayerStates` under ZeRO: what the controller, the ZeRO optimizer and checkpoints ask of all states.

    A layer's state is made when the layer is first constructed over: its master, which DeepSpeed makes then, goes at
    once to where the states of layers are kept.

    Args:
        layers, roles: states of all groups.
        mode: keeps the states of the layers, and moves them unless they stay on the device.
        device: that trains.
        still: states of groups that never train, for a checkpoint.
    """

    def __init__(
        self,
        layers: Sequence[LayerState[GroupState]],
        roles: Sequence[LayerState[GroupState]],
        mode: ResidentStates | MovingStates,
        device: torch.device,
        still: Sequence[GroupState] = (),
    ) -> None:
        self.mode, self._roles, self.still = mode, ResidentStates(roles), list(still)
        self._layers, self._units, self._device = list(layers), [*layers, *roles], device
        self._kept_by: dict[str, tuple[ResidentStates | MovingStates, int]] = {
            **{unit.name: (mode, i) for i, unit in enumerate(layers)},
            **{unit.name: (self._roles, i) for i, unit in enumerate(roles)},
        }
        self.of = {own.group.key: own for unit in self._units for own in unit.targets}
        self._index = {own.group.key: i for i, unit in enumerate(layers) for own in unit.targets}
        self._in_use: int | None = None

    # --- for the controller

    def expect(self, layers: Sequence[int], steps: int) -> None:
        self.mode.expect(layers, steps)

    def leave(self, active: Sequence[int]) -> None:
        self.mode.leave(active)

    def enter(self, active: Sequence[int]) -> None:
        self.keep_new()
        self.mode.enter(active)
        for layer in active:
            self.mode.show(layer)

    def harvest(self) -> Traffic:
        return self.mode.harvest()

    # --- for the ZeRO optimizer

    @contextmanager
    def updating(self, masters: Sequence[torch.Tensor], state: Mapping[Any, dict[str, Any]]) -> Iterator[None]:
        """While it lasts, the base optimizer updates ``masters``, of one unit; their states are there."""
        groups = [group for group in self.of.values() if any(group.param is master for master in masters)]
        layers = {self._index.get(group.group.key) for group in groups}
        if len(layers) > 1:
            raise GrassError("DeepSpeed updates several groups in one step of its optimizer; use another release.")
        self._use(layers.pop() if layers else None)
        name = groups[0].name if groups else "nothing"
        with materialize(groups, state), torch.profiler.record_function(f"GRASS::update ({name})"):
            yield
        for group in groups:
            group.changed = True

    def end_step(self) -> None:
        """All groups have been updated, and their weights with them."""
        self._use(None)
        self.mode.finish()

    def _use(self, layer: int | None) -> None:
        """DeepSpeed copies a master to its weights after the update: so its state goes when the next one's is used."""
        if layer == self._in_use:
            return
        if self._in_use is not None:
            self.mode.used(self._in_use)
        if layer is not None:
            self.mode.ready(layer)
        self._in_use = layer

    def keep_new(self) -> None:
        """Takes what DeepSpeed has made for layers that had no state, on the device, to where states are kept."""
        for index, unit in enumerate(self._layers):
            if any(own.numel and not own.homes for own in unit.targets):
                made = [(own, own.numel, own.master, dict(own.state)) for own in unit.targets]
                self.mode.keep(index, partial(self._fill, made))

    # --- for a caller between two steps

    @contextmanager
    def at_hand(self, own: GroupState) -> Iterator[None]:
        """While it lasts, the state of a group can be read and written where it is bound to."""
        if (layer := self._index.get(own.group.key)) is not None:
            self.mode.arrive(layer)
        yield

    # --- for checkpoints

    def settle(self) -> None:
        """Makes all states readable where they are."""
        self.mode.settle()

    def replace(self, states: Mapping[tuple[str, int], tuple[int, torch.Tensor | None, Mapping[str, Any]]]) -> None:
        """Takes over (elements, master, state) of every group by its key."""
        for unit in self._units:
            self.put(unit.name, [(own, *states[own.group.key]) for own in unit.targets])

    def put(self, name: str, made: Sequence[Made]) -> None:
        """Takes over the groups of the unit ``name``."""
        states, index = self._kept_by[name]
        states.put(index, partial(self._fill, made))

    def _fill(self, made: Sequence[Made]) -> None:
        for own, numel, master, state in made:
            if not own.homes:
                own.stay(self._device)
            own.replace(numel, master, state)

    def forget(self) -> None:
        """Throws all states away."""
        for index in range(len(self._layers)):
            self.mode.put(index, None)
        for own in self.of.values():
            own.forget()

    @property
    def device_bytes(self) -> int:
        """Bytes of slots, and of the states that stay on the device."""
        return self.mode.device_bytes + self._roles.device_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of states that rest in host memory."""
        return self.mode.host_bytes


Made = tuple[GroupState, int, torch.Tensor | None, Mapping[str, Any]]
"""A group's state: (where it goes, elements of the partition, master, state)."""
