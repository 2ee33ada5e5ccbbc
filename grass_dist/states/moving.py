"""The states of the layers on their way between host buffers and device slots: the modes "interval" and "stream"."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from grass_dist.events import Traffic
from grass_dist.states.layer_state import LayerState
from grass_dist.states.place import DONE, Place
from grass_dist.states.slots import SlotPool
from grass_dist.states.store import LayerStateStore
from grass_dist.states.streams import StreamEvent
from grass_dist.states.transfer import TransferEngine


class MovingStates(ABC):
    """What the two modes share: a layer's way into a slot, its update there, and its way back.

    Every wait is for an event, and named below by what goes wrong without it:

    1. in: the slot's last state has been copied out, or that would be overwritten, and what used its memory before it
       was a slot has ended; and the host's buffer has what the layer's last way out brought, or an older state would
       come.
    2. update: the state has arrived.
    3. out: the update is done, and what a caller has queued since then that reads the state or writes it.
    4. read on the host: the last way out is done.

    Args:
        states: of all layers of this rank.
        pool, store, transfers: made for them.
        last_first: whether layers are updated from the last to the first, as a backward finishes them.
    """

    stays: bool
    """Whether an active layer's state stays in its slot from step to step."""

    def __init__(
        self,
        states: Sequence[LayerState[Any]],
        pool: SlotPool,
        store: LayerStateStore,
        transfers: TransferEngine,
        *,
        last_first: bool = True,
    ) -> None:
        self._places = [Place(state, store[i]) for i, state in enumerate(states)]
        self.pool, self.store, self.transfers = pool, store, transfers
        self._last_first = last_first
        self._updates: list[StreamEvent] = []  # of this step
        self._active: tuple[int, ...] = ()
        self._next: tuple[int, ...] | None = None  # known in the last step before a switch

    # --- what the controller calls

    def expect(self, layers: Sequence[int], steps: int) -> None:
        if steps == 1:
            self._next = tuple(layers)

    def leave(self, active: Sequence[int]) -> None:
        for layer, place in enumerate(self._places):
            if place.slot is not None and layer not in active:
                self._out(layer)

    def enter(self, active: Sequence[int]) -> None:
        self._active, self._next = tuple(active), None
        self._bring()

    # --- what the optimizer calls

    def update(self, layer: int, job: Callable[[], None]) -> None:
        """Has ``job`` update the layer once its state is there; then the state may go. On CUDA this returns at once."""
        views = self._views_for_update(layer)
        place = self._places[layer]

        def bound() -> None:
            place.state.bind(views, resident=True)
            job()

        place.updated = self.transfers.compute(f"GRASS::update ({place.state.name})", bound, [place.arrived])
        self._updates.append(place.updated)
        place.rests = True
        self._after_update(layer)

    def resting(self, layers: Sequence[int]) -> list[int]:
        """Those of ``layers`` whose states the next update finds where they are, and leaves there: see `update_all`."""
        return []

    def update_all(self, names: str, layers: Sequence[int], job: Callable[[], None]) -> None:
        """Has ``job`` update ``layers``, which are `resting`, and what never moves; ``names`` are of all these."""
        updated = self.transfers.compute(f"GRASS::update ({names})", job, [])
        for layer in layers:
            self._places[layer].updated = updated
        self._updates.append(updated)

    def ready(self, layer: int) -> None:
        """Binds the state for a caller that updates the layer itself, now: which what is computed next may use."""
        views = self._views_for_update(layer)
        place = self._places[layer]
        self.transfers.wait(place.arrived)
        place.state.bind(views, resident=True)

    def used(self, layer: int) -> None:
        """The caller of `ready` has queued its update, and the state may go: its way out is after what is queued."""
        self._after_update(layer)

    def in_slot(self, layer: int) -> bool:
        """Whether the state lies in memory that another layer gets when this one leaves."""
        return self._places[layer].slot is not None

    def show(self, layer: int) -> None:
        """Binds the state to where it is between two steps, though it may not have arrived there."""
        place = self._places[layer]
        _ended(place.left)  # which binds it to host memory
        if place.slot is not None and self.stays:
            place.state.bind(place.state.layout.device_views(place.slot.flat), resident=True)
        else:
            place.state.bind(place.state.layout.host_views(place.host), resident=False)

    def finish(self) -> None:
        """Ends the updates of a step: what is computed next comes after them."""
        for event in self._updates:
            event.wait()
        self._updates.clear()
        self.transfers.harvest()  # or the events of all copies would be kept

    def settle(self) -> None:
        """Makes every state readable where it is (`arrive`)."""
        for layer in range(len(self._places)):
            self.arrive(layer)

    def arrive(self, layer: int) -> None:
        """Binds a state to where it is and makes it readable there: in its slot, or in host memory.

        A state whose copy has failed is still where it was, and bound to that; the failure is raised by the update
        that needs the copy.
        """
        place = self._places[layer]
        if place.slot is None or not place.holds:
            _ended(place.left)
        elif _ended(place.arrived):
            place.state.bind(place.state.layout.device_views(place.slot.flat), resident=True)

    def put(self, layer: int, fill: Callable[[], None] | None) -> None:
        """Replaces a layer's state: binds it to host memory and has ``fill`` write it there; None takes it away.

        The layer is in no slot afterwards: `enter` brings it.
        """
        place = self._places[layer]
        if place.slot is None:
            _ended(place.left)
            self.pool.disregard(place.left)
        else:
            _ended(place.arrived)
            _ended(place.updated)
            place.slot.free = self._read([])
            self.pool.give(place.slot)
        self._updates = [event for event in self._updates if event is not place.updated]
        place.slot, place.arrived, place.updated, place.left = None, DONE, DONE, DONE  # failures are past, too
        place.holds = fill is not None
        if fill is not None:
            place.state.bind(place.state.layout.host_views(place.host), resident=False)
            fill()

    def keep(self, layer: int, fill: Callable[[], None]) -> None:
        """Takes a state that was made in other memory to where states are kept: ``fill`` writes it there."""
        self.put(layer, fill)

    def harvest(self) -> Traffic:
        """What the transfers have cost since the start."""
        return self.transfers.harvest()

    @property
    def device_bytes(self) -> int:
        """Bytes of the slots: what the states of layers take on the device."""
        return self.pool.nbytes

    @property
    def host_bytes(self) -> int:
        """Bytes of states that rest in host memory, and not in a slot."""
        return sum(p.state.layout.host_bytes for p in self._places if p.holds and p.slot is None)

    # --- the ways

    def _in(self, layer: int) -> None:
        """Takes a slot for ``layer`` and begins to bring its state, if it has one."""
        place, slot = self._places[layer], self.pool.take()
        place.slot, place.rests = slot, False
        if place.holds:
            runs = place.state.layout.runs(slot.flat, place.host)
            place.arrived = self.transfers.to_device(place.state.name, runs, after=[slot.free, place.left])
        else:
            place.arrived = slot.free

    def _out(self, layer: int) -> None:
        """Begins to take the state of ``layer`` back, and gives its slot to the next."""
        place, slot = self._places[layer], self._places[layer].slot
        assert slot is not None
        if place.holds:
            state, views = place.state, place.state.layout.host_views(place.host)
            place.left = slot.free = self.transfers.to_host(
                state.name,
                state.layout.runs(slot.flat, place.host),
                after=[self._read([place.updated]), place.arrived],
                then=lambda: state.bind(views, resident=False),
            )
        else:
            slot.free = place.arrived
        place.slot = None
        self.pool.give(slot)

    def _read(self, after: Sequence[StreamEvent]) -> StreamEvent:
        """The moment from which a slot may change, after ``after``: a caller may have queued reads of it until now."""
        return self.transfers.compute("GRASS::read", _nothing, after)

    def _views_for_update(self, layer: int) -> list[torch.Tensor]:
        place = self._places[layer]
        if place.slot is None:  # in another order than was foreseen
            if not len(self.pool):
                self._out(next(i for i in self._on_device() if i != layer))
            self._in(layer)
        assert place.slot is not None
        place.holds = True
        return place.state.layout.device_views(place.slot.flat)

    def _ordered(self, layers: Sequence[int]) -> list[int]:
        """``layers`` in the order of their updates."""
        return sorted(layers, reverse=self._last_first)

    def _on_device(self) -> list[int]:
        return [i for i, place in enumerate(self._places) if place.slot is not None]

    @abstractmethod
    def _bring(self) -> None:
        """Begins to bring what is needed next."""

    @abstractmethod
    def _after_update(self, layer: int) -> None:
        """``layer`` has been updated; begins the ways that follow."""


class IntervalStates(MovingStates):
    """The states of the active layers stay for the interval.

    There is one slot for each active layer and, with ``prefetch_steps``, one more that is empty between two switches.
    ``prefetch_steps`` before a switch the first of the new layers comes into the empty slot. With the last update
    before the switch each layer that leaves begins its way out, and the next new one its way into the same slot; so one
    slot is empty again in the end.
    """

    stays = True

    def __init__(self, *args: Any, prefetch_steps: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prefetch_steps = prefetch_steps

    def expect(self, layers: Sequence[int], steps: int) -> None:
        super().expect(layers, steps)
        new = [layer for layer in self._ordered(layers) if self._places[layer].slot is None]
        first = len(new) == len(set(layers) - set(self._active))  # none of them has come yet
        if steps <= self._prefetch_steps and new and first and len(self.pool):
            self._in(new[0])

    def resting(self, layers: Sequence[int]) -> list[int]:
        stay = layers if self._next is None else self._next
        return [i for i in layers if i in stay and self._places[i].slot is not None and self._places[i].rests]

    def _after_update(self, layer: int) -> None:
        if self._next is not None and layer not in self._next:
            self._out(layer)
            self._bring()

    def _bring(self) -> None:
        for layer in self._ordered(self._active if self._next is None else self._next):
            if self._places[layer].slot is None and len(self.pool):
                self._in(layer)


class StreamedStates(MovingStates):
    """The states of a few layers at a time, in the order of the updates: from the last layer to the first.

    A layer's state goes out when it has been updated, and the state that is needed next comes into its slot; after the
    last update those that the next step needs first.
    """

    stays = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._to_come: list[int] = []
        self._to_update: set[int] = set()

    def leave(self, active: Sequence[int]) -> None:
        first = self._ordered(active)[: self.pool.count]  # with draw_ahead=0 the slots hold the first of the old ones
        super().leave(first)
        self._to_come, self._to_update = [], set()  # `enter` begins again, with what is in no slot yet

    def _bring(self) -> None:
        if not self._to_update:
            self._to_update = set(self._active)
            self._to_come = [i for i in self._ordered(self._active) if self._places[i].slot is None]
        while self._to_come and len(self.pool):
            layer = self._to_come.pop(0)
            if self._places[layer].slot is None:
                self._in(layer)

    def _after_update(self, layer: int) -> None:
        self._out(layer)
        self._to_update.discard(layer)
        self._to_come = [i for i in self._to_come if i != layer]
        if not self._to_update and self._next is not None:  # a switch follows: its layers are those to bring
            self._active = self._next
        self._bring()


def _ended(event: StreamEvent) -> bool:
    """Waits for ``event`` on the host; whether it came without a failure."""
    try:
        event.synchronize()
    except Exception:  # of a copy, or of the user's optimizer before it
        return False
    return True


def _nothing() -> None:
    pass
