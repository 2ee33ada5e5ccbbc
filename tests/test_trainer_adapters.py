"""Adapters under Hugging Face Trainer: those of `grass.adapters`, and those that a `PeftModel` brings along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grass_dist import (
    CheckpointError,
    ConfigError,
    GrassConfig,
    GrassOptimizer,
    adapter_groups,
    add_adapters,
    enable,
    merge_adapters,
)
from grass_dist.huggingface.adapters import BASE
from grass_dist.model.adapters import adapter_parameters
from integration_tests.support.program import make_model
from tests.trainers import CONFIG, llama, rows, run_of, switched_off

__all__ = ["switched_off"]

peft = pytest.importorskip("peft")

SECTION = {"rank": 4, "alpha": 8, "learning_rate": 5e-3}
ADDED = CONFIG.model_copy(update={"adapters": GrassConfig(adapters=SECTION).adapters})
BESIDE = CONFIG.model_copy(update={"always_active": ("adapters", "final_norm")})
HOW = {"lr_scheduler_type": "constant", "optim": "adamw_torch", "max_grad_norm": 0.0, "learning_rate": 1e-3}
HOW |= {"max_steps": 8, "weight_decay": 0.1, "train_sampling_strategy": "sequential", "logging_steps": 1}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

pytestmark = pytest.mark.usefixtures("switched_off")


def peft_llama() -> Any:
    model = llama()
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR))


def by_hand(model: torch.nn.Module, config: GrassConfig) -> torch.nn.Module:
    """The loop that the Trainer is to make: a probe on the first batch, then all of them."""
    names = [name for name, _ in model.named_parameters()]
    decay = [p for n, p in model.named_parameters() if "norm" not in n]
    plain = [p for n, p in model.named_parameters() if "norm" in n]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = GrassOptimizer(
        model,
        torch.optim.AdamW,
        {"lr": 1e-3},
        config=config,
        params=adapter_groups(model, config, groups),
    )
    batches = torch.stack([row["input_ids"] for row in rows()]).view(4, 2, 6)
    for step in (0, *range(8)):
        x = batches[step % 4]
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [name for name, _ in model.named_parameters()] == names
    return model


def check_same(run: Any, loop: torch.nn.Module) -> None:
    own = dict(run.model.named_parameters())
    worst = max((own[n] - p).abs().max().item() for n, p in loop.named_parameters())
    assert own.keys() == dict(loop.named_parameters()).keys() and worst < 1e-6


def test_a_trainer_adds_them_and_trains_as_a_loop(tmp_path):
    enable(ADDED)
    run = run_of(tmp_path, **HOW)
    run.train()
    assert [group["lr"] for group in run.optimizer.param_groups] == [1e-3, 1e-3, 5e-3]
    check_same(run, by_hand(add_adapters(llama(), ADDED), ADDED))
    with torch.no_grad():
        x = rows()[0]["input_ids"][None]
        wanted = run.model(input_ids=x).logits
        merge_adapters(run.model).save_pretrained(tmp_path / "merged")
        found = type(run.model).from_pretrained(tmp_path / "merged")(input_ids=x).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_peft_model_trains_beside_its_adapters(tmp_path, caplog):
    enable(BESIDE)
    run = run_of(tmp_path, model=peft_llama(), **HOW)
    run.train()
    assert caplog.text.count("parameters that peft had frozen have requires_grad again") == 1
    assert caplog.text.count("writes its adapters alone: trainer.model.merge_and_unload()") == 1
    loop = by_hand(peft_llama(), BESIDE)
    check_same(run, loop)
    start = dict(peft_llama().named_parameters())
    moved = {n for n, p in loop.named_parameters() if not torch.equal(p, start[n])}
    assert any("base_layer" in name for name in moved) and any("model.norm" in name for name in moved)
    assert not any("embed_tokens" in name or "lm_head" in name for name in moved)


@pytest.mark.parametrize(("config", "make"), [(ADDED, llama), (BESIDE, peft_llama)], ids=["added", "peft"])
def test_a_trainer_goes_on_from_its_checkpoint(tmp_path, config, make):
    enable(config)
    whole = run_of(tmp_path / "whole", model=make(), **HOW)
    whole.train()
    first = run_of(tmp_path / "cut", model=make(), **{**HOW, "save_strategy": "steps", "save_steps": 5})
    first.train()
    folder = tmp_path / "cut" / "checkpoint-5"
    then = run_of(tmp_path / "then", model=make(), **HOW)
    then.train(resume_from_checkpoint=str(folder))
    own, wanted = dict(then.model.named_parameters()), dict(whole.model.named_parameters())
    assert all(torch.equal(own[name], p) for name, p in wanted.items())
    if make is peft_llama:
        assert not any("lora" in name for name in load_file(folder / BASE))
        (folder / BASE).unlink()
        with pytest.raises(CheckpointError, match=rf"holds adapters alone and no {BASE}"):
            run_of(tmp_path / "no", model=make(), **HOW).train(resume_from_checkpoint=str(folder))


def test_without_the_role_a_peft_model_trains_as_ever(tmp_path):
    enable(CONFIG)
    run = run_of(tmp_path, model=peft_llama(), **HOW)
    run.train()
    start = dict(peft_llama().named_parameters())
    added = {name for name, _ in adapter_parameters(run.model)}
    assert {n for n, p in run.model.named_parameters() if not torch.equal(p, start[n])} <= added


def test_an_optimizer_with_a_scheduler_needs_their_group(tmp_path):
    enable(ADDED)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    run = run_of(tmp_path, model=model, **HOW)
    run.optimizer, run.lr_scheduler = optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with pytest.raises(ConfigError, match=r"has a scheduler already.*grass_dist\.adapter_groups\(model, config\)"):
        run.train()


def test_a_loop_over_accelerate_adds_them_first():
    from accelerate import Accelerator

    enable(ADDED)
    model = llama()
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ConfigError, match=r"grass\.adapters.*call grass_dist\.add_adapters\(model, config\) before"):
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    added = add_adapters(llama(), ADDED)
    _, prepared = accelerator.prepare(added, torch.optim.AdamW(added.parameters(), lr=1e-3))
    assert [group["lr"] for group in prepared.param_groups] == [1e-3, 5e-3]


def test_trl_makes_a_peft_model_that_trains(tmp_path: Path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    enable(BESIDE)
    source = make_model(tmp_path / "model")
    data = datasets.Dataset.from_list([{"text": "ann has one apples plus two is three"}] * 8)
    given = {"max_steps": 3, "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False}
    args = trl.SFTConfig(str(tmp_path), per_device_train_batch_size=2, **given)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR)
    words, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    run = trl.SFTTrainer(model, args, train_dataset=data, peft_config=lora, processing_class=words)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.train()
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("base_layer" in name for name in moved) and any("lora_B" in name for name in moved)
