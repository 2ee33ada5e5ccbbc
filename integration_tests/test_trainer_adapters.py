"""Adapters under Trainer on several ranks: the weights of a loop in one process, and what is saved goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, Trainer

import grass_dist
from integration_tests.support.fsdp_on_cpu import Fsdp2Trainer, forget_fsdp2
from integration_tests.support.lora import lora
from integration_tests.support.model import CLIP, global_batch, small_llama
from integration_tests.support.ranks import refused, run_ranks
from integration_tests.test_trainer import (
    ADAMW,
    GRASS,
    STEPS_OF_LOOP,
    arguments,
    data,
    ds_config,
    loss_of,
    optimizer_of,
)

pytest.importorskip("peft")
pytestmark = [pytest.mark.timeout(900), pytest.mark.long]

AT = 4
ADDED = {**GRASS, "adapters": {"rank": 4, "alpha": 8, "learning_rate": 2e-3}}
BESIDE = {**GRASS, "always_active": ["adapters", "embeddings", "final_norm", "lm_head"]}
CONSTANT = {"lr_scheduler_type": "constant", "warmup_steps": 0}


def with_adapters(model: Any) -> Any:
    """A `PeftModel` of a user."""
    import peft

    torch.manual_seed(5)
    return peft.get_peft_model(model, lora())


def by_hand(settings: dict) -> dict[str, torch.Tensor]:
    """The run in one process, over `GrassOptimizer`."""
    config, model = grass_dist.GrassConfig(**settings), small_llama()
    model = grass_dist.add_adapters(model, config) if config.adapters else with_adapters(model)
    groups = grass_dist.adapter_groups(model, config, optimizer_of(model).param_groups)
    groups = [{k: group[k] for k in ("params", "weight_decay", "lr")} for group in groups]
    optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=config, params=groups)
    for step in STEPS_OF_LOOP:
        loss_of(model, global_batch(step), 1).backward()
        optimizer.clip_grad_norm_(CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def full(param: torch.nn.Parameter) -> torch.Tensor:
    if isinstance(param, DTensor):
        return param.full_tensor().detach()
    from integration_tests.support.zero import full as of_zero

    return of_zero(param)


def on_trainer(rank: int, world_size: int, kind: str, settings: dict, folder: Path) -> dict[str, Any]:
    """A Trainer that saves, and one that goes on from its checkpoint, if there is one."""
    if rank == 0:
        small_llama().save_pretrained(folder / "model")
    torch.distributed.barrier()
    zero = int(kind[-1]) if kind.startswith("zero") else None
    if zero:
        import deepspeed

        from integration_tests.support import zero as _of_zero  # noqa: F401

        deepspeed.init_distributed("gloo")  # or zero.Init takes this for a world of one rank
    grass_dist.enable(None if zero else grass_dist.GrassConfig(**settings))
    saves = not (kind == "fsdp2" and "adapters" not in settings)

    def trainer(save: bool) -> Trainer:
        how: dict[str, Any] = {**CONSTANT, **({"save_strategy": "steps", "save_steps": AT} if save else {})}
        if zero:
            path = folder / f"ds_config_{rank}.json"
            path.write_text(json.dumps(ds_config(zero, grass=settings)))
            how["deepspeed"] = str(path)
        if kind == "fsdp2":
            how |= {"fsdp": True, "fsdp_config": FSDP}
        args = arguments(folder / "run", world_size, **how)
        model = LlamaForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
        model = model if "adapters" in settings else with_adapters(model)
        return (Fsdp2Trainer if kind == "fsdp2" else Trainer)(model=model, args=args, train_dataset=data())

    def read(run: Trainer) -> dict[str, torch.Tensor]:
        return {n.removeprefix("module."): full(p) for n, p in run.model.named_parameters()}

    first = trainer(saves)
    first.train()
    seen: dict[str, Any] = {"first": read(first), "rates": [g["lr"] for g in first.optimizer.param_groups]}
    if not saves:
        forget_fsdp2(first.accelerator)
        return {**seen, "refused": refused(trainer(True).train)}
    if kind == "fsdp2":
        forget_fsdp2(first.accelerator)
    then = trainer(False)
    then.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{AT}"))
    return {**seen, "then": read(then)}


FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "state_dict_type": "SHARDED_STATE_DICT",
}


@pytest.mark.parametrize("settings", [ADDED, BESIDE], ids=["added", "peft"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2", "zero3"])
def test_ranks_train_and_go_on_as_a_loop_in_one_process(kind, settings, tmp_path):
    wanted = by_hand(settings)
    runs = run_ranks(2, on_trainer, kind, settings, tmp_path, timeout=400)
    for run in runs:
        for params in (run[name] for name in ("first", "then") if name in run):
            assert params.keys() == wanted.keys()
            worst = max((params[n] - p).abs().max().item() for n, p in wanted.items())
            print(f"worst parameter difference {worst:.1e}")
            assert worst <= 5e-6
        assert all(torch.equal(run["then"][n], p) for n, p in run["first"].items()) if "then" in run else True
        if "refused" in run:
            assert "save_strategy='steps': under FSDP Trainer saves the adapters of a PeftModel alone" in run["refused"]
        assert run["rates"] == ([1e-3, 1e-3, 2e-3] if settings is ADDED else [1e-3, 1e-3])
