"""NaN on one rank: no rank updates, the run goes on, and ends when it happens too often."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn

from grass_dist.errors import GrassError
from grass_dist.finetune.checkpoints import check_bad_steps
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.feed import StepData
from grass_dist.finetune.run_torch import Torch
from grass_dist.finetune.steps import train_step
from grass_dist.finetune.tasks.causal_lm import CausalLm
from grass_dist.job.world import World
from grass_dist.model.discovery import find_layers
from grass_dist.record.speed import positions_of
from integration_tests.support.model import small_llama
from integration_tests.support.scenarios import Spawn, scenarios
from integration_tests.support.training import full

pytestmark = pytest.mark.timeout(240)

RANKS = Spawn(2, timeout=220)

EXAMPLES = [{"input_ids": list(range(i, i + 8)), "labels": [-100, *range(i + 1, i + 8)]} for i in range(4)]


class Spoiler:
    """Makes the loss, or the gradients alone, of the rank's next step NaN."""

    def __init__(self, model: nn.Module) -> None:
        self.what: str | None = None
        head = model.lm_head
        head.register_forward_hook(self._forward)
        head.register_full_backward_hook(self._backward)

    def _forward(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return output * torch.nan if self.what == "loss" else None

    def _backward(self, _module: nn.Module, inputs: Any, _outputs: Any) -> Any:
        return tuple(g * torch.nan for g in inputs) if self.what == "gradients" else None


def spoiled(rank: int, world_size: int, backend: str, clip: float | None, spoil: dict[int, str]) -> dict[str, Any]:
    """A run of 10 steps in which rank 1 spoils the steps of ``spoil``."""
    config = RunConfig(
        model={"name": "unused"},
        data={"name": "unused", "text": "text"},
        train={"max_steps": 10, "global_batch_size": 2 * world_size, "clip_grad_norm": clip, "max_bad_steps": 3},
        grass={"active_layers": 2, "probe_steps": 2, "sampling_interval": 3, "update_interval": 3},
        parallel=backend,
    )
    world = World(rank, rank, world_size, torch.device("cpu"), cast(dist.ProcessGroup, dist.group.WORLD))
    model, task = small_llama(), CausalLm(config, SimpleNamespace(pad_token_id=0))
    spoiler = Spoiler(model)
    run = Torch(config, world).start(model, find_layers(model), [])
    told: dict[str, Any] = {"moved": [], "bad": [], "error": None}
    row = 0
    for step in range(10):
        spoiler.what = spoil.get(step) if rank == world_size - 1 else None
        before = [full(p).clone() for p in run.model.parameters()]
        batches = [task.collate([EXAMPLES[place]]) for place in (rank, rank + 2)]
        result = train_step(run, StepData(batches, positions_of(batches)), task, world, step)
        told["moved"].append(
            any(not torch.equal(b, full(p)) for b, p in zip(before, run.model.parameters(), strict=True))
        )
        told["bad"].append(result.bad)
        row = row + 1 if result.bad else 0
        try:
            check_bad_steps(row, config, step + 1)
        except GrassError as error:
            told["error"] = (step, str(error), error.on_every_rank)
            break
    finite = all(torch.isfinite(full(p)).all() for p in run.model.parameters())
    return {
        **told,
        "finite": finite,
        "skipped": run.grass.skipped,
        "step": run.grass.step,
        "dropped": run.grass.dropped,
    }


BOTH = {1: "loss", 4: "gradients", 5: "loss"}
"""Step 1 is of the probe."""
LOSS = {1: "loss", 4: "loss", 5: "loss"}
"""Without a norm only the loss is looked at."""


@scenarios(RANKS(spoiled, "fsdp2", 1.0, BOTH), RANKS(spoiled, "ddp", 1.0, BOTH), RANKS(spoiled, "fsdp2", None, LOSS))
def test_a_step_not_finite_on_one_rank_updates_nothing_anywhere(runs):
    for told in runs:
        assert told["bad"] == [step in (1, 4, 5) for step in range(10)]
        assert told["moved"] == [step not in (0, 1, 4, 5) for step in range(10)]
        assert told["finite"] and told["error"] is None
        assert (told["skipped"], told["step"]) == (2, 8)  # the clock of the method stood still
        assert told["dropped"] == 1  # the measurement of the probe


@scenarios(RANKS(spoiled, "fsdp2", 1.0, dict.fromkeys(range(4, 10), "gradients")))
def test_a_run_that_no_longer_learns_ends_on_all_ranks(runs):
    for told in runs:
        step, sentence, everywhere = told["error"]
        assert step == 6 and everywhere and told["finite"]
        assert "not finite in each of the last 3 steps, up to step 7" in sentence and "step 4" in sentence
