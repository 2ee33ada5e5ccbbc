"""Hugging Face Trainer runs under `enable`, and the loops that they must equal; run by spawned ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, get_scheduler

import grass_dist
from integration_tests.model import CLIP, GLOBAL_BATCH, LENGTH, global_batch, small_llama

GRASS = {"active_layers": 3, "probe_steps": 2, "sampling_interval": 3, "update_interval": 3, "temperature": 0.4}
STEPS, SAVED_AT, ACCUMULATION, WARMUP, DECAY = 9, 4, 2, 2, 0.1  # draws at 2, 5 and 8; saved within an interval
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


def arguments(folder, world_size: int, **more) -> TrainingArguments:
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
    return TrainingArguments(**{**given, **more})


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


def zero_loop(rank: int, world_size: int, stage: int) -> dict:
    """The run that a Trainer is to make, over `grass_dist.initialize`."""
    from integration_tests.zero import full

    model = small_llama()
    optimizer = optimizer_of(model)
    scheduler = get_scheduler("linear", optimizer, WARMUP, STEPS)
    sizes = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world_size // ACCUMULATION,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "grass": GRASS,
    }
    engine, *_ = grass_dist.initialize(model=model, optimizer=optimizer, config=sizes)
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
    from integration_tests.zero import full

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


def zero_trainer(rank: int, world_size: int, folder: Path, config: dict, resume: bool = False, **more) -> dict:
    path = folder / f"ds_config_{rank}.json"
    path.write_text(json.dumps(config))
    args = arguments(folder / "run", world_size, deepspeed=str(path), **more)
    model = LlamaForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    trainer = Trainer(model=model, args=args, train_dataset=data())
    trainer.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{SAVED_AT}") if resume else None)
    return read(trainer)


def on_zero(rank: int, world_size: int, stage: int, folder: Path) -> dict:
    seen = {"loop": zero_loop(rank, world_size, stage)}
    if rank == 0:
        small_llama().save_pretrained(folder / "model")
    torch.distributed.barrier()
    grass_dist.enable()
    config = ds_config(stage, grass=GRASS)
    seen["trainer"] = zero_trainer(rank, world_size, folder, config, save_strategy="steps", save_steps=SAVED_AT)
    seen["resumed"] = zero_trainer(rank, world_size, folder, config, resume=True)
    return seen
