"""Trainings that stop under ZeRO and go on elsewhere: on other ranks, at another stage, under another backend."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from grass_dist.checkpoint.loading import open_checkpoint
from integration_tests import resume
from integration_tests.resume import Setting, Training
from integration_tests.resume_zero import GRASS, ZeroSetting, ZeroTraining, unequal

LEGS = {"zero2 on 4": (2, 4), "zero3 on 2": (9, 11), "fsdp2 on 2": (15, 17), "zero1 on 3": (19, 22)}
"""Legs of one training: where each is saved for the next, and where it ends."""
ALONE = {"zero3 on 4": 22, "zero3 on 3": 11, "fsdp2": 22}
"""Trainings that go on from `SAVED`, and where they end."""
SAVED, SAVED_AT = "2-fp32-interval-deepspeed/step-000006", 6
"""In DeepSpeed's format, of two ranks."""
OF_RANKS = {"@measured", "@rng"}


def leg(rank: int, world_size: int, name: str, source: Path | None, folder: Path) -> dict[str, Any]:
    """One leg: from ``source`` on, saves for the next and goes on for a while."""
    backend, (save_at, steps) = name.split()[0], LEGS[name]
    training = ZeroTraining(rank, world_size, ZeroSetting(backend, GRASS))
    if source is not None:
        training.load(source)
    training.run(steps, [save_at], folder / name)
    return {"params": training.params(), "active": training.active}


def last(name: str) -> str:
    """The checkpoint that a leg leaves."""
    return f"{name}/step-{LEGS[name][0]:06d}"


def on_four_ranks(rank: int, world_size: int, parent: str) -> dict[str, Any]:
    gc.freeze()
    folder = Path(parent)
    told = {"zero2 on 4": leg(rank, world_size, "zero2 on 4", None, folder)}
    training = ZeroTraining(rank, world_size, ZeroSetting("zero3", GRASS)).load(folder / SAVED)
    training.run(ALONE["zero3 on 4"])
    return told | {"zero3 on 4": {"params": training.params(), "active": training.active}}


def on_two_ranks(rank: int, world_size: int, parent: str) -> dict[str, Any]:
    gc.freeze()
    folder = Path(parent)
    told: dict[str, Any] = {"zero3 on 2": leg(rank, world_size, "zero3 on 2", folder / last("zero2 on 4"), folder)}
    save_at, steps = LEGS["fsdp2 on 2"]
    source, out, setting = str(folder / last("zero3 on 2")), str(folder / "fsdp2 on 2"), Setting("fsdp2", GRASS)
    told["fsdp2 on 2"] = resume.leg(rank, world_size, setting, source, steps, save_at, out)
    told["fsdp2"] = resume.leg(rank, world_size, setting, str(folder / SAVED), ALONE["fsdp2"], 20, f"{parent}/fsdp2")
    told["bf16"] = moved_to_fsdp2(rank, world_size, folder)
    return told


def moved_to_fsdp2(rank: int, world_size: int, folder: Path) -> list[str]:
    """What an FSDP2 run with 16-bit weights holds otherwise than the ZeRO-2 run that it has loaded."""
    source = folder / "2-bf16-interval-dcp/step-000006"
    training = Training(rank, world_size, Setting("fsdp2", GRASS, torch.bfloat16)).load(source)
    training.save(folder / "bf16")
    training.run(training.done)
    return unequal(open_checkpoint(source), open_checkpoint(folder / "bf16/step-000006"))


def on_three_ranks(rank: int, world_size: int, parent: str) -> dict[str, Any]:
    """Three ranks divide few parameters evenly: partitions are padded."""
    gc.freeze()
    folder = Path(parent)
    told: dict[str, Any] = {"zero1 on 3": leg(rank, world_size, "zero1 on 3", folder / last("fsdp2 on 2"), folder)}
    training = ZeroTraining(rank, world_size, ZeroSetting("zero3", GRASS, kind="deepspeed")).load(folder / SAVED)
    training.save(folder / "padded")
    training.run(ALONE["zero3 on 3"])
    told["zero3 on 3"] = {"params": training.params(), "active": training.active}
    told["padded"] = unequal(open_checkpoint(folder / SAVED), open_checkpoint(folder / "padded/step-000006"))
    return told
