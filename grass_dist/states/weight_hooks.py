"""The hooks on modules by which `HostWeights` knows which layer is used next."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from grass_dist.errors import GrassError
from grass_dist.states.layer_weights import LayerWeights
from grass_dist.states.weights import HostWeights

log = logging.getLogger("grass_dist")

DEEPEST = 6
"""Levels of containers and objects within an output in which tensors are looked for."""


class LayerHooks:
    """The hooks of one layer.

    The backward of a layer is known by its outputs, and by those of the modules in it that have weights, so that a
    gradient which comes in at the side (a loss on what is inside a layer) is seen, too.
    """

    def __init__(self, weights: HostWeights, n: int, layer: LayerWeights, device: torch.device) -> None:
        self._weights: HostWeights | None = weights
        self._n, self._device = n, device
        self._full = any(param.dtype == torch.float32 for _, param in layer.params)

    def __reduce__(self) -> Any:
        """A copy or pickle of a model has the hooks on its modules, too, and no optimizer."""
        return _inert, (LayerHooks,)

    def before(self, *_: Any) -> None:
        if (weights := self._weights) is None:
            return
        if torch.compiler.is_compiling():
            raise GrassError(f"grass.offload.weights='host': {MOVES}; compile nothing, or use weights='resident'.")
        if self._full and torch.is_grad_enabled() and torch.is_autocast_enabled(self._device.type):
            _say_autocast()
        weights.forward_begins(self._n)

    def after(self, _module: Any, _args: Any, output: Any) -> None:
        if self._weights is not None:
            came = self._watch(output) if torch.is_grad_enabled() else None
            self._weights.forward_ends(self._n, differentiable=came)

    def inside(self, _module: Any, _args: Any, output: Any) -> None:
        if self._weights is not None and torch.is_grad_enabled():
            self._watch(output)

    def _watch(self, output: Any) -> bool:
        """Hooks into the gradients of an output; says whether there may be any."""
        assert self._weights is not None
        found = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        if found:
            begins = partial(_begins, self._weights, self._n, self._weights.epoch)
            for tensor in found:
                tensor.register_hook(begins)
        return bool(found)


class AroundHooks:
    """The hooks of a module around layers, of which ``first`` is the first."""

    def __init__(self, weights: HostWeights, first: int) -> None:
        self._weights: HostWeights | None = weights
        self._first = first

    def __reduce__(self) -> Any:
        return _inert, (AroundHooks,)

    def before(self, *_: Any) -> None:
        if self._weights is not None:
            self._weights.pass_begins(self._first)

    def after(self, *_: Any) -> None:
        if self._weights is not None:
            self._weights.pass_ends()


MOVES = "torch.compile is in use, and the weights of a layer are at another place while it runs"


def attach(
    model: nn.Module, weights: HostWeights, layers: list[LayerWeights], device: torch.device
) -> Callable[[], None]:
    """Puts the hooks on ``model``; gives what takes them off."""
    handles: list[RemovableHandle] = []
    modules = dict(model.named_modules(remove_duplicate=False))
    for n, layer in enumerate(layers):
        hooks, module = LayerHooks(weights, n, layer, device), modules[layer.name]
        handles.append(module.register_forward_pre_hook(hooks.before, prepend=True))
        handles.append(module.register_forward_hook(hooks.after, always_call=True))
        owners = dict.fromkeys(name.rpartition(".")[0] for name, _ in layer.params)
        for owner in owners:
            if modules[owner] is not module:
                handles.append(modules[owner].register_forward_hook(hooks.inside))
    around: dict[str, int] = {}
    for n, layer in enumerate(layers):
        parts = layer.name.split(".")
        for end in range(len(parts)):
            around.setdefault(".".join(parts[:end]), n)
    for name, first in around.items():
        if not isinstance(modules[name], nn.ModuleList | nn.ModuleDict):  # which have no forward
            hooks = AroundHooks(weights, first)
            handles.append(modules[name].register_forward_pre_hook(hooks.before, prepend=True))
            handles.append(modules[name].register_forward_hook(hooks.after, always_call=True))

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return detach


def tensors_in(output: Any, deepest: int = DEEPEST) -> Iterator[torch.Tensor]:
    """The tensors of what a module returns: in containers, dataclasses and plain objects."""
    if torch.is_tensor(output):
        yield output
    elif deepest and isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value, deepest - 1)
    elif deepest and isinstance(output, list | tuple | set):
        for value in output:
            yield from tensors_in(value, deepest - 1)
    elif deepest and dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from tensors_in(getattr(output, field.name, None), deepest - 1)
    elif deepest and hasattr(output, "__dict__") and not isinstance(output, nn.Module | type):
        for value in vars(output).values():
            yield from tensors_in(value, deepest - 1)


def _begins(weights: HostWeights, n: int, epoch: int, _: torch.Tensor) -> None:
    weights.backward_begins(n, epoch)


def _inert(kind: type[LayerHooks | AroundHooks]) -> LayerHooks | AroundHooks:
    made = object.__new__(kind)
    made._weights = None
    return made


_told: list[bool] = []


def _say_autocast() -> None:
    if not _told:
        _told.append(True)
        log.warning(
            "Under torch.autocast each layer copies its fp32 weights to 16 bit and keeps the copies until its "
            "backward, also with grass.offload.weights='host': use activation checkpointing, which makes them one "
            "layer at a time, or load the model in bfloat16."
        )
