"""Runs the steps of a fine-tune: an optimizer step over a rank's micro-batches, and an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from grass_dist.finetune.data.batches import Example
from grass_dist.finetune.feed import StepData
from grass_dist.finetune.parallel import Run, Told
from grass_dist.finetune.tasks.base import Task
from grass_dist.job.world import World
from grass_dist.record.speed import Positions


@dataclass(frozen=True, slots=True)
class StepResult:
    """Holds the result of a step on the global batch."""

    loss: float
    """Mean loss over all targets."""
    grad_norm: float | None
    """Norm of the gradients before clipping; None in the probe and without clipping."""
    tokens: int
    """Number of targets: tokens, or rows that have a label as a whole."""
    applied: bool
    """True if anything was updated: nothing is where a loss or gradient is not finite."""
    positions: Positions
    """Of all ranks."""
    flags: list[float]
    """Sums over the ranks of the flags that each gave."""

    @property
    def bad(self) -> bool:
        return not (self.applied and math.isfinite(self.loss))


def train_step(
    run: Run,
    data: StepData,
    task: Task,
    world: World,
    step: int,
    flags: Callable[[], Sequence[float]] = tuple,
) -> StepResult:
    """Takes one optimizer step over the micro-batches of this rank.

    The loss is the mean over the targets of the *global* batch, so it does not depend on how the batch was cut
    into ranks and micro-batches. Besides the gradients, an all-reduce of 8 bytes goes over the wire, and one of 8 bytes
    for the loss, for each of three counts of positions, and for each flag. The host waits for the device once, for the
    loss, the norm and all that is counted.

    Args:
        data: of this rank, as `Feed` gives it.
        step: its number, from 1.
        flags: gives after the backward the numbers that the ranks add up.
    """
    tokens = torch.stack([task.targets(batch) for batch in data.batches]).sum()
    with world.during(f"the sum of the tokens of step {step}"):
        dist.all_reduce(tokens)

    def tell(total: torch.Tensor, norm: torch.Tensor | float | None) -> Told:
        with world.during(f"the sum of the losses of step {step}"):
            counted = torch.tensor([*astuple(data.positions), *flags()], dtype=torch.float64)
            sums = torch.cat([total.reshape(1), sent(counted, world.device)])
            dist.all_reduce(sums)
            whole = [tokens.reshape(1), *([norm.reshape(1)] if torch.is_tensor(norm) else [])]
            loss, *rest = torch.cat([sums, *(value.to(sums) for value in whole)]).tolist()
        if torch.is_tensor(norm):
            norm = float(rest.pop())
        return Told(loss, norm, int(rest.pop()), rest)

    with world.during(f"the forward, backward and update of step {step}"):
        # The backends average over the ranks, so each rank's sum counts world.size-fold.
        stepped = run.step(data.batches, world.size / tokens.clamp(min=1), task.loss, tell)
    told = stepped.told
    positions, flagged = Positions(*told.flags[:3]), told.flags[3:]
    return StepResult(told.total / max(told.tokens, 1), told.norm, told.tokens, stepped.applied, positions, flagged)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on ``device``, through pinned memory on a GPU: the host does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Iterable[Example],
    micro_batch_size: int,
    task: Task,
    world: World,
    leaves: Callable[[], bool],
) -> dict[str, float] | None:
    """Computes the mean loss over the targets of ``examples``, which the ranks share, and the metrics of the task.

    Args:
        leaves: says on every rank, before each micro-batch, whether it ends here; the same on all.

    Returns:
        The ``loss`` and the metrics, or None if it has been left before its end.
    """
    examples = [task.vary(example, 0, place) for place, example in enumerate(examples)]
    micro = [examples[at : at + micro_batch_size] for at in range(0, len(examples), micro_batch_size)]
    sums: list[float] = []
    training = model.training
    model.eval()
    ended = False
    for start in range(0, len(micro), world.size):  # all ranks run as many forwards, which gather weights
        if ended := leaves():
            break
        mine = start + world.rank
        collated = partial(task.collate, micro[mine if mine < len(micro) else 0])
        batch = world.together(collated) if task.reads_files else collated()
        batch = {name: tensor.to(world.device) for name, tensor in batch.items()}
        value, counts = task.measure(model, batch)
        found = [value.item(), float(task.targets(batch)), *counts]
        sums = sums or [0.0] * len(found)
        if mine < len(micro):
            sums = [before + more for before, more in zip(sums, found, strict=True)]
    model.train(training)
    if ended:
        if isinstance(model, FSDPModule):  # a forward leaves the root's weights whole, and they are saved now
            model.reshard()
        return None
    loss, targets, *counts = world.sum(*sums)
    mean = loss / max(targets, 1)
    return {"loss": mean, **task.metrics(mean, counts)}
