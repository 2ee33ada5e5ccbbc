"""The interface of a parallelism to the program; `run_torch` and `run_deepspeed` implement it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from grass_dist.checkpoint.pieces import Holdings
from grass_dist.events import Observer
from grass_dist.finetune.lanes import Lanes
from grass_dist.finetune.tasks.base import Batch, Task
from grass_dist.method.controller import GrassController
from grass_dist.model.discovery import LayerMap

Loss = Callable[[nn.Module, Batch], torch.Tensor]
"""The loss of a micro-batch on this rank's device, summed over its targets: `Task.loss`."""


@dataclass(frozen=True, slots=True)
class Told:
    """What the host is told of a step, the same on all ranks."""

    total: float
    """The summed loss of all ranks' micro-batches, unscaled."""
    norm: float | None
    """The norm of the gradients, before clipping; None in the probe and without clipping."""
    tokens: int
    """The number of targets of the global batch."""
    flags: list[float]
    """Sums over the ranks of the flags that each gave."""


Tell = Callable[[torch.Tensor, torch.Tensor | float | None], Told]
"""Takes the summed loss of this rank's micro-batches, an fp64 scalar on the device, and the norm of the gradients.

Called once in a step, by all ranks. The host waits for the device there, and in no other place of a step."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """The result of an optimizer step."""

    told: Told
    applied: bool
    """True if the step counts. It does not if a loss or gradient was not finite in training. Equal on all ranks."""


class Run(Protocol):
    """A model that trains on its ranks, from the first step to the saved model."""

    grass: GrassController
    lanes: Lanes
    """Times of the last step: "backward" (with the forward), and "update" (with clipping and a switch)."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer whose groups hold the learning rates, for a scheduler."""
        ...

    @property
    def model(self) -> nn.Module:
        """The module that a forward calls; all ranks call it equally often."""
        ...

    def step(self, batches: Sequence[Batch], scale: torch.Tensor, loss: Loss, tell: Tell) -> Stepped:
        """Takes one optimizer step with clipping. If a gradient is not finite, no rank updates.

        Args:
            batches: all micro-batches of this rank, on its device.
            scale: the factor on their summed loss that makes the mean over the ranks that of the global batch.
            loss: of the task.
            tell: see `Tell`.
        """
        ...

    def holdings(self) -> Holdings:
        """The weights and states of the ranks, which checkpoints save and load."""
        ...

    @property
    def state_bytes(self) -> int:
        """Bytes of device memory of this rank for optimizer states, with free slots."""
        ...

    @property
    def host_state_bytes(self) -> int:
        """Bytes of optimizer state in this rank's host memory."""
        ...

    def save(self, tokenizer: Any, folder: Path) -> None:
        """Writes the model as an ordinary Hugging Face folder. Called on every rank; one writes."""
        ...

    def close(self) -> None:
        """Frees the memory of model and states; nothing else is called after it."""
        ...


class Parallelism(Protocol):
    """The way in which the ranks share one fine-tune. Its settings are checked before anything is loaded."""

    name: str
    """The name for the record, e.g. "fsdp2" or "DeepSpeed ZeRO-2"."""

    def load(self, task: Task) -> nn.Module:
        """Loads the pretrained model of a task. Called on every rank."""
        ...

    def answer(self, task: Task, model: nn.Module, prompt: str) -> str:
        """Returns what the model, as it was loaded, says to a prompt of the task. Called on one rank."""
        ...

    def start(self, model: nn.Module, layers: LayerMap, observers: Sequence[Observer]) -> Run:
        """Wraps the model for the ranks and attaches the method. Called on every rank."""
        ...
