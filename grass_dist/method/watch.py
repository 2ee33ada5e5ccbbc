"""Finds active layers that get no gradient, in the first step of a probe and of each round.

Such a layer is drawn, and does not learn: its importance becomes 0, and weight decay alone moves it. The usual reason
is reentrant activation checkpointing: it makes a graph of a layer only if the layer's input needs a gradient, which it
does not above frozen embeddings. So such a layer runs without a graph, in a forward that is to have a backward. A layer
that the model leaves out in a batch (stochastic depth) is no mistake.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from grass_dist.errors import GrassError
from grass_dist.model.compiled import is_compiled, is_wrapper_of_compile
from grass_dist.model.discovery import Unit

WAYS_OUT = (
    "This is what reentrant activation checkpointing does above frozen embeddings: use checkpointing with "
    "use_reentrant=False (of DeepSpeed's, non_reentrant_checkpoint), or call model.enable_input_require_grads()."
)


class GradientWatch:
    """Looks at one step at a time: `begin`, then what the hooks see, then `end`.

    Hooks on the modules exist in that step only. They are the same objects each time, and modules that `torch.compile`
    has compiled get none. Where a layer is compiled, whether it ran is not known. It is taken for cut off if no
    layer has got a gradient in two of these steps, one after the other; else for left out.

    Nothing here communicates: layers that are cut off are the same on all ranks, and each of them raises.

    Args:
        model: what a forward of the training calls.
        layers: that may be active.

    Attributes:
        unused: for each layer, how many of the steps that were looked at left it out of the forward.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Unit]) -> None:
        self._model, self._layers = model, layers
        modules = dict(model.named_modules(remove_duplicate=False))
        self._ways = [_way_to(modules, unit.name) for unit in layers]
        self._owners = [_owners_of(modules, unit) for unit in layers]
        self._hooks = [_Ran(self, index) for index in range(len(layers))]
        self._watched: tuple[int, ...] | None = None
        self._handles: list[RemovableHandle] = []
        self._seen: set[int | None] = set()  # layers with a gradient; None: a role
        self._ran: set[int] = set()  # layers that have run with a graph
        self._without: set[int] = set()  # layers that have run without one
        self._known: set[int] = set()  # layers of which is known whether they ran
        self._blind = 0  # steps looked at in which no layer has got a gradient, up to now
        self._within: bool | None = None  # a forward of the model: whether it is to have a backward
        self._stale = False  # the step began anew after a forward that may still have its backward
        self.unused: Counter[int] = Counter()

    def __reduce__(self) -> Any:
        """A copy or pickle of a model has hooks of ours, too, and no optimizer: they do nothing."""
        return GradientWatch, (nn.Module(), ())

    def begin(self, layers: Sequence[int]) -> None:
        """Looks at the next step, in which ``layers`` are active."""
        self.close()
        self._watched = tuple(layers)
        if not is_compiled(self._model):
            self._handles += [
                self._model.register_forward_pre_hook(self._before_forward),
                self._model.register_forward_hook(self._after_forward, always_call=True),
            ]
        for layer in layers:
            owners = self._owners[layer]
            if not _in_a_graph(self._ways[layer]) and not any(map(is_compiled, owners)):
                self._handles += [owner.register_forward_pre_hook(self._hooks[layer]) for owner in owners]
                self._known.add(layer)

    def arrived(self, layer: int | None) -> None:
        """A gradient has arrived: that of a parameter of ``layer``, or of a role for None."""
        if self._watched is not None:
            self._seen.add(layer)
            self._stale = False

    def end(self, step: int) -> list[tuple[int, bool]]:
        """All gradients of the step have arrived.

        Does nothing if none is looked at, or if there was no forward and no gradient in it.

        Args:
            step: optimizer steps that were done before, for the sentence.

        Returns:
            The active layers that have no gradient and are counted for the first time, each with whether it is known
            that the model has left it out.

        Raises:
            GrassError: active layers have run without a graph and have no gradient, or none of those that have run has.
        """
        if self._watched is None or not (self._seen or self._ran or self._without):
            return []
        missing = [layer for layer in self._watched if layer not in self._seen]
        none = len(missing) == len(self._watched)
        self._blind = self._blind + 1 if none else 0
        cut_off = [layer for layer in missing if self._is_cut_off(layer, none=none)]
        left_out = [(layer, layer in self._known) for layer in missing if layer not in cut_off]
        self.close()
        if cut_off:
            raise self._error(cut_off, f"have no gradient after the backward of step {step + 1}")
        new = [(layer, known) for layer, known in left_out if not self.unused[layer]]
        self.unused.update(layer for layer, _ in left_out)
        return new

    def restart(self) -> None:
        """The step begins anew: what was seen of it is forgotten.

        If no gradient has come yet, the backward of the last forward may follow, or another forward.
        """
        self._stale = not self._seen
        if self._seen:
            self._forget()

    def _forget(self) -> None:
        self._seen.clear()
        self._ran.clear()
        self._without.clear()

    def close(self) -> None:
        """Looks at no step any more, until `begin`."""
        for handle in self._handles:
            handle.remove()
        self._watched = self._within = None
        self._stale = False
        self._handles.clear()
        self._forget()
        self._known.clear()

    def _is_cut_off(self, layer: int, *, none: bool) -> bool:
        """Whether a layer without a gradient was cut off; ``none`` says that no active layer has one."""
        if layer not in self._known:
            return none and self._blind > 1
        return (none and layer in self._ran) or (layer in self._without and layer not in self._ran)

    def note(self, layer: int, module: nn.Module) -> None:
        """A module of ``layer`` runs. Reentrant checkpointing runs it without a graph at first."""
        if self._watched is None:
            return
        if torch.is_grad_enabled():
            self._ran.add(layer)
        elif module.training if self._within is None else self._within:
            self._without.add(layer)

    def _before_forward(self, *_: object) -> None:
        self._within = torch.is_grad_enabled()
        if self._within and self._stale:
            self._stale = False
            self._forget()

    def _after_forward(self, model: nn.Module, _: object, output: object) -> None:
        """A backward would raise torch's own error, or DeepSpeed's, if nothing of ``output`` needs a gradient."""
        within, self._within = self._within, None
        ran = sorted(self._ran | self._without)
        seen = bool(ran) or self._known.issuperset(self._watched or ())
        if self._watched is None or output is None or not (within and seen):
            return
        if not (model.training or self._without - self._ran):
            return
        tensors = [tensor for tensor in _tensors(output) if tensor.is_floating_point()]
        if tensors and not any(tensor.requires_grad for tensor in tensors):
            watched = self._watched
            self.close()
            if not ran:
                raise GrassError(
                    f"The model has run none of its {len(watched)} active layers ({self._shown(watched)}) on this "
                    "batch, so nothing that it returns has a gradient. A batch of text, say, does not use the layers "
                    'of a vision tower: train the stack that the batches use, by layers="FQN of the stack".'
                )
            raise self._error(ran, "have run, and nothing that the model returns depends on them")

    def _error(self, layers: Sequence[int], problem: str) -> GrassError:
        return GrassError(
            f"{len(layers)} active layers ({self._shown(layers)}) {problem}, so they would not learn. {WAYS_OUT}"
        )

    def _shown(self, layers: Sequence[int]) -> str:
        names = [self._layers[layer].name for layer in layers]
        return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ... {names[-1]}"


class _Ran:
    """The hook on the modules of a layer: one object for the whole run."""

    def __init__(self, watch: GradientWatch, layer: int) -> None:
        self._watch, self._layer = watch, layer

    def __call__(self, module: nn.Module, *_: object) -> None:
        self._watch.note(self._layer, module)


def _way_to(modules: Mapping[str, nn.Module], name: str) -> list[nn.Module]:
    """The modules from the outermost one to ``name``."""
    parts = name.split(".")
    return [modules[".".join(parts[:count])] for count in range(len(parts) + 1)]


def _owners_of(modules: Mapping[str, nn.Module], unit: Unit) -> list[nn.Module]:
    """The modules that hold the parameters of a layer themselves, which run within what checkpoints it."""
    return list(
        {id(module): module for name, _ in unit.params if (module := modules[name.rpartition(".")[0]])}.values()
    )


def _in_a_graph(way: Sequence[nn.Module]) -> bool:
    """Whether hooks on the last module would become part of a compiled graph: its own, or one of a module above."""
    wrapped = any(map(is_wrapper_of_compile, way[:-1]))
    return wrapped or any(map(is_compiled, way))


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(output):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
