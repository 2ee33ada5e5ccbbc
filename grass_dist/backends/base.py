"""The hooks into gradients that the backends of plain PyTorch share."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from grass_dist.backends.host_sums import HostSums
from grass_dist.errors import GrassError
from grass_dist.method.interfaces import Arrived, GradientHooks, GradientSink
from grass_dist.method.measurement import sum_of_squares
from grass_dist.model.discovery import Unit
from grass_dist.model.sharding import Sharding
from grass_dist.model.units import GradientHook
from grass_dist.ranks import Ranks


def device_of(model: nn.Module) -> torch.device:
    """The device that ``model`` computes on, as far as its parameters tell: a GPU, if one of them is on one."""
    devices = {p.device for p in model.parameters()}
    return next((device for device in sorted(devices, key=str) if device.type == "cuda"), torch.device("cpu"))


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

    def __init__(self, model: nn.Module, accumulation_steps: int, sharding: Sharding | None = None) -> None:
        self.model, self.accumulation_steps = model, accumulation_steps
        self.sharding = sharding or Sharding(Ranks(None, device_of(model)))
        self._probing = self._measuring = False
        self._fired: Counter[tuple[str, int]] = Counter()
        self._sums: HostSums | None = None
        self._on_final: weakref.WeakMethod[Callable[[Unit], None]] | None = None
        self._final: dict[str, set[int]] = {}  # slots of each unit whose gradients are final
        self._forwards = 0
        self._handles: list[RemovableHandle] = []

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def tell_final(self, layer: Callable[[Unit], None]) -> None:
        """Calls ``layer`` within a backward of training, as soon as all gradients of a layer are those of the step.

        The last micro-batch is known by the number of forwards, so there must be one for each. ``layer`` is a method,
        held weakly: the model outlives the optimizer.
        """
        self._on_final = weakref.WeakMethod(layer)
        self._handles.append(self.model.register_forward_pre_hook(self._count_forward))

    def _count_forward(self, *_: object) -> None:
        if self._probing or not torch.is_grad_enabled():
            return
        self._forwards += 1
        if self._forwards > self.accumulation_steps:
            raise GrassError(
                f"gradient_accumulation_steps={self.accumulation_steps}: the model ran once more than that before "
                "optimizer.step(), and grass.offload.update_in_backward has updated layers; pass GrassOptimizer the "
                "number of micro-batches of a step, run the model once for each, or set update_in_backward=False."
            )

    def _is_final(self, unit: Unit, slots: Iterable[int]) -> None:
        """Gradients of ``unit`` have been reduced, those of the last micro-batch if it is the last."""
        if self._on_final is None or self._probing or unit.index is None:
            return
        if self._forwards != self.accumulation_steps:
            return
        final, update = self._final.setdefault(unit.name, set()), self._on_final()
        final.update(slots)
        if len(final) == len(unit.params) and update is not None:
            update(unit)

    def attach(self, layers: Sequence[Unit], roles: Sequence[Unit], sink: GradientSink, arrived: Arrived) -> None:
        self._layers, self._units = list(layers), [*layers, *roles]
        self._by_name = {unit.name: unit for unit in self._units}
        self._sink, self._arrived = sink, arrived
        for unit in self._units:
            for slot, (_, param) in enumerate(unit.params):
                hook = GradientHook(self._on_hook, unit.name, slot)
                self._handles.append(param.register_post_accumulate_grad_hook(hook))

    def _on_hook(self, name: str, slot: int, param: nn.Parameter) -> None:
        unit = self._by_name[name]
        self._arrived(unit.index)
        self._on_gradient(unit, slot, param)

    def set_trainable(self, units: Sequence[Unit], *, probing: bool, measuring: bool) -> None:
        on = {unit.name for unit in units}
        for unit in self._units:
            for _, param in unit.params:
                param.requires_grad_(unit.name in on)
                if unit.name not in on:
                    param.grad = None
        self._probing, self._measuring = probing, measuring
        self._begin_step()
        if not probing or self.accumulation_steps == 1:
            self._sums = None
        elif self._sums is not None:
            self._sums.clear()
        else:
            shard_of = self.sharding.shard_of
            self._sums = HostSums(
                {(u.name, i): shard_of(p).shape for u in self._layers for i, (_, p) in enumerate(u.params)},
                shard_of(self._layers[0].params[0][1]).device,
            )

    def finish_gradients(self) -> None:
        if self._probing and self._sums is not None:
            for name, slot in self._sums.pending():
                unit = self._by_name[name]
                self._reduce(unit, slot, unit.params[slot][1], self._sums.take((name, slot)))
        self._begin_step()

    def _begin_step(self) -> None:
        self._fired.clear()
        self._final.clear()
        self._forwards = 0

    def _on_gradient(self, unit: Unit, slot: int, param: nn.Parameter) -> None:
        assert param.grad is not None
        grad = self.sharding.local(param.grad)
        if self._probing:
            key = (unit.name, slot)
            self._fired[key] += 1
            if self._fired[key] > self.accumulation_steps:
                raise GrassError(
                    f"gradient_accumulation_steps={self.accumulation_steps}: the probe saw one backward more than "
                    "that before optimizer.step(); pass GrassOptimizer the number of micro-batches of a step."
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
        if self._measuring and unit.index is not None and self.sharding.counts(param):
            self._sink(unit.index, slot, sum_of_squares(grad))
        if self._probing:
            param.grad = None
        self._is_final(unit, (slot,))
