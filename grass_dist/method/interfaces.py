"""What the controller asks of others: of the hooks into gradients, and of the states of the layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from grass_dist.events import Traffic
from grass_dist.model.discovery import Unit
from grass_dist.model.sharding import Sharding
from grass_dist.ranks import Ranks

GradientSink = Callable[[int, int, torch.Tensor], None]
"""(layer index, slot below the layer's number of parameters, norm of this rank's part of its gradient: fp64 scalar on
the device). A slot that is given twice in a step keeps the later value."""

Arrived = Callable[[int | None], None]
"""Told whenever a gradient has been made: index of the layer whose parameter it is of, None for a role."""


class GradientHooks(ABC):
    """How one way of wrapping a model reduces gradients.

    The controller calls `attach` once, `set_trainable` whenever the trainable layers change, and `finish_gradients` at
    the end of every optimizer step (and before it, if gradients are clipped). Between them the hooks report each
    layer's reduced gradient to the sink, and in a probe free it at once.
    """

    name: str
    """The way of wrapping, as checkpoints and reports name it."""
    sharding: Sharding
    measures_alike: bool = False
    """Whether each rank delivers the norms of the whole gradients, of which its share is 1/N, so that the ranks'
    measurements are equal; else those of its own shards."""
    bytes_reduced: int = 0
    """Gradient bytes that this rank has put into reduce-scatter and all-reduce since the start."""

    @property
    def ranks(self) -> Ranks:
        """The ranks that train one model together."""
        return self.sharding.ranks

    @abstractmethod
    def attach(self, layers: Sequence[Unit], roles: Sequence[Unit], sink: GradientSink, arrived: Arrived) -> None:
        """Hooks into the gradients of ``layers`` and ``roles``."""

    @abstractmethod
    def detach(self) -> None:
        """Takes all hooks off the model; nothing else is called after it."""

    @abstractmethod
    def set_trainable(self, units: Sequence[Unit], *, probing: bool, measuring: bool) -> None:
        """Lets ``units`` have gradients and nothing else; takes effect with the next forward.

        Raises:
            GrassError: this rank lacks the host memory for a probe; the other ranks do not know that yet.
        """

    @abstractmethod
    def finish_gradients(self) -> None:
        """Makes every gradient of the global batch final, before it is clipped or used."""

    def restart(self) -> None:
        """Starts the step anew: what was made of gradients since the last one is forgotten, on all ranks alike.

        A forward whose backward has not begun stays valid.
        """
        return

    def check_before_step(self) -> None:
        """Raises if gradients may have been clipped in part since the backward; called first in a step."""
        return

    def before_read(self) -> None:
        """Makes the weights of the model safe to read; called on all ranks before whole parameters are gathered."""
        return

    def verify(self) -> None:
        """Raises if what the model would train is no longer what `set_trainable` said; called before each draw."""
        return


class LayerStates(Protocol):
    """The states of all layers on this rank. Layers are named by index; calls come in the same order on all ranks."""

    def expect(self, layers: Sequence[int], steps: int) -> None:
        """``layers`` will train after ``steps`` more optimizer steps; told after each step once they are drawn."""
        ...

    def leave(self, active: Sequence[int]) -> None:
        """Layers other than ``active`` train no more; called before the model is told."""
        ...

    def enter(self, active: Sequence[int]) -> None:
        """``active`` train from the next step on; called after the model was told."""
        ...

    def harvest(self) -> Traffic:
        """What moving states has cost this rank since the start."""
        ...
