"""TRL's defaults, which recompute activations without reentrance, under ZeRO-3 with its frozen layers in shards.

DeepSpeed before 0.19.3 releases a frozen parameter in the recomputation, before torch has compared its shape.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import grass_dist
from integration_tests.support.ranks import run_ranks
from integration_tests.test_trainer import GRASS, ds_config, read, sft_trainer

pytestmark = [pytest.mark.timeout(900), pytest.mark.integration]


def on_sft(rank: int, world_size: int, folder: Path, stage: int | None) -> dict:
    """``stage``: of ZeRO; None for one process without DeepSpeed and without checkpointing."""
    config = None
    if stage is None:
        grass_dist.enable(grass_dist.GrassConfig(**GRASS))
    else:
        grass_dist.enable()
        config = ds_config(stage, grass=GRASS)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # frozen norms are in shards, too
    logging.getLogger("transformers").setLevel(logging.ERROR)
    more = {"report_to": "none", "max_steps": 6, "bf16": False, "gradient_checkpointing": stage is not None}
    trainer = sft_trainer(world_size, folder, config, **more)
    trainer.train()
    return {**read(trainer), "checkpointing": trainer.model.is_gradient_checkpointing}


def test_trl_at_stage_3_recomputes_above_frozen_layers(tmp_path):
    (plain,) = run_ranks(1, on_sft, tmp_path / "plain", None, timeout=250)
    assert not plain["checkpointing"]
    for rank in run_ranks(2, on_sft, tmp_path / "zero", 3, timeout=500):
        assert rank["checkpointing"] and rank["layers"] == plain["layers"] and len(set(rank["layers"])) == 3
        worst = max((rank["params"][n] - p).abs().max().item() for n, p in plain["params"].items())
        print(f"worst parameter difference {worst:.1e}")
        assert worst <= 5e-6
        assert [row["loss"] for row in rank["rows"]] == pytest.approx([row["loss"] for row in plain["rows"]], abs=1e-4)
