"""Ulysses under ZeRO on 2 × 2 ranks: the samples and weights of one process. What else divides is refused."""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

import grass_dist
from integration_tests.support.model import ADAMW, DRAWS, LENGTH, decay_groups, global_batch, schedule, small_llama
from integration_tests.support.parity import check_parity
from integration_tests.support.ranks import refused
from integration_tests.support.reference import run_reference
from integration_tests.support.scenarios import Spawn, scenarios
from integration_tests.support.zero import ds_config, full, local

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
FOUR, WITH_ACCELERATE = Spawn(4, timeout=800), Spawn(4, timeout=400)
STEPS, SP, ROWS = 14, 2, 2
"""Steps, ranks of a sequence, and rows of a rank's batch: a step has as many micro-batches as ranks of a sequence."""


@pytest.fixture(scope="module")
def reference():
    return run_reference(DRAWS, STEPS)


def ulysses() -> Any:
    """The mpu, and transformers' attention over parts of sequences; once in a process."""
    deepspeed.init_distributed("gloo", verbose=False)
    if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is not None:
        return parallel_state_sp
    about = {"core_attn_implementation": "sdpa", "sequence_parallel_size": SP, "micro_batch_size": ROWS}
    return UlyssesSPAttentionHF.register_with_transformers(with_sdpa(), **about)


def with_sdpa() -> LlamaForCausalLM:
    model = small_llama()
    model.set_attn_implementation("sdpa")
    return model


def engine_of(config: dict[str, Any], mpu: Any) -> Any:
    model = with_sdpa()
    optimizer = torch.optim.AdamW(decay_groups(model), **ADAMW)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    config = {**config, "train_micro_batch_size_per_gpu": ROWS, "sequence_parallel_size": SP}
    return grass_dist.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config, mpu=mpu)[0]


def parts_of(step: int, rank: int, mpu: Any) -> UlyssesSPDataLoaderAdapter:
    """This rank's part of the sequences of its group, of which each rank has loaded some."""
    rows = global_batch(step)[rank * ROWS :][:ROWS].clone()
    places = torch.arange(LENGTH).expand(ROWS, -1).contiguous()
    loader: Any = [{"input_ids": rows, "position_ids": places, "labels": rows.clone()}]
    about = {"sp_rank": mpu.get_sequence_parallel_rank(), "sp_group": mpu.get_sequence_parallel_group()}
    return UlyssesSPDataLoaderAdapter(loader, **about, sp_world_size=SP, device="cpu")


def train_step(engine: Any, step: int, rank: int, mpu: Any, stage: int) -> float:
    """One step; gives the loss of the global batch, of which DeepSpeed averages parts at stage 3 and else sums them."""
    total = torch.zeros(())
    for batch in parts_of(step, rank, mpu):
        labels = batch.pop("shift_labels").flatten()
        logits = engine(**batch).logits.flatten(0, 1)
        part = nn.functional.cross_entropy(logits, labels, reduction="sum") / (ROWS * (LENGTH - 1))
        engine.backward(part * SP if stage == 3 else part)
        engine.step()
        total += part.detach() / SP
    dist.all_reduce(total)
    return total.item() / (dist.get_world_size() // SP)


def trained(rank: int, world_size: int, stage: int) -> dict[str, Any]:
    mpu = ulysses()
    engine = engine_of(ds_config(stage, DRAWS, SP), mpu)
    grass, log = engine.grass, {"active": [], "importances": [], "losses": [], "norms": []}
    frozen_moved = frozen_grads = 0
    device = engine.optimizer.states.device_bytes
    for step in range(STEPS):
        active, probing = grass.active_layers, grass.phase == "probe"
        log["active"].append(active)
        log["importances"].append(grass.importances)
        still = [p for i, unit in enumerate(grass.layers) if i not in active or probing for _, p in unit.params]
        before = [local(p).clone() for p in still]
        log["losses"].append(train_step(engine, step, rank, mpu, stage))
        if not probing:
            log["norms"].append(float(engine.get_global_grad_norm()))
        frozen_moved += sum(not torch.equal(local(p), b) for p, b in zip(still, before, strict=True))
        frozen_grads += sum(p.grad is not None for p in still)
    log |= {"params": {n: full(p) for n, p in engine.module.named_parameters()}, "device": device}
    return {**log, "frozen_moved": frozen_moved, "frozen_grads": frozen_grads, "numel": grass.layers[0].numel}


@pytest.mark.parametrize(
    ("runs", "stage"), [(FOUR(trained, stage), stage) for stage in (1, 2, 3)], indirect=["runs"], ids=str
)
def test_ulysses_is_the_run_of_one_process(runs, stage, reference):
    check_parity(runs, reference)
    for run in runs:  # three slots for layers, of which each rank has a quarter
        assert run["device"] == pytest.approx((8 if stage == 3 else 12) * 3 * run["numel"] / 4, abs=12 * 100 * 20)


def with_accelerate(rank: int, world_size: int) -> dict[str, Any]:
    """A loop over Accelerate with ``ParallelismConfig(sp_size=2, sp_backend="deepspeed")``, at ZeRO-2."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as `accelerate launch` does
    grass_dist.enable()
    config = {**ds_config(2, DRAWS, SP), "train_micro_batch_size_per_gpu": ROWS}
    how = ParallelismConfig(
        dp_shard_size=world_size // SP,
        sp_size=SP,
        sp_backend="deepspeed",
        sp_handler=DeepSpeedSequenceParallelConfig(sp_attn_implementation="sdpa"),
    )
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), parallelism_config=how)
    places = torch.arange(LENGTH)
    # On CPUs Accelerate takes each rank of DeepSpeed for the only one when it divides a loader.
    # Its last batch, of which the ranks of a sequence make two, would end a step twice.
    rows = [row for step in range(STEPS + 1) for row in global_batch(step)[rank * ROWS :][:ROWS]]
    loader: Any = DataLoader([{"input_ids": row, "position_ids": places, "labels": row} for row in rows], ROWS)
    model = with_sdpa()
    optimizer = torch.optim.AdamW(decay_groups(model), **ADAMW)
    engine, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    active = []
    for number, batch in zip(range(STEPS * SP), loader, strict=False):
        if number % SP == 0:
            active.append(engine.grass.active_layers)
        labels = batch.pop("shift_labels").flatten()
        logits = engine(**batch).logits.flatten(0, 1)
        with accelerator.accumulate(engine):
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / (ROWS * (LENGTH - 1))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return {"active": active, "params": {n: full(p) for n, p in engine.module.named_parameters()}}


@scenarios(WITH_ACCELERATE(with_accelerate))
def test_ulysses_of_accelerate_is_the_run_of_one_process(runs, monkeypatch):
    monkeypatch.setattr("integration_tests.support.reference.schedule", lambda step: 1.0)
    reference = run_reference(DRAWS, STEPS)
    for run in runs:
        assert run["active"] == reference["active"]
        worst = max((run["params"][n] - p).abs().max().item() for n, p in reference["params"].items())
        assert worst <= 5e-6, worst


class Megatron:
    """An mpu as Megatron's, with two model-parallel ranks."""

    @staticmethod
    def get_model_parallel_world_size() -> int:
        return 2


def refusals(rank: int, world_size: int) -> dict[str, str]:
    mpu = ulysses()

    def start(more: dict[str, Any] | None = None, prepare: Any = lambda model: None, **given: Any) -> str:
        model = small_llama()
        prepare(model)
        optimizer = torch.optim.AdamW(decay_groups(model), **ADAMW)
        config = ds_config(2, {"active_layers": 2}, 1, **(more or {}))
        return refused(lambda: grass_dist.initialize(model=model, optimizer=optimizer, config=config, **given))

    return {
        "mesh_param": start(mesh_param=(2, 2)),
        "sequence_parallel_size": start({"sequence_parallel_size": 2}),
        "another size": start({"sequence_parallel_size": 4}, mpu=mpu),
        "sizes": start({"sequence_parallel_size": 2, "data_parallel_size": 2}, mpu=mpu),
        "autotp": start({"tensor_parallel": {"autotp_size": 2}}),
        "mpu": start(mpu=Megatron()),
        "tp_model_init": start(prepare=lambda model: deepspeed.tp_model_init(model, 2, torch.float32)),
    }


WORDS = {
    "mesh_param": "ConfigError: mesh_param=(2, 2): ZeRO then reduces gradients over its first dimension alone",
    "sequence_parallel_size": "ConfigError: sequence_parallel_size=2: ",
    "another size": "ConfigError: sequence_parallel_size=4: ",
    "sizes": "ConfigError: sequence_parallel_size=2: ",
    "autotp": "ConfigError: tensor_parallel.autotp_size=2: ZeRO reduces and partitions each part of a layer by itself",
    "mpu": "ConfigError: mpu='Megatron': its 2 model-parallel ranks hold parts of each layer",
    "tp_model_init": "UnsupportedModel: DeepSpeed reduces gradients over 2 of 4 ranks",
}


@scenarios(FOUR(refusals))
def test_parts_of_layers_are_refused_on_every_rank(runs):
    for run in runs:
        for case, words in WORDS.items():
            assert run[case].startswith(words) and "\n" not in run[case], (case, run[case])
