"""The weights of layers that do not train now: they rest in host memory, and come to the device to be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grass_dist.errors import GrassError
from grass_dist.events import Traffic
from grass_dist.model.backward import at_end_of_backward, in_backward
from grass_dist.states.layer_weights import LayerWeights
from grass_dist.states.place import DONE
from grass_dist.states.slots import Slot, SlotPool
from grass_dist.states.store import LayerStateStore
from grass_dist.states.streams import StreamEvent
from grass_dist.states.transfer import TransferEngine


@dataclass(slots=True)
class Window:
    """A slot through which the weights of every K-th layer that rests pass."""

    slot: Slot
    views: dict[int, list[torch.Tensor]]
    """For each layer that has passed its parameters in the slot."""
    layer: int | None = None
    """Whose weights it has, or gets."""
    arrived: StreamEvent = DONE
    stale: bool = False
    """Whether someone may have changed the weights in host memory since they came."""


class HostWeights:
    """Brings the weights of a layer before its forward and before its backward; they go without a copy.

    The layers that do not train have slots in turn, for as long as the same layers train. Autograd remembers where the
    weights were that a forward used: when the backward comes to them, they are there again, at the same address. So
    nothing that autograd saves is touched. Neighbours have different slots: while one computes, the next ones come, and
    the last ones of a forward are all there when the backward begins.

    Every wait is for an event, and named below by what goes wrong without it:

    1. in: what the compute has queued by now has ended, or the weights that it uses would be overwritten; so has the
       last copy into the same slot; and what used the memory before it was a slot.
    2. use: the weights have arrived.
    3. out of an active layer: its updates have ended. The host waits for this copy, once an interval, since the
       parameter shows host memory from then on.

    Args:
        layers: of the whole stack, those that never train as well.
        competing: position among ``layers`` of each layer that competes.
        pool: one slot for each active layer, and ``slots`` more.
        store: a buffer for each of ``layers``.
        transfers: made for them; the caller computes between jobs (``inline``).
        slots: through which layers pass that do not train.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        competing: Sequence[int],
        pool: SlotPool,
        store: LayerStateStore,
        transfers: TransferEngine,
        slots: int,
    ) -> None:
        self.pool, self.store, self.transfers = pool, store, transfers
        self._layers, self._competing = list(layers), tuple(competing)
        self._windows = [Window(pool.take(), {}) for _ in range(slots)]
        self._hosts = [layer.views(store[n]) for n, layer in enumerate(layers)]
        self._homes: dict[int, Slot] = {}  # of the active layers
        self._running: list[int] = []  # layers whose forward has begun and not ended, outermost first
        self._depth = 0  # forwards of modules around layers that have begun and not ended
        self._last = -1  # the layer that ran last
        self._backward: int | None = None  # the layer whose backward runs
        self._differentiable = [True] * len(layers)  # whether a backward came through, as far as is known
        self._closed = False
        self.epoch = 0
        """Changes when other layers become active: what a forward before that has saved lies elsewhere now."""
        self._slot_of: dict[int, int] = {}  # of each layer that rests and has weights
        self._assign()
        for n, layer in enumerate(layers):
            layer.bound = [param.data for _, param in layer.params]
            for (_, param), view in zip(layer.params, self._hosts[n], strict=True):
                view.copy_(param.detach())
            layer.bind(self._hosts[n])

    # --- what the controller calls

    def leave(self, active: Sequence[int]) -> None:
        """Writes the weights of layers that train no more back to host memory, once, and waits for that."""
        self._settle()
        stay = {self._competing[index] for index in active}
        going = [n for n in self._homes if n not in stay]
        for n in going:
            layer, slot = self._layers[n], self._homes[n]
            layer.come_home()
            runs = layer.layout.runs(slot.flat, self.store[n])
            slot.free = self.transfers.to_host(layer.name, runs, after=[self._computed()])
        for n in going:
            slot = self._homes[n]
            slot.free.synchronize()
            del self._homes[n]
            self._layers[n].bind(self._hosts[n])
            self.pool.give(slot)
        self.epoch += bool(going)

    def enter(self, active: Sequence[int]) -> None:
        """Brings the weights of layers that train from now on; what is computed next waits for them."""
        coming = [n for n in (self._competing[index] for index in active) if n not in self._homes]
        arriving = []
        for n in coming:
            layer, slot = self._layers[n], self.pool.take()
            layer.come_home()
            runs = layer.layout.runs(slot.flat, self.store[n])
            arriving.append(self.transfers.to_device(layer.name, runs, after=[slot.free]))
            self._homes[n] = slot
        for n, arrived in zip(coming, arriving, strict=True):
            self.transfers.wait(arrived)
            self._layers[n].bind(self._layers[n].views(self._homes[n].flat))
        self._assign()
        self.epoch += bool(coming)

    def harvest(self) -> Traffic:
        """What the transfers have cost since the start."""
        return self.transfers.harvest()

    @property
    def device_bytes(self) -> int:
        """Bytes of all slots, those of the active layers included."""
        return self.pool.nbytes

    @property
    def host_bytes(self) -> int:
        """Bytes of the weights of all layers in host memory."""
        return self.store.nbytes

    # --- what the hooks of modules call

    def pass_begins(self, first: int) -> None:
        """A module around layers runs, of which ``first`` is the first: whatever has come before may have changed."""
        self._depth += 1
        if self._depth > 1 or in_backward() or self._closed:
            return
        self._settle()
        self.transfers.harvest()  # or the events of all copies would be kept
        for window in self._windows:
            window.stale = True
        self._prefetch(first - 1, down=False)

    def pass_ends(self) -> None:
        self._depth = max(self._depth - 1, 0)

    def forward_begins(self, n: int) -> None:
        """Binds the weights of a layer to its slot, once they are there, and begins to bring the next ones."""
        if n not in self._slot_of or self._closed:
            return
        again = in_backward()
        if not again and self._backward is not None:
            self._settle()
        self._take_over(n)
        self._bring(n, trusted=n in self._running or again)
        self._running.append(n)
        self._layers[n].bind(self._views(n))
        self._prefetch(n, down=again and self._last != n - 1)
        self._last = n

    def forward_ends(self, n: int, *, differentiable: bool | None = None) -> None:
        """Binds the weights of a layer to host memory again.

        Args:
            differentiable: whether a backward may come; None where that is not known.
        """
        if n not in self._slot_of or self._closed:
            return
        if differentiable is not None and not in_backward():
            self._differentiable[n] = differentiable
        if n in self._running:
            self._running.remove(n)
        if n not in self._running and n != self._backward:
            self._layers[n].bind(self._hosts[n])
        if not self._running and self._backward is not None:
            self._bring(self._backward, trusted=True)  # a forward within the backward may have needed the slot

    def backward_begins(self, n: int, epoch: int) -> None:
        """The backward has come to a layer, so it has left those after it: autograd runs what was recorded last first.

        Args:
            epoch: `epoch` at the forward.

        Raises:
            GrassError: the weights of that forward are no longer where they were; or the backward is recorded for
                another one.
        """
        if epoch != self.epoch:
            raise GrassError(
                f"The backward has come to {self._layers[n].name} after other layers were drawn than at its forward, "
                "and with grass.offload.weights='host' its weights have moved: call backward() before "
                "optimizer.step()."
            )
        if n not in self._slot_of or n == self._backward or self._closed:
            return
        if torch.is_grad_enabled():
            raise GrassError(
                "grass.offload.weights='host' does not work with a backward through a backward (create_graph=True): "
                f"the weights of {self._layers[n].name} will have left the device then; use weights='resident'."
            )
        if self._backward is None:
            at_end_of_backward(self._backward_ends)
        self._backward_ends()
        self._backward = n
        self._bring(n, trusted=True)
        self._layers[n].bind(self._views(n))
        self._prefetch(n, down=True)

    def _backward_ends(self) -> None:
        if (n := self._backward) is not None:
            self._backward = None
            if n not in self._running:
                self._layers[n].bind(self._hosts[n])

    def _settle(self) -> None:
        """Between forwards and backwards no layer is bound to a slot, unless an exception has ended one of them."""
        self._depth, interrupted = min(self._depth, 1), {*self._running, self._backward} - {None}
        for n in interrupted:
            assert n is not None
            if self._window(n).layer == n:
                self._window(n).arrived.synchronize()
                for ours, there in zip(self._hosts[n], self._layers[n].bound, strict=True):
                    ours.copy_(there)  # someone may have written to what the parameter showed
            self._layers[n].bind(self._hosts[n])
        self._running.clear()
        self._backward = None

    def close(self) -> None:
        """Gives the parameters memory of their own on the device; nothing else is called after it."""
        if self._closed:
            return
        self._settle()
        self._closed = True
        device = self._windows[0].slot.flat.device
        for layer in self._layers:
            layer.come_home()
            layer.bind([view.to(device, copy=True) for view in layer.bound])

    # --- the ways

    def _assign(self) -> None:
        """Gives slots to the layers that rest, in turn. What a slot has of another layer is not to be used again."""
        resting = [n for n, layer in enumerate(self._layers) if layer.params and n not in self._homes]
        self._slot_of = {n: turn % len(self._windows) for turn, n in enumerate(resting)}
        for at, window in enumerate(self._windows):
            if window.layer is not None and self._slot_of.get(window.layer) != at:
                window.layer = None

    def _window(self, n: int) -> Window:
        return self._windows[self._slot_of[n]]

    def _views(self, n: int) -> list[torch.Tensor]:
        """The parameters of a layer in its slot."""
        window = self._window(n)
        if n not in window.views:
            window.views[n] = self._layers[n].views(window.slot.flat)
        return window.views[n]

    def _bring(self, n: int, *, trusted: bool) -> None:
        """Has the compute wait until a layer is in its slot, and begins to bring it if it is not on its way.

        Args:
            trusted: weights that came before the pass of the model that runs now are those of now.

        Raises:
            GrassError: a layer that is running needs the same slot.
        """
        window = self._window(n)
        if window.layer != n or (window.stale and not trusted):
            if window.layer in self._running and window.layer != n:
                assert window.layer is not None
                raise GrassError(
                    f"{self._layers[n].name} runs within {self._layers[window.layer].name}, and both have the same of "
                    f"{len(self._windows)} slots on the device: set grass.offload.weight_slots to more than "
                    f"{abs(n - window.layer)}, or weights='resident'."
                )
            self._copy(n)
        self.transfers.wait(window.arrived)

    def _take_over(self, n: int) -> None:
        """Has host memory hold the weights of a layer that rests, if someone has given it others."""
        if self._layers[n].bound is self._hosts[n] and self._layers[n].come_home():
            self._empty(n)

    def _empty(self, n: int) -> None:
        """What a slot has of a layer is not to be used again."""
        if (window := self._window(n)).layer == n:
            window.layer = None

    def _copy(self, n: int) -> None:
        layer, window = self._layers[n], self._window(n)
        self._take_over(n)
        runs = layer.layout.runs(window.slot.flat, self.store[n])
        window.arrived = self.transfers.to_device(
            layer.name, runs, after=[window.slot.free, window.arrived, self._computed()], keeps=True
        )
        window.layer, window.stale = n, False

    def _prefetch(self, n: int, *, down: bool) -> None:
        """Begins to bring the layers that are used after ``n``, as far as there are slots that nothing uses."""
        taken = {self._slot_of[n]} if n in self._slot_of else set()
        for other in range(n - 1, -1, -1) if down else range(n + 1, len(self._layers)):
            if other not in self._slot_of:
                continue
            at, window = self._slot_of[other], self._window(other)
            if at in taken or window.layer in self._running or (down and not self._differentiable[other]):
                return
            taken.add(at)
            if window.layer != other or (window.stale and not down):
                self._copy(other)

    def _computed(self) -> StreamEvent:
        """The moment from which memory may change that the compute has used until now."""
        return self.transfers.compute("GRASS::read", _nothing, [])


def _nothing() -> None:
    pass
