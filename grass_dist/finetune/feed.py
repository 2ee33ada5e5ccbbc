"""Gives each step the micro-batches of its rank on its device: read, collated and copied before the step begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data.ahead import Ahead
from grass_dist.finetune.data.batches import Example, MicroBatches
from grass_dist.finetune.data.loading import Data
from grass_dist.finetune.tasks.base import Batch, Task
from grass_dist.job.world import World
from grass_dist.record.speed import Positions, positions_of


@dataclass(frozen=True, slots=True)
class StepData:
    """The micro-batches of a step of one rank."""

    batches: list[Batch]
    """On the device of the rank."""
    positions: Positions
    """Of this rank."""
    arrived: Any = None
    """On a GPU, the event after which the copies have ended."""


class Feed:
    """The data of the steps from ``first`` to the last, in their order.

    What a step gets does not depend on how many steps are prepared ahead (`data.prefetch_steps`), so a run that goes on
    at any step continues exactly. On a GPU the tensors are pinned, and a separate stream copies them.
    """

    def __init__(self, config: RunConfig, data: Data, task: Task, world: World, first: int) -> None:
        sizes = config.train.model_dump(include={"seed", "global_batch_size", "micro_batch_size"})
        ranks = {"rank": world.rank, "world_size": world.size}
        micro = MicroBatches(data.train, **sizes, **ranks, start_step=first - 1, by_length=config.data.group_by_length)
        self._micro: Iterator[list[list[Example]]] = iter(micro)
        self._task, self._world = task, world
        # A row of a stream, or a file, is read by one rank alone, and may be one that cannot be used.
        self._may_fail = config.data.streaming or task.reads_files
        self._stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
        self._ahead = Ahead(self._prepare, first, config.train.max_steps, config.data.prefetch_steps)

    def take(self) -> StepData:
        """Returns the data of the next step, which the stream that computes may use.

        Raises:
            ConfigError: on every rank: a row cannot be used on one of them.
        """
        found = self._world.together(self._ahead.take) if self._may_fail else self._ahead.take()
        if found.arrived is not None:
            compute = torch.cuda.current_stream(self._world.device)
            compute.wait_event(found.arrived)
            for batch in found.batches:
                for tensor in batch.values():
                    tensor.record_stream(compute)  # its memory is another stream's
        return found

    def settle(self) -> None:
        """Waits until nothing is being prepared: tokenizers and tasks are not made for two threads at a time."""
        self._ahead.settle()

    def close(self) -> None:
        self._ahead.close()

    def _prepare(self, step: int) -> StepData:
        made = [self._collated(step, number, micro) for number, micro in enumerate(next(self._micro))]
        batches, arrived = self._on_device(made)
        return StepData(batches, positions_of(made), arrived)

    def _collated(self, step: int, number: int, micro: Sequence[Example]) -> Batch:
        first = (number * self._world.size + self._world.rank) * len(micro)  # place in the global batch: see `share`
        return self._task.collate([self._task.vary(each, step, first + at) for at, each in enumerate(micro)])

    def _on_device(self, made: list[Batch]) -> tuple[list[Batch], Any]:
        """Copies micro-batches to the device, and returns with them the event after which they are there."""
        device = self._world.device
        if self._stream is None:
            return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in made], None
        with torch.cuda.device(device), torch.cuda.stream(self._stream):
            batches = [{name: t.pin_memory().to(device, non_blocking=True) for name, t in b.items()} for b in made]
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return batches, arrived
