"""What the program asks of a parallelism: `run_torch` and `run_deepspeed` are the two that answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from grass_dist.checkpoint.pieces import Holdings
from grass_dist.events import Observer
from grass_dist.method.controller import GrassController
from grass_dist.model.discovery import LayerMap

Batch = dict[str, torch.Tensor]
"""A micro-batch on this rank's device, as `collate` makes it."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """What an optimizer step did."""

    total: torch.Tensor
    """Summed loss of this rank's micro-batches, unscaled."""
    norm: float | None
    """Of the gradients, before clipping; None in the probe and without clipping."""
    applied: bool
    """Whether the step counts; not if a loss or gradient was not finite in training. The same on all ranks."""


class Run(Protocol):
    """A model on its ranks that trains: what there is from the first step to the saved model."""

    grass: GrassController

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Whose groups hold the learning rates; a scheduler goes on it."""
        ...

    @property
    def model(self) -> nn.Module:
        """What a forward calls: on all ranks equally often."""
        ...

    def step(self, batches: Sequence[Batch], scale: torch.Tensor) -> Stepped:
        """One optimizer step, clipping included; on all ranks alike it updates nothing if a gradient is not finite.

        Args:
            batches: all micro-batches of this rank.
            scale: factor on their summed loss, under which the mean over the ranks is that of the global batch.
        """
        ...

    def holdings(self) -> Holdings:
        """What the ranks hold: what a checkpoint is taken of, and put into."""
        ...

    @property
    def state_bytes(self) -> int:
        """Device memory of this rank that optimizer states have, slots that wait for one included."""
        ...

    @property
    def host_state_bytes(self) -> int:
        """Optimizer state that rests in this rank's host memory."""
        ...

    def save(self, tokenizer: Any, folder: Path) -> None:
        """Writes the model as an ordinary Hugging Face folder. Called on every rank; one writes."""
        ...

    def close(self) -> None:
        """Lets go of model and states, so that their memory is free; nothing else is called after it."""
        ...


class Parallelism(Protocol):
    """How the ranks share one fine-tune; made, and its settings checked, before anything is loaded."""

    name: str
    """For the record, e.g. "fsdp2" or "DeepSpeed ZeRO-2"."""

    def load(self) -> nn.Module:
        """The pretrained model. Called on every rank."""
        ...

    def answer(self, model: nn.Module, tokenizer: Any, prompt_ids: list[int]) -> str:
        """The answer of the model as it was loaded, on its device. Called on one rank."""
        ...

    def start(self, model: nn.Module, layers: LayerMap, observers: Sequence[Observer]) -> Run:
        """Puts the model on its ranks and the method on top. Called on every rank."""
        ...
