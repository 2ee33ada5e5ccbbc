"""Runs the steps of a fine-tune: an optimizer step over a rank's micro-batches, and an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from grass_dist.finetune.data.batches import Example, collate
from grass_dist.finetune.parallel import Run
from grass_dist.job.world import World
from grass_dist.model.loss import IGNORED, summed_loss


@dataclass(frozen=True, slots=True)
class StepResult:
    """Holds the result of a step on the global batch."""

    loss: float
    """Mean loss over all target tokens."""
    grad_norm: float | None
    """Norm of the gradients before clipping; None in the probe and without clipping."""
    tokens: int
    """Number of target tokens."""
    applied: bool
    """True if anything was updated: nothing is where a loss or gradient is not finite."""
    flags: list[float]
    """Sums over the ranks of the flags that each gave."""

    @property
    def bad(self) -> bool:
        return not (self.applied and math.isfinite(self.loss))


def train_step(
    run: Run,
    micro_batches: Sequence[Sequence[Example]],
    pad_token_id: int,
    world: World,
    step: int,
    flags: Callable[[], Sequence[float]] = tuple,
) -> StepResult:
    """Takes one optimizer step over the micro-batches of this rank.

    The loss is the mean over the target tokens of the *global* batch, so it does not depend on how the batch was cut
    into ranks and micro-batches. Besides the gradients, an all-reduce of 8 bytes goes over the wire, and one of 8 bytes
    for the loss and for each flag.

    Args:
        step: its number, for errors.
        flags: gives at the end of the step the numbers that the ranks add up.
    """
    batches = [
        {name: t.to(world.device, non_blocking=True) for name, t in collate(micro, pad_token_id).items()}
        for micro in micro_batches
    ]
    tokens = torch.stack([(b["labels"][:, 1:] != IGNORED).sum() for b in batches]).sum()
    with world.during(f"the sum of the tokens of step {step}"):
        dist.all_reduce(tokens)
    with world.during(f"the forward, backward and update of step {step}"):
        # The backends average over the ranks, so each rank's sum counts world.size-fold.
        stepped = run.step(batches, world.size / tokens.clamp(min=1))
    told = torch.tensor(list(flags()), dtype=torch.float64, device=world.device)
    with world.during(f"the sum of the losses of step {step}"):
        sums = torch.cat([stepped.total.reshape(1), told])
        dist.all_reduce(sums)
        total, *counted = sums.tolist()
    count = int(tokens.item())
    return StepResult(total / max(count, 1), stepped.norm, count, stepped.applied, counted)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Iterable[Example],
    micro_batch_size: int,
    pad_token_id: int,
    world: World,
    leaves: Callable[[], bool],
) -> float | None:
    """Computes the mean loss over the target tokens of ``examples``, which the ranks share.

    Args:
        leaves: says on every rank, before each micro-batch, whether it ends here; the same on all.

    Returns:
        The loss, or None if it has been left before its end.
    """
    examples = list(examples)
    micro = [examples[at : at + micro_batch_size] for at in range(0, len(examples), micro_batch_size)]
    loss = tokens = 0.0
    training = model.training
    model.eval()
    ended = False
    for start in range(0, len(micro), world.size):  # all ranks run as many forwards, which gather weights
        if ended := leaves():
            break
        mine = start + world.rank
        batch = collate(micro[mine if mine < len(micro) else 0], pad_token_id)
        batch = {name: tensor.to(world.device) for name, tensor in batch.items()}
        value = summed_loss(model, batch).item()
        if mine < len(micro):
            loss += value
            tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
    model.train(training)
    if ended:
        if isinstance(model, FSDPModule):  # a forward leaves the root's weights whole, and they are saved now
            model.reshard()
        return None
    loss, tokens = world.sum(loss, tokens)
    return loss / max(tokens, 1)
