"""The hooks into gradients that the backends of plain PyTorch share."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from grass_dist.backends.dtensors import DTensorSharding
from grass_dist.backends.finite_mark import FiniteMark
from grass_dist.backends.host_sums import HostSums
from grass_dist.backends.later import refuse_later_wrapping
from grass_dist.errors import GrassError
from grass_dist.method.interfaces import Arrived, GradientHooks, GradientSink
from grass_dist.method.measurement import norms
from grass_dist.model.discovery import Unit
from grass_dist.model.sharding import Sharding
from grass_dist.model.units import GradientHook, shown_names
from grass_dist.ranks import Ranks

TWICE = (
    "If a layer runs twice before one backward (two forwards, or a block that the model uses again), reentrant "
    "activation checkpointing gives it two gradients: use checkpointing with use_reentrant=False."
)


def device_of(model: nn.Module) -> torch.device:
    """The device that ``model`` computes on, as far as its parameters tell: a GPU, if one of them is on one."""
    devices = {p.device for p in model.parameters()}
    return next((device for device in sorted(devices, key=str) if device.type == "cuda"), torch.device("cpu"))


SPARSE = (
    "sparse gradients work in one process and with states that stay on the device (grass.offload.mode='none') alone; "
    "use nn.Embedding(sparse=False)"
)


def _inert(kind: type[HookedBackend]) -> HookedBackend:
    made = kind.__new__(kind)
    made._of_a_copy = True
    return made


class HookedBackend(GradientHooks):
    """The way of a gradient in plain PyTorch: post-accumulate hook → (host sums, in a probe with accumulation) →
    reduction, by the subclass → sum of squares to the sink → freed, in a probe.

    A hook fires for each micro-batch with the gradient accumulated so far, so the norm of the last one stands: that
    of the global batch, before any clipping. In a probe there is nothing to accumulate into on the device. There the
    micro-batches' gradients are summed in host memory (`HostSums`), 4 bytes for each parameter of the layers that
    this rank holds, and only where ``accumulation_steps > 1``.

    Args:
        model: as the training calls it.
        accumulation_steps: micro-batches of a step.
        sharding: None is that of a process alone.
    """

    _of_a_copy = False
    """Whether this is in the hooks of a copied model, which has no optimizer: they do nothing."""

    takes_sparse = False
    """Whether gradients may be sparse, as those of ``nn.Embedding(sparse=True)`` are."""

    def __init__(self, model: nn.Module, accumulation_steps: int, sharding: Sharding | None = None) -> None:
        self.model, self.accumulation_steps = model, accumulation_steps
        self.sharding = sharding or DTensorSharding(Ranks(None, device_of(model)))
        self._probing = self._measuring = False
        self._fired: Counter[tuple[str, int]] = Counter()
        self._sums: HostSums | None = None
        self._on_final: weakref.WeakMethod[Callable[[Unit], None]] | None = None
        self._final: dict[str, set[int]] = {}  # slots of each unit whose gradients are final
        self._unmeasured: tuple[Unit | None, dict[int, torch.Tensor]] = None, {}  # gradients of a layer, by slot
        self._lowest: int | None = None  # of the layers that train
        self._trainable: set[str] = set()
        self._frozen: dict[str, None] = {}  # parameters that someone else has frozen while they trained
        self._looked = False
        self._updated: set[str] = set()  # units that were updated in the backward
        self._forwards = 0  # of this step, those that had a backward and the last one
        self._answered = False  # whether a gradient has come since the last forward
        self._handles: list[RemovableHandle] = []
        self._unstepped: weakref.WeakMethod[Callable[[], None]] | None = None

    def __reduce__(self) -> Any:
        """A copy or pickle of a model has the hooks on its modules, too, and no optimizer."""
        return _inert, (type(self),)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def rest_weights(self) -> None:
        """Weights of layers will rest in host memory (``grass.offload.weights``): says where they are used.

        Raises:
            ConfigError: whoever shards the weights says where they are.
        """
        self.sharding.weights_come_to = device_of(self.model)

    def check_others(self, names: Sequence[str]) -> None:
        """Raises if parameters of the model that someone else trains, ``names``, would not get what they get alone."""
        return

    def check_before_step(self) -> None:
        """
        Raises:
            UnsupportedModel: before the first step, the model has been wrapped or its parameters have been replaced.
        """
        if not self._looked:
            self._looked = True
            refuse_later_wrapping(self.model, self._units)

    def verify(self) -> None:
        """
        Raises:
            GrassError: someone else has frozen what trains. It stays frozen until then.
        """
        self._note_frozen()
        if frozen := list(self._frozen):
            raise GrassError(
                f"{len(frozen)} parameters that GrassOptimizer trains were frozen after it was made "
                f"({shown_names(frozen)}), and each draw freezes and unfreezes layers: set requires_grad=False before "
                "you make the optimizer, or call optimizer.detach(), freeze them, and make another one."
            )

    def _note_frozen(self) -> None:
        units = [unit for unit in self._units if unit.name in self._trainable]
        self._frozen |= {name: None for unit in units for name, param in unit.params if not param.requires_grad}

    def tell_final(self, layer: Callable[[Unit], None]) -> None:
        """Calls ``layer`` within a backward of training, as soon as all gradients of a layer are those of the step.

        The last micro-batch is known by the number of forwards, so there must be one for each; a forward that has no
        backward before the next one does not count. ``layer`` is a method, held weakly: the model outlives the
        optimizer.
        """
        self._on_final = weakref.WeakMethod(layer)
        self._handles.append(self.model.register_forward_pre_hook(self._count_forward))

    def _count_forward(self, *_: object) -> None:
        if self._of_a_copy or self._probing or not torch.is_grad_enabled():
            return
        if self._answered or not self._forwards:
            self._forwards += 1
            self._answered = False

    def _is_final(self, unit: Unit, slots: Iterable[int]) -> None:
        """Gradients of ``unit`` have been reduced, those of the last micro-batch if it is the last."""
        if self._on_final is None or self._probing or unit.index is None:
            return
        if self.accumulation_steps > 1 and self._forwards != self.accumulation_steps:
            return
        final, update = self._final.setdefault(unit.name, set()), self._on_final()
        final.update(slots)
        if len(final) == len(unit.params) and update is not None:
            self._updated.add(unit.name)
            update(unit)

    def attach(self, layers: Sequence[Unit], roles: Sequence[Unit], sink: GradientSink, arrived: Arrived) -> None:
        self._layers, self._units = list(layers), [*layers, *roles]
        self._by_name = {unit.name: unit for unit in self._units}
        self._mark = FiniteMark(roles or layers, self.sharding)
        self._sink, self._arrived = sink, arrived
        self._counted = {unit.name: sum(self.sharding.counts(p) for _, p in unit.params) for unit in self._layers}
        for unit in self._units:
            for slot, (_, param) in enumerate(unit.params):
                hook = GradientHook(self._on_hook, unit.name, slot)
                self._handles.append(param.register_post_accumulate_grad_hook(hook))

    def _on_hook(self, name: str, slot: int, param: nn.Parameter) -> None:
        unit = self._by_name[name]
        if name not in self._trainable:  # unfrozen by someone else
            param.grad = None
            return
        if param.grad is None:  # its output had no part in the loss, and a function such as DDP's handed on as much
            return
        if param.grad.layout != torch.strided and not self.takes_sparse:
            raise GrassError(f"{unit.params[slot][0]} has a sparse gradient: {SPARSE}.")
        if name in self._updated:
            raise GrassError(
                f"gradient_accumulation_steps={self.accumulation_steps}: {name} got one gradient more than that before "
                "optimizer.step(), and grass.offload.update_in_backward has updated it already; pass GrassOptimizer "
                "the number of micro-batches of a step, run the model once for each, or set update_in_backward=False."
            )
        if (unstepped := self._unstepped) is not None:
            self._unstepped = None
            if (tell := unstepped()) is not None:
                tell()
        self._answered = True
        self._arrived(unit.index)
        self._on_gradient(unit, slot, param)

    def set_trainable(self, units: Sequence[Unit], *, probing: bool, measuring: bool) -> None:
        self._note_frozen()
        self._trainable = on = {unit.name for unit in units}
        for unit in self._units:
            for name, param in unit.params:
                param.requires_grad_(unit.name in on and name not in self._frozen)
                if unit.name not in on:
                    param.grad = None
        self._probing, self._measuring = probing, measuring
        self._lowest = min((unit.index for unit in units if unit.index is not None), default=None)
        self._begin_step()
        if not probing or self.accumulation_steps == 1:
            self._sums = None
        elif self._sums is not None:
            self._sums.clear()
        else:
            shard_of = self.sharding.shard_of
            self._sums = HostSums(
                {(u.name, i): shard_of(p).shape for u in self._layers for i, (_, p) in enumerate(u.params)},
                self.sharding.weights_come_to or shard_of(self._layers[0].params[0][1]).device,
            )

    def finish_gradients(self) -> None:
        self._measure_layer()
        if self._probing and self._sums is not None:
            for name, slot in self._sums.pending():
                unit = self._by_name[name]
                self._reduce(unit, slot, unit.params[slot][1], self._sums.take((name, slot)))
        self._begin_step()

    def expect_step(self, unstepped: Callable[[], None]) -> None:
        """Calls ``unstepped``, a method that is held weakly, if a gradient comes before `end_step` or `restart`."""
        self._unstepped = weakref.WeakMethod(unstepped)

    def end_step(self) -> None:
        """The step has ended: nothing of a probe is left in ``.grad``."""
        self._unstepped = None
        if self._probing:
            self._mark.hide()

    def restart(self) -> None:
        self.end_step()
        if self._sums is not None:
            self._sums.clear()
        # A forward may wait for its backward: many loops call zero_grad() between the two.
        waiting = 1 if self._forwards and not self._answered else 0
        self._begin_step()
        self._forwards = waiting

    def _begin_step(self) -> None:
        self._fired.clear()
        self._final.clear()
        self._updated.clear()
        self._unmeasured = None, {}
        self._forwards, self._answered = 0, False

    def _on_gradient(self, unit: Unit, slot: int, param: nn.Parameter) -> None:
        assert param.grad is not None
        grad = self.sharding.local(param.grad)
        if self._probing:
            key = (unit.name, slot)
            self._fired[key] += 1
            if self._fired[key] > self.accumulation_steps:
                raise GrassError(
                    f"gradient_accumulation_steps={self.accumulation_steps}: the probe saw one backward more than "
                    f"that before optimizer.step(), or one that gave {unit.name} two gradients. {TWICE} Otherwise give "
                    "the number of micro-batches of a step to GrassOptimizer, or with Accelerate to "
                    "Accelerator(gradient_accumulation_steps=...) and use accelerator.accumulate, or call "
                    "optimizer.skip_step() where a batch is dropped after its backward."
                )
            if self._sums is not None:
                param.grad = None
                whole = self._sums.add(key, grad, last=self._fired[key] == self.accumulation_steps)
                if whole is None:
                    return
                grad = whole
        self._reduce(unit, slot, param, grad)

    def _reduce(self, unit: Unit, slot: int, param: nn.Parameter, grad: torch.Tensor) -> None:
        """Reduces ``grad`` over the ranks and delivers it; here it has been reduced before the hook fired."""
        counts = self._measuring and self.sharding.counts(param)
        if self._probing:
            [norm] = norms([grad])
            if counts and unit.index is not None:
                self._sink(unit.index, slot, norm)
            param.grad = None
            self._mark.show(norm)
        else:
            self._measure(unit, slot, grad, counts=counts)
        self._is_final(unit, (slot,))

    def _measure(self, unit: Unit, slot: int, grad: torch.Tensor, *, counts: bool) -> None:
        """Has the norms of a layer taken by one operator: when all its gradients are there, or another unit's come.

        Those of the lowest layer are taken one by one, since nothing may come after them before somebody clips.
        """
        if self._unmeasured[0] is not unit:
            self._measure_layer()
            self._unmeasured = unit, {}
        if unit.index is None:
            return
        if counts:
            self._unmeasured[1][slot] = grad
        if unit.index == self._lowest or len(self._unmeasured[1]) == self._counted[unit.name]:
            self._measure_layer()

    def _measure_layer(self) -> None:
        unit, grads = self._unmeasured
        self._unmeasured = None, {}
        if unit is not None and unit.index is not None and grads:
            for slot, norm in zip(grads, norms(list(grads.values())), strict=True):
                self._sink(unit.index, slot, norm)
