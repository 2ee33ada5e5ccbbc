"""Tensor parallelism, alone and beside FSDP2: the same samples and weights as one process, on four ranks."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.distributed import DistributedConfig

import grass_dist
from integration_tests.support.model import (
    ADAMW,
    CLIP,
    DRAWS,
    decay_groups,
    global_batch,
    schedule,
    small_llama,
    wrapped,
)
from integration_tests.support.parallel import data_place, divided
from integration_tests.support.parity import check_parity
from integration_tests.support.ranks import refused, run_ranks
from integration_tests.support.reference import run_reference
from integration_tests.support.resume import Setting, Training, leg
from integration_tests.support.scenarios import FOLDER, Spawn, scenarios
from integration_tests.support.training import full, local, train_grass
from integration_tests.support.wire import Wire

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
FOUR, TWO = Spawn(4, timeout=800), Spawn(2, timeout=400)
STEPS = 18
BOTH, IN_PARTS, REPLICAS = "fsdp2+tp", "fsdp2+tp+sp", "hsdp+tp"


@pytest.fixture(scope="module")
def reference():
    return run_reference(DRAWS, STEPS)


def trained(rank: int, world_size: int, backend: str, **options: Any) -> dict:
    run = train_grass(rank, world_size, backend, DRAWS, STEPS, **options)
    return {**run, "losses": _mean_over(run["losses"])}


def _mean_over(losses: list[float]) -> list[float]:
    """The mean over all ranks, of which several may take the same batches."""
    total = torch.tensor(losses)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


@scenarios(
    FOUR(trained, BOTH),
    FOUR(trained, IN_PARTS, sync_every_micro_batch=False),
    FOUR(trained, REPLICAS),
    TWO(trained, "tp"),
    TWO(trained, "tp+sp"),
)
def test_it_is_the_run_of_one_process(runs, reference):
    assert len(set(reference["active"])) >= 4
    runs = [{**run, "losses": [loss / len(runs) for loss in run["losses"]]} for run in runs]
    check_parity(runs, {**reference, "losses": [loss / len(runs) for loss in reference["losses"]]})


def beside_stock(rank: int, world_size: int, backend: str) -> dict[str, Any]:
    """γ = L without a probe beside torch's AdamW and its clipping on the same mesh: five steps of two micro-batches."""

    def run(make_optimizer: Any) -> tuple[list[float], list[torch.Tensor]]:
        model, norms = wrapped(small_llama(), backend, world_size), []
        optimizer = make_optimizer(model)
        place, places = data_place(backend, rank, world_size)
        for step in range(5):
            for micro in global_batch(step).chunk(places)[place].chunk(2):
                (model(input_ids=micro, labels=micro).loss / 2).backward()
            if isinstance(optimizer, grass_dist.GrassOptimizer):
                norm = optimizer.clip_grad_norm_(CLIP)
            else:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            norms.append(full(norm).item())
            optimizer.step()
            optimizer.zero_grad()
        return norms, [full(p).clone() for p in model.parameters()]

    config = grass_dist.GrassConfig(active_layers=8, probe_steps=0, sampling_interval=2, update_interval=2)
    make = partial(grass_dist.GrassOptimizer, optimizer_class=torch.optim.AdamW, optimizer_kwargs=ADAMW, config=config)
    norms, ours = run(lambda model: make(model, params=decay_groups(model)))
    stock_norms, stock = run(lambda model: torch.optim.AdamW(decay_groups(model), **ADAMW))
    return {"norms": norms == stock_norms, "equal": list(map(torch.equal, ours, stock))}


@scenarios(FOUR(beside_stock, IN_PARTS))
def test_with_all_layers_it_is_adamw_to_the_bit(runs):
    for run in runs:
        assert run["norms"] and len(run["equal"]) > 70 and all(run["equal"])


def clipped_by_torch(rank: int, world_size: int, backend: str) -> list[str]:
    """What torch's own clipping says where norms are on another mesh than matrices, and ours of other norms."""
    model = wrapped(small_llama(), backend, world_size)
    optimizer = grass_dist.GrassOptimizer(
        model, torch.optim.AdamW, ADAMW, config={**DRAWS, "probe_steps": 0, "active_layers": 8}
    )
    x = global_batch(0)
    model(input_ids=x, labels=x).loss.backward()
    alone = small_llama()
    alone(input_ids=x, labels=x).loss.backward()
    odd = []
    for norm_type in (1.0, 3.0, float("inf")):
        ours = optimizer.clip_grad_norm_(1e9, norm_type).item()
        theirs = torch.nn.utils.clip_grad_norm_(alone.parameters(), 1e9, norm_type).item()
        if abs(ours - theirs) > 1e-5 * theirs:
            odd.append(f"the {norm_type}-norm is {ours} and not {theirs}")
    optimizer.clip_grad_norm_(0.5)
    if abs((again := optimizer.clip_grad_norm_(0.5).item()) - 0.5) > 1e-6:
        odd.append(f"clipped to {again}")
    try:
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    except RuntimeError as error:
        return odd if "must have the same mesh" in str(error) or "mixed torch.Tensor" in str(error) else [str(error)]
    return [*odd, "torch clips too"]


@scenarios(FOUR(clipped_by_torch, BOTH), TWO(clipped_by_torch, "tp"))
def test_our_clipping_takes_parameters_on_several_meshes(runs):
    assert runs == [[]] * len(runs)


def bytes_of_a_step(rank: int, world_size: int, backend: str) -> dict[str, Any]:
    """Gradient bytes of a step of training, counted at the wire, and those of states on the device and the host."""
    model = wrapped(small_llama(), backend, world_size)
    config = grass_dist.GrassConfig(
        **{**DRAWS, "probe_steps": 0}, draw_ahead=0, always_active=(), offload={"mode": "none"}
    )
    optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=config)
    place, places = data_place(backend, rank, world_size)
    mine = global_batch(0).chunk(places)[place]
    model(input_ids=mine, labels=mine).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = optimizer.grass.bytes_reduced
    with Wire() as wire:
        model(input_ids=mine, labels=mine).loss.backward()
    active = [p for unit in optimizer.grass.trainable_units() for _, p in unit.params]
    sharding = optimizer.grass.backend.sharding
    counted = torch.tensor([local(p).numel() if sharding.counts(p) else 0 for p in model.parameters()])
    dist.all_reduce(counted)
    return {
        "counted": counted.tolist() == [p.numel() for p in model.parameters()],
        "claimed": optimizer.grass.bytes_reduced - before,
        "reduce_scatter": wire.floats["reduce_scatter"],
        "states": optimizer.state_bytes,
        "local": sum(local(p).nbytes for p in active),
        "whole": sum(p.numel() * 4 for p in active if p.ndim == 2),
        "norms": sum(p.numel() * 4 for p in active if p.ndim == 1),
        "steps": 4 * len(active),
    }


@scenarios(FOUR(bytes_of_a_step, BOTH), FOUR(bytes_of_a_step, IN_PARTS))
def test_a_rank_holds_and_sends_its_part(runs):
    for run in runs:
        assert run["counted"]  # each entry on one rank
        assert run["local"] == run["whole"] // 4 + run["norms"] // 2  # norms once for each tensor-parallel rank
        assert run["states"] == 2 * run["local"] + run["steps"]
        assert run["claimed"] == run["reduce_scatter"] == run["whole"] // 2 + run["norms"]


# Checkpoints.

GRASS = {"active_layers": 3, "probe_steps": 3, "sampling_interval": 4, "update_interval": 6, "seed": 1}


def resumed(rank: int, world_size: int, backend: str, folder: str) -> list[str]:
    """What differs in a bit after saves in the probe, and between a draw and its switch, and loads on the same mesh."""
    setting, odd = Setting(backend, {**GRASS, "offload": {"mode": "interval"}}), []
    whole = Training(rank, world_size, setting).run(13, [2, 6], Path(folder))
    for step in (2, 6):
        other = Training(rank, world_size, setting).load(Path(folder, f"step-{step:06d}")).run(13)
        odd += [name for name, p in whole.params().items() if not torch.equal(p, other.params()[name])]
        odd += [] if other.active == whole.active[step:] else [f"draws after {step}"]
    return odd


@scenarios(FOUR(resumed, BOTH, FOLDER), FOUR(resumed, REPLICAS, FOLDER), TWO(resumed, "tp+sp", FOLDER))
def test_a_checkpoint_goes_on_to_the_bit(runs):
    assert runs == [[]] * len(runs)


def test_a_checkpoint_goes_on_on_any_mesh(tmp_path):
    """Blocks become rows and rows blocks: FSDP2 + TP → FSDP2 → TP → one process → FSDP2 + TP in parts."""
    legs = [
        (4, Setting(BOTH, GRASS), 2),
        (4, Setting("fsdp2", GRASS), 6),
        (2, Setting("tp", GRASS), 10),
        (1, Setting("single", GRASS), 13),
        (4, Setting(IN_PARTS, GRASS, accumulation=2), 17),
    ]
    [alone] = run_ranks(1, leg, Setting("single", GRASS), None, 18, 18, str(tmp_path / "alone"))
    source, at, drawn, found = None, 0, [], []
    for number, (ranks, setting, save_at) in enumerate(legs):
        folder = tmp_path / str(number)
        found = run_ranks(ranks, leg, setting, source, save_at + 1, save_at, str(folder), timeout=200)
        assert all(other["active"] == found[0]["active"] for other in found)
        drawn += found[0]["active"][: save_at - at]
        source, at = str(folder / f"step-{save_at:06d}"), save_at
    assert drawn == alone["active"][:17]
    worst = max((found[0]["params"][n] - p).abs().max().item() for n, p in alone["params"].items())
    print(f"worst difference after 18 steps on five meshes: {worst:.2g}")
    assert worst < 2e-6


def by_torch(rank: int, world_size: int, first: str, second: str, folder: str) -> dict[str, Any]:
    """torch's distributed checkpoint: saved on one mesh, loaded on another, which goes on; also `state_dict` itself."""
    one, other = (Training(rank, world_size, Setting(backend, GRASS)) for backend in (first, second))
    one.run(6)
    saved = {
        "model": get_model_state_dict(one.model),
        "optimizer": get_optimizer_state_dict(one.model, one.optimizer),
    }
    dcp.save(saved, checkpoint_id=folder)
    there = {
        "model": get_model_state_dict(other.model),
        "optimizer": get_optimizer_state_dict(other.model, other.optimizer),
    }
    dcp.load(there, checkpoint_id=folder)
    set_model_state_dict(other.model, there["model"])
    set_optimizer_state_dict(other.model, other.optimizer, there["optimizer"])
    other.done = 6
    one.run(13)
    return {"uninterrupted": one.params(), "resumed": other.run(13).params()}


@scenarios(
    FOUR(by_torch, BOTH, BOTH, FOLDER),
    FOUR(by_torch, BOTH, "fsdp2", FOLDER),
    FOUR(by_torch, "hsdp", IN_PARTS, FOLDER),
    TWO(by_torch, "tp", "tp", FOLDER),
)
def test_torchs_distributed_checkpoint_takes_it_to_any_mesh(runs):
    for run in runs:
        worst = max((p - run["resumed"][name]).abs().max().item() for name, p in run["uninterrupted"].items())
        assert worst < 2e-6


# What else divides columns, and what is refused.


def by_columns(rank: int, world_size: int) -> dict[str, Any]:
    """FSDP2 that shards matrices by columns (``shard_placement_fn``)."""
    model = small_llama()
    for module in (*model.model.layers, model):
        fully_shard(module, shard_placement_fn=lambda param: Shard(param.ndim - 1))
    optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=DRAWS, params=decay_groups(model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    active = []
    for step in range(10):
        active.append(optimizer.grass.active_layers)
        mine = global_batch(step).chunk(world_size)[rank]
        model(input_ids=mine, labels=mine).loss.backward()
        optimizer.clip_grad_norm_(CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return {"active": active, "params": {n: full(p) for n, p in model.named_parameters()}}


@scenarios(FOUR(by_columns))
def test_fsdp2_may_shard_columns(runs):
    reference = run_reference(DRAWS, 10)
    for run in runs:
        assert run["active"] == reference["active"]
        assert max((run["params"][n] - p).abs().max().item() for n, p in reference["params"].items()) < 5e-6


def states_of_another_mesh(rank: int, world_size: int) -> str:
    """What is said of a state with as many entries on this rank, but others."""
    model = wrapped(small_llama(), BOTH, world_size)
    optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=DRAWS)
    param = model.model.layers[0].self_attn.q_proj.weight
    value = distribute_tensor(torch.zeros(param.shape), init_device_mesh("cpu", (4,)), [Shard(0)])
    assert local(value).shape == local(param).shape
    try:
        optimizer.grass.backend.sharding.own_part(param, value)
    except ValueError as error:
        return str(error)
    return ""


@scenarios(FOUR(states_of_another_mesh))
def test_states_of_other_entries_are_refused(runs):
    assert not runs[0] and not runs[3]  # the first and the last rows
    assert all("divided as" in told for told in runs[1:3])


def loaded_in_parts(model: PreTrainedModel, rank: int, folder: str, **sizes: int) -> Any:
    """A model that transformers divides while it loads it from ``folder``, where rank 0 saves it."""
    if rank == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))


def by_transformers(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    model = loaded_in_parts(small_llama(), rank, folder, tp_size=2, fsdp_size=2)
    optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=DRAWS, params=decay_groups(model))
    active = []
    for step in range(10):
        active.append(optimizer.grass.active_layers)
        mine = global_batch(step).chunk(2)[rank // 2]
        model(input_ids=mine, labels=mine).loss.backward()
        optimizer.clip_grad_norm_(CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return {"active": active, "params": {n: full(p) for n, p in model.named_parameters()}}


@scenarios(FOUR(by_transformers, FOLDER))
def test_transformers_may_divide_the_model(runs, monkeypatch):
    monkeypatch.setattr("integration_tests.support.reference.schedule", lambda step: 1.0)
    reference = run_reference(DRAWS, 10)
    for run in runs:
        assert run["active"] == reference["active"]
        assert max((run["params"][n] - p).abs().max().item() for n, p in reference["params"].items()) < 5e-6


def with_head_norms() -> PreTrainedModel:
    """Its plan sums the gradients of norms over the heads of all ranks, in hooks."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 128, "head_dim": 16}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2))


def refusals(rank: int, world_size: int, folder: str) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def make(model: torch.nn.Module) -> str:
        return refused(lambda: grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=DRAWS))

    return {
        "tp on half of the ranks": make(divided(small_llama(), mesh["tp"])),
        "head norms": make(loaded_in_parts(with_head_norms(), rank, folder, tp_size=2, fsdp_size=2)),
        "ddp over tp": make(DistributedDataParallel(divided(small_llama(), mesh["tp"]), device_mesh=mesh["dp"])),
    }


@scenarios(FOUR(refusals, FOLDER))
def test_what_would_train_wrongly_is_refused_on_every_rank(runs):
    for run in runs:
        assert "on 2 of 4 ranks, but no module is sharded by fully_shard" in run["tp on half of the ranks"]
        assert "UnsupportedModel" in run["ddp over tp"] and "fully_shard" in run["ddp over tp"]
        assert "The tensor-parallel plan of transformers sums the gradients of " in run["head norms"]


def sharded_over_pairs(rank: int, world_size: int) -> list[str]:
    """What the log says where the ranks of a second dimension are left out of `fully_shard`."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("grass_dist").addHandler(handler)
    mesh, model = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp")), small_llama()
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh["dp"])
    grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=DRAWS)
    logging.getLogger("grass_dist").removeHandler(handler)
    return told


@scenarios(FOUR(sharded_over_pairs))
def test_ranks_that_train_without_the_others_are_told(runs):
    for rank in (0, 1):  # the first of each pair
        assert any("wrapped for 2 of 4 ranks" in sentence for sentence in runs[rank])
