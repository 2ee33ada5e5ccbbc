"""`enable`: a Trainer makes the very run that a loop over grass_dist makes, continues it, and logs it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import grass_dist
from integration_tests import trainer as runs
from integration_tests.support.model import LENGTH, VOCAB, small_llama
from integration_tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)

DRAWN = [(), *[(0, 1, 2)] * 3, *[(0, 1, 5)] * 3, *[(0, 1, 6)] * 2]


def check_same(run: dict, loop: dict, tolerance: float = 0.0) -> None:
    worst = max((run["params"][n] - p).abs().max().item() for n, p in loop["params"].items())
    print(f"worst parameter difference {worst:.1e}")  # shown by pytest -rP
    assert run["params"].keys() == loop["params"].keys() and worst <= tolerance
    assert run["layers"] == loop["layers"] == DRAWN
    assert run["lr"] == pytest.approx(loop["lr"], rel=1e-12)
    assert run.get("norms", loop["norms"]) == pytest.approx(loop["norms"], rel=1e-6)


def check_rows(run: dict, resumed_at: int | None = None) -> None:
    """The method's numbers in the rows of a Trainer's log, one a step.

    A new process tells the importances once more at its first log.
    """
    rows = run["rows"]
    assert [row["grass/round"] for row in rows] == [-1, 0, 0, 0, 1, 1, 1, 2, 2]
    assert rows[0]["grass/entropy"] == pytest.approx(math.log(8)) and rows[1]["grass/entropy"] < math.log(8) - 0.1
    told = [sum(key.startswith("grass/importance_") for key in row) for row in rows]
    refreshed = [0, 8, 8, 0, 0, 8, 0, 0, 8]
    assert told == [8 if at == resumed_at else count for at, count in enumerate(refreshed)]
    assert all(type(row[key]) is float for row in rows for key in row if key.startswith("grass/"))


def check_importances(resumed: dict, run: dict) -> None:
    """Those that were logged are the same, but for the row in which a new process tells them once more."""
    for mine, theirs in zip(resumed["rows"], run["rows"], strict=True):
        assert {k: v for k, v in theirs.items() if "importance" in k}.items() <= mine.items()


@pytest.mark.parametrize(("stage", "offload"), [(2, False), pytest.param(3, True, marks=pytest.mark.integration)])
def test_zero(stage, offload, tmp_path):
    for rank in run_ranks(2, runs.on_zero, stage, tmp_path, offload, timeout=240):
        assert min(rank["loop"]["norms"][2:]) > 2 * runs.CLIP  # clipping binds at every step
        check_same(rank["trainer"], rank["loop"])
        check_same(rank["resumed"], rank["loop"])
        check_rows(rank["trainer"])
        check_rows(rank["resumed"], runs.SAVED_AT)
        check_importances(rank["resumed"], rank["trainer"])
        if offload:
            assert rank["updated by"] is torch.optim.AdamW  # not DeepSpeedCPUAdam
            assert rank["evaluated"]["eval_loss"] == pytest.approx(math.log(VOCAB), rel=0.1)
            assert not [key for key in rank["evaluated"] if "grass" in key]


@pytest.mark.parametrize(
    "scheduler", [True, pytest.param(False, marks=pytest.mark.integration)], ids=["ds scheduler", "hf scheduler"]
)
def test_zero_with_the_optimizer_of_the_ds_config(scheduler, tmp_path):
    for rank in run_ranks(2, runs.on_configured_zero, scheduler, tmp_path, timeout=240):
        assert all(torch.equal(rank["trainer"]["params"][n], p) for n, p in rank["loop"]["params"].items())
        assert rank["trainer"]["layers"] == DRAWN


def test_without_deepspeed(tmp_path):
    for rank in run_ranks(2, runs.on_ddp, tmp_path, timeout=240):
        check_same(rank["trainer"], rank["loop"])
        check_same(rank["resumed"], rank["loop"])
        check_rows(rank["trainer"])
        check_importances(rank["resumed"], rank["trainer"])
        assert rank["accelerate"]["backend"] == "ddp"
        check_same(rank["accelerate"], rank["loop"])
        assert rank["accelerate, fsdp2"]["backend"] == "fsdp2"
        check_same(rank["accelerate, fsdp2"], rank["loop"], tolerance=1e-6)
        assert "have no place for layers without an optimizer state" in rank["accelerate, fsdp2"]["saved"]


def sft_trainer(world_size: int, folder: Path, config: dict) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {"<unk>": 0, "<pad>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    processing = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )
    texts = [{"text": " ".join(f"w{i}" for i in item["input_ids"].tolist())} for item in runs.data()]
    args = runs.arguments(folder, world_size, SFTConfig, deepspeed=config, report_to="tensorboard", max_length=LENGTH)
    return SFTTrainer(small_llama(), args=args, train_dataset=Dataset.from_list(texts), processing_class=processing)


def on_sft(rank: int, world_size: int, folder: Path) -> dict:
    """TRL under ZeRO-2, then a model that is not trained with the same ds_config."""
    from trl.models.utils import prepare_deepspeed

    grass_dist.enable()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    trainer = sft_trainer(world_size, folder, runs.ds_config(2, grass=runs.GRASS))
    trainer.train()
    reference = prepare_deepspeed(small_llama(), trainer.accelerator)
    return {**runs.read(trainer), "reference": hasattr(reference, "grass")}


def test_trl_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, second = run_ranks(2, on_sft, tmp_path, timeout=240)
    assert first["layers"] == second["layers"] and len(set(first["layers"])) == 4
    assert all(torch.equal(first["params"][n], p) for n, p in second["params"].items())
    check_rows(first)
    assert first["rows"][-1]["loss"] < first["rows"][2]["loss"]
    assert not first["reference"]  # the model that is not trained is DeepSpeed's own
    written = EventAccumulator(str(tmp_path / "tensorboard"))
    written.Reload()
    assert {f"train/grass/{n}" for n in ("round", "entropy", "active_0", "active_2", "importance_07")} <= set(
        written.Tags()["scalars"]
    )
    assert [event.value for event in written.Scalars("train/grass/active_0")] == [
        drawn[0] for drawn in first["layers"][1:]
    ]
