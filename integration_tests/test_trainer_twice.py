"""Under ZeRO a Trainer evaluates before it trains, trains twice, and gives the model back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import grass_dist
from grass_dist.backends.zero.jit import spare_the_compiler
from grass_dist.huggingface.logs import controller_of
from integration_tests.support.model import small_llama
from integration_tests.support.ranks import run_ranks
from integration_tests.test_trainer import GRASS, arguments, data, ds_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

STEPS = 3


def in_a_notebook(rank: int, world_size: int, folder: str, stage: int) -> dict[str, Any]:
    spare_the_compiler({})  # the engine that evaluates first is DeepSpeed's own
    model = small_llama()
    trainable = sum(p.requires_grad for p in model.parameters())
    args = arguments(
        Path(folder), world_size, max_steps=STEPS, deepspeed=ds_config(stage), per_device_eval_batch_size=2
    )
    grass_dist.enable(grass_dist.GrassConfig(**GRASS))
    trainer = Trainer(model, args, train_dataset=data(), eval_dataset=data(1))
    losses = [trainer.evaluate()["eval_loss"]]
    clocks = []
    for _ in range(2):
        trainer.train()
        grass = controller_of(trainer)
        assert grass is not None
        clocks.append((trainer.state.global_step, grass.step))
        losses.append(trainer.evaluate()["eval_loss"])
    grass_dist.disable()
    return {
        "losses": losses,
        "clocks": clocks,
        "trainable": (sum(p.requires_grad for p in model.parameters()), trainable),
        "whole": all(p.numel() for p in model.parameters()),
        "finite": all(torch.isfinite(p).all().item() for p in model.parameters()),
    }


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.long), 3])
def test_a_trainer_evaluates_first_and_trains_twice(stage, tmp_path):
    for rank in run_ranks(2, in_a_notebook, str(tmp_path), stage, timeout=200):
        first, second, third = rank["losses"]
        assert first > second > third
        assert rank["clocks"] == [(STEPS, STEPS + GRASS["probe_steps"])] * 2
        assert rank["trainable"][0] == rank["trainable"][1] and rank["finite"]
        assert rank["whole"] or stage == 3
