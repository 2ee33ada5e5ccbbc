"""The states of the layers across the ZeRO optimizers that are constructed one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from grass_dist.backends.zero.groups import Group, capacity, device_of
from grass_dist.errors import GrassError
from grass_dist.events import Traffic
from grass_dist.states.fields import Counts, Home, Kept, born_in, field, move_home, placed_count
from grass_dist.states.layout import Layout
from grass_dist.states.moving import MovingStates

MASTER = "master"


class GroupState:
    """Master and moments of this rank's partition of one group; lives as long as the run.

    Attributes:
        state: of the base optimizer, by key: moments wherever they are, and step counts.
        master: wherever it is; None if the group has no state yet, or is updated in the weights themselves.
        param: what the ZeRO optimizer of now calls the master of this group; None if the group does not train.
        lists: the group's entries in DeepSpeed's state, of the time when it last trained.
        saved: elements of the master that DeepSpeed saves, without padding.
        numel: elements of the partition; 0 if the group has no state yet.
        changed: whether there is more to the state than fp32 copies of the weights as they are.
        noted: whether ``lists`` and ``saved`` are of this state.
        foreseen: elements that a partition must have which a state was made for before DeepSpeed made one; else 0.
        resident: whether the state is on the device.
    """

    def __init__(self, group: Group, kept: Kept, counts: Counts, world_size: int, *, has_master: bool) -> None:
        self.group, self._counts = group, counts
        self.has_master = has_master
        self.lists: dict[str, Any] = {}
        self.state: dict[str, Any] = {}
        self.homes: dict[str, torch.Tensor] = {}
        self.master: torch.Tensor | None = None
        self.param: torch.Tensor | None = None
        self.numel = self.saved = self.foreseen = 0
        self.changed, self.noted, self.resident = False, False, True
        self._absent = torch.empty(0)
        self._capacity = capacity(group, world_size)
        shape = torch.Size([self._capacity])
        own = [(MASTER, shape, torch.float32), *kept] if has_master else kept
        self.dtypes = {key: dtype for key, _, dtype in own}
        self.fields = [field(group.unit.name, key, shape, dtype) for key, _, dtype in own]

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
        born, self.param, self.numel = self.numel > 0, param, param.numel()
        self._absent = param.new_full((1,), math.nan).expand(self.numel)
        if not born:
            self.state, self.resident = state[param], True
            self.master = param.data if self.has_master else None
            return
        state[param] = self.state
        if self.master is not None:
            self.show(self.master)

    def bind(self, views: Sequence[torch.Tensor], *, resident: bool) -> None:
        """``views``, one for each of `fields`, are the state."""
        self.resident = resident
        self.homes = dict(zip(self.dtypes, views, strict=True))
        if self.has_master:
            self.master = self.homes[MASTER][: self.numel]
            self.show(self.master)
        for key, view in self.homes.items():
            if key in self.state:
                self.state[key] = view[: self.numel]

    def show(self, master: torch.Tensor) -> None:
        """Gives DeepSpeed the master; while that is on the host, NaN of its shape, dtype and device without memory."""
        if (param := self.param) is not None:  # which may change meanwhile: a copy that ends calls this, too
            param.data = master if self.resident else self._absent

    @property
    def current_master(self) -> torch.Tensor | None:
        """The master, wherever it is. While a group trains whose weights are their own masters, DeepSpeed has one."""
        return self.param.data if self.master is None and self.param is not None else self.master

    def fill(self, numel: int, master: torch.Tensor | None, state: Mapping[str, Any]) -> None:
        """Writes a state into what `bind` has bound; tensors may lack the padding at their end."""
        self.numel = numel
        self.state.clear()  # it may be the one that the ZeRO optimizer of now has
        values = {**state, **({MASTER: master} if self.has_master and master is not None else {})}
        for key, value in values.items():
            home = self.homes.get(key)
            if home is not None and torch.is_tensor(value):
                home[: value.numel()].copy_(value)
                home[value.numel() :].zero_()
            if key == MASTER:
                self.master = None if home is None else home[:numel]
            elif home is not None and torch.is_tensor(value):
                self.state[key] = home[:numel]
            else:
                self.state[key] = self._placed(key, value)

    def _placed(self, key: str, value: Any) -> Any:
        """A copy of a loaded entry that has no home: a step count, or what a class keeps in a shape of its own."""
        if not torch.is_tensor(value):
            return value
        if value.numel() == 1:
            return placed_count(value, key, self._counts)
        return value.to(device_of(self.group.params[0]), copy=True)

    def exact(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """A moment in the dtype in which it is updated: host memory may round it (`offload.host_dtype`)."""
        return value.to(self.dtypes.get(key, value.dtype))

    def forget(self) -> None:
        self.state, self.lists, self.homes = {}, {}, {}
        self.master = self.param = None  # or the optimizer of now would seem to train what the next one does not
        self.numel = self.foreseen = 0
        self.changed = self.noted = False

    def tensors(self) -> list[torch.Tensor]:
        """Master and moments."""
        moments = [value for value in self.state.values() if torch.is_tensor(value) and value.numel() > 1]
        return moments if self.master is None else [self.master, *moments]

    def homes_of_moments(self) -> list[Home]:
        """Where what the base optimizer makes for the group belongs."""
        assert self.param is not None
        return [(self.param, key, view[: self.numel]) for key, view in self.homes.items() if key != MASTER]


class UnitState:
    """The groups of a layer as one thing that moves (`offload.moving.Movable`), or those of a role, which stays."""

    def __init__(self, name: str, groups: Sequence[GroupState], host_dtype: torch.dtype | None) -> None:
        self.name, self.groups = name, list(groups)
        self.layout = Layout([own for group in groups for own in group.fields], host_dtype)

    def bind(self, views: Sequence[torch.Tensor], *, resident: bool) -> None:
        start = 0
        for group in self.groups:
            end = start + len(group.fields)
            group.bind(views[start:end], resident=resident)
            start = end

    def stay(self, device: torch.device) -> None:
        """Binds memory of its own on the device."""
        flat = torch.empty(self.layout.device_bytes, dtype=torch.uint8, device=device)
        self.bind(self.layout.device_views(flat), resident=True)


class ZeroStates:
    """`LayerStates` under ZeRO: what the method's engine, the ZeRO optimizer and checkpoints ask of all states.

    A layer's state is born when the layer is first constructed over: its master, which DeepSpeed makes then, goes to
    the host at once and comes with all others.

    Args:
        layers, roles: states of all groups.
        moving: moves those of the layers; None leaves them on the device, where they were born.
        device: that trains.
        still: of groups that never train, for `whole.with_still`.
    """

    def __init__(
        self,
        layers: Sequence[UnitState],
        roles: Sequence[UnitState],
        moving: MovingStates | None,
        device: torch.device,
        still: Sequence[GroupState] = (),
    ) -> None:
        self._units = [*layers, *roles]
        self.still = list(still)
        self._layers, self._moving, self._device = list(layers), moving, device
        self.streams = moving is not None and not moving.stays
        self.of = {group.group.key: group for unit in self._units for group in unit.groups}
        self._index = {key.group.key: i for i, unit in enumerate(layers) for key in unit.groups}
        self._in_use: int | None = None

    # --- for the method's engine

    def expect(self, layers: Sequence[int], steps: int) -> None:
        if self._moving is not None:
            self._moving.expect(layers, steps)

    def leave(self, active: Sequence[int]) -> None:
        if self._moving is not None:
            self._moving.leave(active)

    def enter(self, active: Sequence[int]) -> None:
        if self._moving is not None:
            self.keep_newborn()
            self._moving.enter(active)
            for layer in active:
                self._moving.show(layer)

    def harvest(self) -> Traffic:
        return Traffic() if self._moving is None else self._moving.harvest()

    # --- for the ZeRO optimizer

    @contextmanager
    def updating(self, masters: Sequence[torch.Tensor], state: Mapping[Any, dict[str, Any]]) -> Iterator[None]:
        """While it lasts, the base optimizer updates ``masters``, of one unit; their states are there."""
        groups = [group for group in self.of.values() if any(group.param is master for master in masters)]
        layers = {self._index.get(group.group.key) for group in groups}
        if len(layers) > 1:
            raise GrassError("DeepSpeed updates several groups in one step of its optimizer; use another release.")
        self._use(layers.pop() if layers else None)
        homes = [home for group in groups for home in group.homes_of_moments()]
        name = groups[0].group.unit.name if groups else "nothing"
        with born_in(homes, state), torch.profiler.record_function(f"GRASS::update ({name})"):
            yield
        move_home(homes, state)
        for group in groups:
            group.changed = True

    def end_step(self) -> None:
        """All groups have been updated, and their weights with them."""
        self._use(None)
        if self._moving is not None:
            self._moving.finish()

    def _use(self, layer: int | None) -> None:
        """DeepSpeed copies a master to its weights after the update: so its state goes when the next one's is used."""
        if self._moving is None or layer == self._in_use:
            return
        if self._in_use is not None:
            self._moving.used(self._in_use)
        if layer is not None:
            self._moving.ready(layer)
        self._in_use = layer

    def keep_newborn(self) -> None:
        """Takes what DeepSpeed has made for layers that had no state, on the device, to where states are kept."""
        if self._moving is None:
            return
        for index, unit in enumerate(self._layers):
            if any(group.numel and not group.homes for group in unit.groups):
                made = [(group, group.numel, group.master, dict(group.state)) for group in unit.groups]
                self._moving.put(index, partial(_fill_all, made))

    # --- for a caller between two steps

    @contextmanager
    def at_hand(self, own: GroupState) -> Iterator[None]:
        """While it lasts, the state of a group can be read and written where it is bound to."""
        layer = self._index.get(own.group.key)
        if self._moving is not None and layer is not None:
            self._moving.arrive(layer)
        yield

    # --- for checkpoints

    def settle(self) -> None:
        """Makes all states readable where they are."""
        if self._moving is not None:
            self._moving.settle()

    def replace(self, states: Mapping[tuple[str, int], tuple[int, torch.Tensor | None, Mapping[str, Any]]]) -> None:
        """Takes over (elements, master, state) of every group by its key."""
        for unit in self._units:
            self.put(unit.name, [(group, *states[group.group.key]) for group in unit.groups])

    def put(self, name: str, made: Sequence[Made]) -> None:
        """Takes over the groups of the unit ``name``."""
        index = next(i for i, unit in enumerate(self._units) if unit.name == name)
        fill = partial(_fill_all, made)
        if self._moving is not None and index < len(self._layers):
            self._moving.put(index, fill)
        else:
            self._units[index].stay(self._device)
            fill()

    def forget(self) -> None:
        """Throws all states away."""
        for index in range(len(self._layers)):
            if self._moving is not None:
                self._moving.put(index, None)
        for group in self.of.values():
            group.forget()

    @property
    def device_bytes(self) -> int:
        """Bytes of slots, and of the states that stay on the device."""
        staying = self._units if self._moving is None else self._units[len(self._layers) :]
        vectors = [t for unit in staying for group in unit.groups for t in group.tensors()]
        return sum(t.nbytes for t in vectors) + (self._moving.device_bytes if self._moving is not None else 0)

    @property
    def host_bytes(self) -> int:
        """Bytes of states that rest in host memory."""
        return 0 if self._moving is None else self._moving.host_bytes


Made = tuple[GroupState, int, torch.Tensor | None, Mapping[str, Any]]
"""A group's state: (where it goes, elements of the partition, master, state)."""


def _fill_all(made: Sequence[Made]) -> None:
    for group, numel, master, state in made:
        group.fill(numel, master, state)
