"""Hugging Face Trainer runs under `enable`, and the loops that they must equal; run by spawned ranks."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, get_scheduler

import grass_dist
from integration_tests.support.model import CLIP, GLOBAL_BATCH, LENGTH, global_batch, small_llama

GRASS = {"active_layers": 3, "probe_steps": 2, "sampling_interval": 3, "update_interval": 3, "temperature": 0.4}
STEPS, ACCUMULATION, WARMUP, DECAY = 9, 2, 2, 0.1
SAVED_AT, SWITCHED_AT = 4, 5  # between a draw and its switch, and at one: draws are at 2, 3, 6, switches at 2, 5, 8
ADAMW = {"lr": 1e-3, "eps": 1e-6, "fused": True}  # Trainer's default is the fused one

DS_CONFIG = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "steps_per_print": 10**9,
}


def ds_config(stage: int, **more) -> dict:
    return {**DS_CONFIG, "zero_optimization": {**DS_CONFIG["zero_optimization"], "stage": stage}, **more}


def data(steps: int = STEPS) -> list[dict]:
    """One item a sequence, in the order of the steps' global batches."""
    return [{"input_ids": row, "labels": row} for step in range(steps) for row in global_batch(step)]


def arguments(folder: Path, world_size: int, kind: type = TrainingArguments, **more) -> Any:
    given = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": GLOBAL_BATCH // world_size // ACCUMULATION,
        "gradient_accumulation_steps": ACCUMULATION,
        "train_sampling_strategy": "sequential",
        "learning_rate": ADAMW["lr"],
        "adam_epsilon": ADAMW["eps"],
        "weight_decay": DECAY,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "linear",
        "warmup_steps": WARMUP,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return kind(**{**given, **more})


def optimizer_of(model) -> torch.optim.AdamW:
    """Trainer's parameter groups."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if "norm" not in n], "weight_decay": DECAY},
        {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **ADAMW)


def micro_batches(step: int, rank: int, world_size: int) -> list[torch.Tensor]:
    per = GLOBAL_BATCH // world_size // ACCUMULATION
    rows = global_batch(step)
    return [rows[(micro * world_size + rank) * per :][:per] for micro in range(ACCUMULATION)]


def loss_of(model, x: torch.Tensor, world_size: int) -> torch.Tensor:
    """The loss as Trainer scales it, for gradients that are averaged over the ranks."""
    items = torch.tensor(GLOBAL_BATCH * (LENGTH - 1)) / 1
    return model(input_ids=x, labels=x, num_items_in_batch=items).loss * world_size


def refused(make) -> str:
    try:
        make()
    except grass_dist.GrassError as error:
        return str(error)
    return "not refused"


def sizes(world_size: int, stage: int) -> dict:
    """`ds_config` as Hugging Face fills it in."""
    return {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world_size // ACCUMULATION,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "grass": GRASS,
    }


def zero_loop(rank: int, world_size: int, stage: int) -> dict:
    """The run that a Trainer is to make, over `grass_dist.initialize`."""
    from integration_tests.support.zero import full

    model = small_llama()
    optimizer = optimizer_of(model)
    scheduler = get_scheduler("linear", optimizer, WARMUP, STEPS)
    engine, *_ = grass_dist.initialize(model=model, optimizer=optimizer, config=sizes(world_size, stage))
    seen = {"layers": [], "lr": [], "norms": []}
    for step in range(STEPS):
        for x in micro_batches(step, rank, world_size):
            engine.backward(loss_of(engine, x, world_size), scale_wrt_gas=False)
            engine.step()
        seen["lr"].append(optimizer.param_groups[0]["lr"])
        seen["norms"].append(float(engine.get_global_grad_norm()))
        scheduler.step()
        seen["layers"].append(engine.grass.active_layers if engine.grass.phase == "train" else ())
    return {**seen, "params": {n: full(p) for n, p in engine.module.named_parameters()}}


def read(trainer: Trainer) -> dict:
    """What `zero_loop` gives, of a Trainer: weights, and the layers and learning rates that it has logged."""
    from integration_tests.support.zero import full

    rows = [row for row in trainer.state.log_history if "loss" in row]
    layers = [tuple(int(row[f"grass/active_{i}"]) for i in range(3) if f"grass/active_{i}" in row) for row in rows]
    params = {n.removeprefix("module."): full(p) for n, p in trainer.model.named_parameters()}
    return {
        "layers": layers,
        "lr": [row["learning_rate"] for row in rows],
        "norms": [row["grad_norm"] for row in rows],
        "params": params,
        "rows": rows,
    }


def zero_trainer(rank: int, world_size: int, folder: Path, config: dict, **more) -> Trainer:
    path = folder / f"ds_config_{rank}.json"
    path.write_text(json.dumps(config))
    args = arguments(folder / "run", world_size, deepspeed=str(path), **more)
    model = LlamaForCausalLM.from_pretrained(
        folder / "model", attn_implementation="eager"
    )  # under zero.Init at stage 3
    return Trainer(model=model, args=args, train_dataset=data(), eval_dataset=data(1))


def on_zero(rank: int, world_size: int, stage: int, folder: Path, offload: bool) -> dict:
    """A loop, a Trainer, and one that continues from the Trainer's checkpoint; with ``offload`` also an evaluation."""
    seen: dict = {"loop": zero_loop(rank, world_size, stage)}
    if rank == 0:
        small_llama().save_pretrained(folder / "model")
    torch.distributed.barrier()
    grass_dist.enable()
    config = ds_config(stage, grass=GRASS)
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        seen["evaluated"] = zero_trainer(rank, world_size, folder, config).evaluate()
    trainer = zero_trainer(rank, world_size, folder, config, save_strategy="steps", save_steps=SAVED_AT)
    trainer.train()
    seen["trainer"] = read(trainer)
    seen["updated by"] = type(trainer.optimizer.optimizer.user_optimizer)
    resumed = zero_trainer(rank, world_size, folder, config)
    resumed.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{SAVED_AT}"))
    seen["resumed"] = read(resumed)
    return seen


def ddp_loop(rank: int, world_size: int) -> dict:
    """The run that a Trainer without DeepSpeed is to make, over `GrassOptimizer`."""
    model = DistributedDataParallel(small_llama())
    inner = optimizer_of(model)
    optimizer = grass_dist.GrassOptimizer(
        model,
        torch.optim.AdamW,
        ADAMW,
        config=grass_dist.GrassConfig(**GRASS),
        params=inner.param_groups,
        gradient_accumulation_steps=ACCUMULATION,
    )
    scheduler = get_scheduler("linear", optimizer, WARMUP, STEPS)
    seen = {"layers": [], "lr": [], "norms": []}
    for step in range(STEPS):
        for micro, x in enumerate(micro_batches(step, rank, world_size)):
            with contextlib.nullcontext() if micro == ACCUMULATION - 1 else model.no_sync():
                loss_of(model, x, world_size).backward()
        seen["norms"].append(float(optimizer.clip_grad_norm_(CLIP)))
        optimizer.step()
        optimizer.zero_grad()
        seen["lr"].append(optimizer.param_groups[0]["lr"])
        scheduler.step()
        seen["layers"].append(optimizer.grass.active_layers if optimizer.grass.phase == "train" else ())
    return {**seen, "params": {n: p.detach().clone() for n, p in model.module.named_parameters()}}


def ddp_trainer(world_size: int, folder: Path, **more) -> Trainer:
    return Trainer(model=small_llama(), args=arguments(folder, world_size, **more), train_dataset=data())


def accelerate_loop(rank: int, world_size: int, fsdp2: bool) -> dict:
    """The run of `ddp_loop` over Accelerate, with a schedule that is made before the optimizer is replaced."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    if fsdp2:  # which Accelerate itself turns on for devices only
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    model: Any = small_llama()
    inner = optimizer_of(model)
    scheduler = get_scheduler("linear", inner, WARMUP * world_size, STEPS * world_size)  # stepped once a process
    model, optimizer, scheduler = accelerator.prepare(model, inner, scheduler)
    grass = optimizer.optimizer.grass
    seen: dict = {"layers": [], "lr": [], "backend": grass.backend.name}
    for step in range(STEPS):
        for x in micro_batches(step, rank, world_size):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, x, world_size) * ACCUMULATION)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    seen["lr"].append(inner.param_groups[0]["lr"])
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        seen["layers"].append(grass.active_layers if grass.phase == "train" else ())
    seen["saved"] = refused(optimizer.state_dict) if fsdp2 else None
    accelerator.state._reset_state(reset_partial_state=True)
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}
    return {**seen, "params": {n.removeprefix("module."): p for n, p in whole.items()}}


def on_ddp(rank: int, world_size: int, folder: Path) -> dict:
    seen: dict = {"loop": ddp_loop(rank, world_size)}
    grass_dist.enable(grass_dist.GrassConfig(**GRASS))
    seen["accelerate"] = accelerate_loop(rank, world_size, fsdp2=False)
    seen["accelerate, fsdp2"] = accelerate_loop(rank, world_size, fsdp2=True)
    trainer = ddp_trainer(world_size, folder, save_strategy="steps", save_steps=SWITCHED_AT)
    trainer.train()
    seen["trainer"] = read(trainer)
    resumed = ddp_trainer(world_size, folder)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{SWITCHED_AT}"))
    seen["resumed"] = read(resumed)
    return seen


def on_configured_zero(rank: int, world_size: int, scheduler: bool, folder: Path) -> dict:
    """The optimizer and perhaps the scheduler are sections of the ds_config, full of "auto"."""
    from integration_tests.support.zero import full

    warmup = {"warmup_min_lr": 0, "warmup_max_lr": ADAMW["lr"], "warmup_num_steps": WARMUP}
    adamw = {"lr": ADAMW["lr"], "betas": [0.9, 0.999], "eps": ADAMW["eps"], "weight_decay": DECAY}
    sections: dict = {"optimizer": {"type": "AdamW", "params": adamw}}
    more: dict = {"lr_scheduler": lambda optimizer: get_scheduler("linear", optimizer, WARMUP, STEPS)}
    if scheduler:
        sections["scheduler"], more = {"type": "WarmupLR", "params": warmup}, {}
    model = small_llama()
    config = {**sizes(world_size, 2), **sections}
    engine, *_ = grass_dist.initialize(model=model, model_parameters=model.parameters(), config=config, **more)
    for step in range(STEPS):
        for x in micro_batches(step, rank, world_size):
            engine.backward(loss_of(engine, x, world_size), scale_wrt_gas=False)
            engine.step()
    seen: dict = {"loop": {"params": {n: full(p) for n, p in engine.module.named_parameters()}}}
    if rank == 0:
        small_llama().save_pretrained(folder / "model")
    torch.distributed.barrier()
    grass_dist.enable()
    auto = {k: {**section, "params": dict.fromkeys(section["params"], "auto")} for k, section in sections.items()}
    trainer = zero_trainer(rank, world_size, folder, ds_config(2, grass=GRASS, **auto))
    trainer.train()
    return {**seen, "trainer": read(trainer)}
