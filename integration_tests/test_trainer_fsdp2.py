"""FSDP2 under Accelerate, Trainer and transformers' own sharding: what is saved goes on to the bit, or says why not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, Trainer, get_scheduler

import grass_dist
from grass_dist.checkpoint.marker import read_marker
from integration_tests.support.fsdp_on_cpu import Fsdp2Trainer, forget_fsdp2, fsdp2_plugin, put_fsdp2_in
from integration_tests.support.model import CLIP, small_llama
from integration_tests.support.ranks import refused, run_ranks
from integration_tests.test_trainer import (
    ACCUMULATION,
    DRAWN,
    GRASS,
    PROBE,
    STEPS,
    WARMUP,
    arguments,
    check_rows,
    data,
    loss_of,
    micro_batches,
    optimizer_of,
    read,
)

pytestmark = [pytest.mark.timeout(900), pytest.mark.integration]

AT = 4


class Heard(logging.Handler):
    """The sentences that the package has said on this rank since the last `take`."""

    def __init__(self) -> None:
        super().__init__()
        self.sentences: list[str] = []
        logging.getLogger("grass_dist").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.sentences.append(record.getMessage())

    def take(self) -> str:
        told, self.sentences = " ".join(self.sentences), []
        return told


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        n.removeprefix("module."): p.full_tensor().detach() if isinstance(p, DTensor) else p.detach().clone()
        for n, p in model.named_parameters()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(p, other[n]) for n, p in one.items())


# --- a loop over Accelerate


class Loop:
    """A training of one's own over Accelerate, prepared."""

    def __init__(self, kind: str, mixed: str | None, grass: dict | None = GRASS, class_: Any = None, scale: float = 0):
        grass_dist.enable(grass_dist.GrassConfig(**grass)) if grass else grass_dist.disable()
        plugin = fsdp2_plugin(state_dict_type=kind)
        if mixed:
            plugin.set_mixed_precision(mixed)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION, mixed_precision=mixed)
        put_fsdp2_in(self.accelerator, plugin)
        if scale:  # by itself Accelerate makes one for fp16 on a GPU
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        model: Any = small_llama()
        inner = class_(model.parameters(), lr=1e-3) if class_ else optimizer_of(model)
        scheduler = get_scheduler("linear", inner, WARMUP * 2, STEPS * 2)  # stepped once a process
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, inner, scheduler)

        if scale:  # for clipping to unscale; after `prepare`, so that the forward is in fp32
            self.accelerator.state._mixed_precision, self.accelerator.native_amp = "fp16", True

    def train(self, start: int, end: int) -> dict[str, torch.Tensor]:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        for step in range(start, end):
            for x in micro_batches(step, rank, world_size):
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(loss_of(self.model, x, world_size) * ACCUMULATION)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
        return whole(self.model)


FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


def chain(place: Path, kind: str, mixed: str | None = None, scale: float = 0) -> dict[str, Any]:
    """Trains, saves, and goes on; a second run loads and goes on."""
    one = Loop(kind, mixed, scale=scale)
    one.train(0, AT)
    one.accelerator.save_state(str(place))
    seen: dict[str, Any] = {"scale": one.accelerator.scaler.get_scale() if scale else None}
    seen["uninterrupted"] = one.train(AT, STEPS)
    forget_fsdp2(one.accelerator)
    two = Loop(kind, mixed, scale=scale / 2)
    two.accelerator.load_state(str(place))
    seen["scale loaded"] = two.accelerator.scaler.get_scale() if scale else None
    seen["same"] = same(two.train(AT, STEPS), seen["uninterrupted"])
    forget_fsdp2(two.accelerator)
    return seen


def from_ordinary(place: Path, kind: str, heard: Heard) -> dict[str, Any]:
    """Goes on from a state that was saved without GRASS."""
    ordinary = Loop(kind, None, None)
    trained = ordinary.train(0, AT)
    ordinary.accelerator.save_state(str(place))
    forget_fsdp2(ordinary.accelerator)
    taken = Loop(kind, None)
    heard.take()
    taken.accelerator.load_state(str(place))
    told = same(whole(taken.model), trained) and heard.take()
    taken.train(AT, AT + 3)
    forget_fsdp2(taken.accelerator)
    return {"told": told, "active": taken.optimizer.optimizer.grass.active_layers}


def on_accelerate(rank: int, world_size: int, folder: Path) -> dict:
    heard = Heard()
    plain = chain(folder / SHARDED, SHARDED)
    full = chain(folder / FULL, FULL)
    mixed = chain(folder / "mixed", SHARDED, "bf16")
    scaled = chain(folder / "scaled", SHARDED, scale=2.0**16)
    seen: dict = {
        "same": [run["same"] for run in (plain, full, mixed, scaled)],
        "scaled": same(plain["uninterrupted"], scaled["uninterrupted"]),
        "scale": (scaled["scale"], scaled["scale loaded"]),
    }
    for kind in (SHARDED, FULL):
        seen[kind] = from_ordinary(folder / f"{kind} ordinary", kind, heard)
        other = Loop(kind, None, {**GRASS, "active_layers": 2})
        seen[kind]["γ"] = refused(lambda other=other, kind=kind: other.accelerator.load_state(str(folder / kind)))
        seen["type"] = refused(lambda other=other: other.accelerator.load_state(str(folder / SHARDED)))
        forget_fsdp2(other.accelerator)
    other = Loop(SHARDED, None, class_=torch.optim.RMSprop)
    seen["class"] = refused(lambda: other.accelerator.load_state(str(folder / SHARDED)))
    return seen


@pytest.mark.long
def test_accelerate_saves_and_loads_states_under_fsdp2(tmp_path):
    for rank, seen in enumerate(run_ranks(2, on_accelerate, tmp_path, timeout=800)):
        assert all(seen["same"]) and seen["scaled"]
        assert seen["scale"] == (2.0**18, 2.0**18)
        for kind in (SHARDED, FULL):
            assert seen[kind]["γ"].startswith("CheckpointError: active_layers=3 in the saved state, and 2 here")
            assert len(seen[kind]["active"]) == 3
            told = "The checkpoint was saved without GRASS: its weights are taken over"
            assert told in seen[kind]["told"] if rank == 0 else seen[kind]["told"] == ""
        assert "no optimizer states of the name square_avg" in seen["class"]
        assert seen["type"].startswith("ConfigError: fsdp state_dict_type='FULL_STATE_DICT'")


# --- Trainer


def fsdp2_trainer(world_size: int, folder: Path, kind: str, **more: Any) -> Trainer:
    config = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": kind}
    args = arguments(folder, world_size, fsdp=True, fsdp_config=config, **more)
    return Fsdp2Trainer(model=small_llama(), args=args, train_dataset=data(), eval_dataset=data(1))


def finished(trainer: Trainer, **given: Any) -> dict:
    trainer.train(**given)
    seen = {**read(trainer), "params": whole(trainer.model)}
    forget_fsdp2(trainer.accelerator)
    return seen


def refused_training(trainer: Trainer, checkpoint: Path) -> str:
    told = refused(lambda: trainer.train(resume_from_checkpoint=str(checkpoint)))
    forget_fsdp2(trainer.accelerator)
    return told


def on_trainer(rank: int, world_size: int, folder: Path) -> dict:
    grass_dist.enable(grass_dist.GrassConfig(**GRASS))
    seen: dict = {}
    saving = {"save_strategy": "steps", "save_steps": AT}
    for kind in (FULL, SHARDED):
        place = folder / kind
        saved = place / f"checkpoint-{AT}"
        uninterrupted = finished(fsdp2_trainer(world_size, place, kind, **saving))
        resumed = finished(fsdp2_trainer(world_size, folder / "again", kind), resume_from_checkpoint=str(saved))
        seen[kind] = {"trainer": uninterrupted, "resumed": resumed, "marked": read_marker(saved)}
        grass_dist.enable(grass_dist.GrassConfig(**{**GRASS, "seed": 9}))
        seen[kind]["seed"] = refused_training(fsdp2_trainer(world_size, folder / "again", kind), saved)
        grass_dist.enable(grass_dist.GrassConfig(**GRASS))
    best = fsdp2_trainer(
        world_size,
        folder / "best",
        FULL,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=AT,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that it is the first
        **saving,
    )
    seen["best"] = finished(best)["params"]
    seen["best checkpoint"] = best.state.best_model_checkpoint
    finished(fsdp2_trainer(world_size, folder / "only", FULL, save_only_model=True, **saving))
    only = folder / "only" / f"checkpoint-{AT}"
    seen["only"] = refused_training(fsdp2_trainer(world_size, folder / "again", FULL), only)
    heard = Heard()
    ddp = Trainer(small_llama(), arguments(folder / "again", world_size), train_dataset=data())
    ddp.train(resume_from_checkpoint=str(only))
    seen["only, ddp"] = heard.take()
    return seen


def test_trainer_resumes_under_fsdp2_to_the_bit(tmp_path):
    for rank, seen in enumerate(run_ranks(2, on_trainer, tmp_path, timeout=800)):
        for kind in (FULL, SHARDED):
            run = seen[kind]
            assert same(run["trainer"]["params"], run["resumed"]["params"])
            assert run["trainer"]["layers"] == run["resumed"]["layers"] == DRAWN
            check_rows(run["trainer"])
            assert run["marked"]["step"] == AT + PROBE
            assert run["seed"].startswith("CheckpointError: seed=0 in the saved state, and 9 here")
        assert same(seen[FULL]["trainer"]["params"], seen[SHARDED]["trainer"]["params"])
        written = load_file(Path(seen["best checkpoint"]) / "model.safetensors")
        assert all(torch.equal(written[n], p) for n, p in seen["best"].items())
        assert seen["best checkpoint"].endswith(f"checkpoint-{AT}")
        assert not same(seen["best"], seen[FULL]["trainer"]["params"])
        assert seen["only"].startswith("ConfigError: resume_from_checkpoint=") and "save_only_model" in seen["only"]
        told = "has no optimizer states, as save_only_model leaves it: its weights are taken over"
        assert told in seen["only, ddp"] if rank == 0 else seen["only, ddp"] == ""


# --- a model that transformers shards at load


def sharded_at_load(folder: Path, replicas: int, world_size: int) -> nn.Module:
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(fsdp_size=world_size // replicas, dp_replicate_size=replicas)
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager", distributed_config=config)


def on_load(rank: int, world_size: int, folder: Path, replicas: int) -> dict:
    grass_dist.enable(grass_dist.GrassConfig(**GRASS))
    if rank == 0:
        small_llama().save_pretrained(folder / "model")
    dist.barrier()

    def trainer(**more: Any) -> Trainer:
        model = sharded_at_load(folder / "model", replicas, world_size)
        return Trainer(model, arguments(folder / "run", world_size, **more), train_dataset=data())

    one = trainer(save_strategy="steps", save_steps=AT, save_only_model=True)  # Trainer takes no other
    uninterrupted = finished(one)
    saved = folder / "run" / f"checkpoint-{AT}"
    resumed = finished(trainer(), resume_from_checkpoint=str(saved))
    grass_dist.enable(grass_dist.GrassConfig(**{**GRASS, "active_layers": 2}))
    told = refused_training(trainer(), saved)
    plain = Trainer(small_llama(), arguments(folder / "again", world_size), train_dataset=data())
    grass_dist.enable(grass_dist.GrassConfig(**GRASS))
    return {
        "sharded": all(isinstance(p, DTensor) for p in one.model.parameters()),
        "trainer": uninterrupted,
        "resumed": resumed,
        "γ": told,
        "ddp": finished(plain),
        "ddp from it": refused_training(
            Trainer(small_llama(), arguments(folder / "again", world_size), train_dataset=data()), saved
        ),
    }


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.long)], ids=["fsdp2", "hsdp"])
def test_a_model_sharded_at_load_resumes_to_the_bit(replicas, tmp_path):
    for seen in run_ranks(2 * replicas, on_load, tmp_path, replicas, timeout=800):
        assert seen["sharded"]
        assert seen["trainer"]["layers"] == seen["resumed"]["layers"] == DRAWN
        assert same(seen["trainer"]["params"], seen["resumed"]["params"])
        worst = max((seen["ddp"]["params"][n] - p).abs().max().item() for n, p in seen["trainer"]["params"].items())
        assert worst < 1e-6
        assert seen["γ"].startswith("CheckpointError: active_layers=3 in the saved state, and 2 here")
        assert seen["ddp from it"].startswith("CheckpointError: The checkpoint is of a model that was sharded at load")
