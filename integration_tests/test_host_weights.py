"""Weights that rest in host memory: under DDP on two ranks, in the training program, and in a Trainer."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

import grass_dist
from integration_tests.support.model import ADAMW, CLIP, decay_groups, global_batch, small_llama, wrapped
from integration_tests.support.program import events, run_all
from integration_tests.support.scenarios import FOLDER, TWO, scenarios

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

HOST = {"weights": "host"}
LAYER = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64)
"""Bytes of the weights of a layer of `small_llama` in fp32."""


class Loop:
    """A loop of a user's under DDP, with accumulation, groups, clipping and a schedule."""

    def __init__(self, rank: int, world_size: int, offload: dict[str, Any], dtype: torch.dtype, shard: bool) -> None:
        self.rank, self.world_size = rank, world_size
        self.model = wrapped(small_llama(dtype), "ddp", world_size)
        settings = {"active_layers": 2, "probe_steps": 2, "sampling_interval": 3, "update_interval": 3, "seed": 3}
        self.optimizer = grass_dist.GrassOptimizer(
            self.model,
            torch.optim.AdamW,
            ADAMW,
            config=grass_dist.GrassConfig(offload=offload, **settings),
            params=decay_groups(self.model),
            gradient_accumulation_steps=2,
            shard_states=shard,
        )

    def steps(self, first: int, last: int) -> list[Any]:
        seen: list[Any] = []
        for step in range(first, last):
            halves = global_batch(step).chunk(2 * self.world_size)[2 * self.rank :][:2]
            for micro, ids in enumerate(halves):
                with self.model.no_sync() if micro == 0 else contextlib.nullcontext():
                    (self.model(input_ids=ids, labels=ids).loss / 2).backward()
            seen.append(self.optimizer.clip_grad_norm_(CLIP).item())
            self.optimizer.step()
            self.optimizer.zero_grad()
            with torch.no_grad():
                seen.append(self.model(input_ids=halves[0], labels=halves[0]).loss.item())
            seen.append(self.optimizer.grass.active_layers)
        return seen

    def left(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def two_ways(rank: int, world_size: int, folder: str, dtype: torch.dtype, shard: bool) -> dict[str, Any]:
    """Resident beside resting weights, a checkpoint of each loaded into the other, and bytes of a step."""
    told: dict[str, Any] = {}
    resident = Loop(rank, world_size, {}, dtype, shard)
    expected = [resident.steps(0, 8), resident.left()]
    grass_dist.save_checkpoint(Path(folder) / "resident", resident.optimizer, 8)
    expected.append(resident.steps(8, 12))
    for chaos in (None, 1):
        ours = Loop(rank, world_size, HOST | {"chaos": chaos}, dtype, shard)
        seen = ours.steps(0, 8)
        told[f"same, chaos {chaos}"] = seen == expected[0] and same(ours.left(), expected[1])
        if chaos is None:
            before = ours.optimizer.grass.traffic
            grass_dist.save_checkpoint(Path(folder) / "host", ours.optimizer, 8)
        told[f"goes on, chaos {chaos}"] = ours.steps(8, 12) == expected[2] and same(ours.left(), resident.left())
        if chaos is None:
            told["bytes"] = ours.optimizer.grass.traffic.weight_bytes_to_device - before.weight_bytes_to_device
            told["states"] = ours.optimizer.grass.traffic.bytes_to_host
    for source, offload in (("host", {}), ("resident", HOST), ("host", HOST)):
        again = Loop(rank, world_size, offload, dtype, shard)
        again.steps(20, 23)
        grass_dist.load_checkpoint(Path(folder) / source, again.optimizer)
        going = again.steps(8, 12) == expected[2] and same(again.left(), resident.left())
        told[f"{source} loaded with {offload}"] = going
    saved = ours.optimizer.state_dict()
    told["state_dict"] = all(torch.is_tensor(v) for v in ours.model.state_dict().values()) and bool(saved["state"])
    ours.optimizer.detach()
    told["detached"] = same(ours.left(), resident.left())
    return told


@scenarios(
    *(TWO(two_ways, FOLDER, dtype, shard) for dtype in (torch.float32, torch.bfloat16) for shard in (True, False))
)
def test_two_ranks_of_ddp(runs):
    for told in runs:
        size = told.pop("bytes")
        assert told.pop("states") > 0
        # Four steps of 6 layers that rest: two micro-batches forward and backward, and an evaluation; the last two of a
        # forward are there for the backward.
        assert 4 * (2 * (6 + 4) + 6) * LAYER / 2 <= size <= 4 * (2 * (6 + 6) + 6 + 2) * LAYER
        assert all(told.values()), told


def test_the_training_program_passes_it_through(config, tmp_path):
    from transformers import AutoModelForCausalLM

    expected = run_all(config, 1, "parallel=single", "name=resident")
    models = {}
    for name, ranks, more in (
        ("single", 1, ["parallel=single"]),
        ("recomputed", 1, ["parallel=single", "model.activation_checkpointing=true"]),
        ("ddp", 2, ["parallel=ddp", "train.micro_batch_size=1"]),
    ):
        folder = run_all(config, ranks, f"name=host-{name}", "grass.offload.weights=host", *more)
        models[name] = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
        steps = events(folder, "step")
        assert all(step["weight_bytes_to_device"] > 0 for step in steps)
        assert sum(step["weight_bytes_to_host"] for step in steps) > 0
        assert (folder / "plots" / "moves.png").exists()
        assert "of weights to the device" in (folder / "report.html").read_text()
    theirs = AutoModelForCausalLM.from_pretrained(expected / "model").state_dict()
    assert same(models["single"], theirs) and same(models["recomputed"], theirs)
    assert all(torch.allclose(models["ddp"][name], theirs[name], atol=1e-5) for name in theirs)
