"""ZeRO configurations as people have them: they start, train with accumulation, save, and go on to the same weights."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import grass_dist
from integration_tests.support.model import small_llama
from integration_tests.support.scenarios import FOLDER, Spawn, scenarios
from integration_tests.support.zero_configs import CONFIGS
from integration_tests.test_trainer import arguments, data
from integration_tests.test_trainer_options import unmoved, whole_of

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

STEPS, SAVED_AT = 8, 5
GRASS = {"active_layers": 2, "probe_steps": 2, "sampling_interval": 2, "update_interval": 2}
RANKS = Spawn(2, timeout=1400)


def trained(rank: int, world_size: int, name: str, folder: str) -> dict[str, Any]:
    """Trains by Trainer with a configuration, to the end and again from the checkpoint."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    grass_dist.enable(grass_dist.GrassConfig(**GRASS))
    ends: list[Trainer] = []
    try:
        for resumed in (False, True):
            config = copy.deepcopy(CONFIGS[name])
            low = config.get("bf16", {}).get("enabled") is True or "optimizer" in config
            args = arguments(
                Path(folder) / name,
                world_size,
                **{
                    "deepspeed": config,
                    "max_steps": STEPS,
                    "bf16": low,
                    "save_strategy": "steps",
                    "save_steps": SAVED_AT,
                },
            )
            trainer = Trainer(small_llama(), args, train_dataset=data(STEPS))
            checkpoint = str(Path(folder) / name / f"checkpoint-{SAVED_AT}")
            trainer.train(resume_from_checkpoint=checkpoint if resumed else None)
            trainer.model_wrapped.empty_partition_cache()
            ends.append(trainer)
        weights = [{n: whole_of(p) for n, p in trainer.model.named_parameters()} for trainer in ends]
        losses = [row["loss"] for row in ends[0].state.log_history if "loss" in row]
        return {
            "same": all(torch.equal(weights[0][n], p) for n, p in weights[1].items()),
            "wrong": unmoved({"params": weights[0], "step": STEPS}),
            "losses": losses,
        }
    finally:
        grass_dist.disable()
        for trainer in ends:
            trainer.model_wrapped.destroy()


@scenarios(*(RANKS(trained, name, FOLDER) for name in CONFIGS))
def test_a_configuration_trains_saves_and_goes_on(runs):
    assert all(run["same"] for run in runs) and runs[0]["wrong"] is None
    assert len(runs[0]["losses"]) == STEPS and runs[0]["losses"][-1] < runs[0]["losses"][0]
