"""`enable`: a Trainer makes the very run that a loop over grass_dist makes, continues it, and logs it."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, get_scheduler
from typer.testing import CliRunner

import grass_dist
from grass_dist.checkpoint.marker import read_marker
from grass_dist.cli import app
from grass_dist.report import load_run
from integration_tests.support.fsdp_on_cpu import fsdp2_plugin, put_fsdp2_in
from integration_tests.support.model import CLIP, GLOBAL_BATCH, LENGTH, VOCAB, global_batch, small_llama
from integration_tests.support.ranks import refused, run_ranks

pytestmark = pytest.mark.timeout(300)

GRASS = {"active_layers": 3, "probe_steps": 2, "sampling_interval": 3, "update_interval": 3, "temperature": 0.4}
STEPS, ACCUMULATION, WARMUP, DECAY = 9, 2, 2, 0.1
# Between a draw and its switch, and at one: draws are at 0, 1, 4, 7, switches at 0, 3, 6, 9.
SAVED_AT, SWITCHED_AT = 4, 6
ADAMW = {"lr": 1e-3, "eps": 1e-6, "fused": True}  # Trainer's default is the fused one

DRAWN = [*[(0, 1, 2)] * 2, *[(0, 1, 5)] * 3, *[(1, 2, 6)] * 3, (0, 4, 5)]

PROBE = GRASS["probe_steps"]
STEPS_OF_LOOP = [*range(PROBE), *range(STEPS)]  # whose batches: a probe's are trained on again

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


def check_same(run: dict, loop: dict, tolerance: float = 0.0) -> None:
    worst = max((run["params"][n] - p).abs().max().item() for n, p in loop["params"].items())
    print(f"worst parameter difference {worst:.1e}")  # shown by pytest -rP
    assert run["params"].keys() == loop["params"].keys() and worst <= tolerance
    assert run["layers"] == loop["layers"] == DRAWN
    assert run["lr"] == pytest.approx(loop["lr"], rel=1e-12)
    assert run.get("norms", loop["norms"]) == pytest.approx(loop["norms"], rel=1e-6)


def check_report(folder: Path, run: dict, backend: str) -> None:
    """The record that a Trainer and one that went on from its checkpoint have left, and the page of it."""
    record = load_run(folder)
    info, train = record.info, record.train_steps
    assert (info.backend, info.world_size, info.layer_names[0]) == (backend, 2, "model.layers.0")
    assert [s.step for s in record.steps] == list(range(1, PROBE + STEPS + 1)) and len(record.probe_steps) == PROBE
    # A row of the log has the layers of the step to come.
    assert [s.active_layers for s in train] == [record.samples[0].active_layers, *run["layers"][:-1]]
    assert [s.loss for s in train] == pytest.approx([row["loss"] for row in run["rows"]], rel=1e-6)
    assert [s.lr for s in train] == run["lr"]
    assert [s.grad_norm for s in train] == pytest.approx(run["norms"], rel=1e-6)
    sent = 4 * (ACCUMULATION if "ZeRO" in backend else 1)  # ZeRO reduces each micro-batch
    for step in record.steps:
        always = info.params_always_active if step.phase == "train" else 0
        trains = sum(info.layer_numel[layer] for layer in step.active_layers) + always
        assert step.bytes_reduced == pytest.approx(sent * trains, rel=1e-3) and step.state_bytes > 0
    assert [e.step for e in record.refreshes] == [2, 3, 6, 9] and [e.step for e in record.samples] == [2, 5, 8, 11]
    assert info.params_total == sum(p.numel() for p in small_llama().parameters()) and record.end
    shown = CliRunner().invoke(app, ["report", str(folder)])
    assert shown.exit_code == 0 and (folder / "report.html").exists(), shown.output


def check_rows(run: dict) -> None:
    """The method's numbers in the rows of a Trainer's log, one a step."""
    rows = run["rows"]
    assert [row["grass/round"] for row in rows] == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert {key for row in rows for key in row if key.startswith("grass/")} == {"grass/round", "grass/layers"}


# Under ZeRO.


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
    for at, step in enumerate(STEPS_OF_LOOP):
        for x in micro_batches(step, rank, world_size):
            engine.backward(loss_of(engine, x, world_size), scale_wrt_gas=False)
            engine.step()
        if at < PROBE:
            continue
        seen["lr"].append(optimizer.param_groups[0]["lr"])
        seen["norms"].append(float(engine.get_global_grad_norm()))
        scheduler.step()
        seen["layers"].append(engine.grass.active_layers)
    return {**seen, "params": {n: full(p) for n, p in engine.module.named_parameters()}}


def read(trainer: Trainer) -> dict:
    """What `zero_loop` gives, of a Trainer: weights, and the layers and learning rates that it has logged."""
    from integration_tests.support.zero import full

    rows = [row for row in trainer.state.log_history if "loss" in row]
    layers = [tuple(map(int, row["grass/layers"].split())) for row in rows]
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
    grass_dist.enable(report=True)
    config = ds_config(stage, grass=GRASS)
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        seen["evaluated"] = zero_trainer(rank, world_size, folder, config).evaluate()
    trainer = zero_trainer(rank, world_size, folder, config, save_strategy="steps", save_steps=SAVED_AT)
    trainer.train()
    seen["trainer"] = read(trainer)
    seen["marked"] = read_marker(folder / "run" / f"checkpoint-{SAVED_AT}")
    seen["updated by"] = type(trainer.optimizer.optimizer.user_optimizer)
    saved = str(folder / "run" / f"checkpoint-{SAVED_AT}")
    resumed = zero_trainer(rank, world_size, folder, config)
    resumed.train(resume_from_checkpoint=saved)
    seen["resumed"] = read(resumed)
    seen["changed"] = []
    for change in ({"active_layers": 2}, {"seed": 9}, {"sampler": "uniform"}, {"probe_steps": 4}):
        other = zero_trainer(rank, world_size, folder, {**config, "grass": {**GRASS, **change}})
        seen["changed"].append(refused(lambda other=other: other.train(resume_from_checkpoint=saved)))
    other = zero_trainer(rank, world_size, folder, config, optim="rmsprop")
    seen["changed"].append(refused(lambda: other.train(resume_from_checkpoint=saved)))
    return seen


OTHER = (
    "active_layers=3 in the saved state, and 2 here",
    "seed=0 in the saved state, and 9 here",
    "sampler='grass' in the saved state, and 'uniform' here",
    "probe_steps=2 in the saved state, and 4 here",
    "optimizer class='AdamW' in the saved state, and 'RMSprop' here",
)


@pytest.mark.parametrize(("stage", "offload"), [(2, False), pytest.param(3, True, marks=pytest.mark.integration)])
def test_zero(stage, offload, tmp_path):
    for rank in run_ranks(2, on_zero, stage, tmp_path, offload, timeout=240):
        assert min(rank["loop"]["norms"]) > 2 * CLIP  # clipping binds at every step
        check_same(rank["trainer"], rank["loop"])
        check_same(rank["resumed"], rank["loop"])
        check_rows(rank["trainer"])
        check_rows(rank["resumed"])
        assert rank["marked"] and rank["marked"]["step"] == PROBE + SAVED_AT and rank["marked"]["round"] == 1
        told = zip(rank["changed"], OTHER, strict=True)
        assert all(sentence.startswith(f"CheckpointError: {other}") for sentence, other in told), rank["changed"]
        if offload:
            assert rank["updated by"] is torch.optim.AdamW  # not DeepSpeedCPUAdam
            assert rank["evaluated"]["eval_loss"] == pytest.approx(math.log(VOCAB), rel=0.1)
            assert not [key for key in rank["evaluated"] if "grass" in key]
    check_report(tmp_path / "run", rank["resumed"], f"DeepSpeed ZeRO-{stage}")


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
    schedule = engine.lr_scheduler
    for at, step in enumerate(STEPS_OF_LOOP):
        engine.lr_scheduler = schedule if at >= PROBE else None
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


@pytest.mark.parametrize(
    "scheduler",
    [pytest.param(True, marks=pytest.mark.integration), pytest.param(False, marks=pytest.mark.integration)],
    ids=["ds scheduler", "hf scheduler"],
)
def test_zero_with_the_optimizer_of_the_ds_config(scheduler, tmp_path):
    for rank in run_ranks(2, on_configured_zero, scheduler, tmp_path, timeout=240):
        assert all(torch.equal(rank["trainer"]["params"][n], p) for n, p in rank["loop"]["params"].items())
        assert rank["trainer"]["layers"] == DRAWN


# Without DeepSpeed.


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
    for at, step in enumerate(STEPS_OF_LOOP):
        for micro, x in enumerate(micro_batches(step, rank, world_size)):
            with contextlib.nullcontext() if micro == ACCUMULATION - 1 else model.no_sync():
                loss_of(model, x, world_size).backward()
        norm = float(optimizer.clip_grad_norm_(CLIP))
        optimizer.step()
        optimizer.zero_grad()
        if at < PROBE:
            continue
        seen["norms"].append(norm)
        seen["lr"].append(optimizer.param_groups[0]["lr"])
        scheduler.step()
        seen["layers"].append(optimizer.grass.active_layers)
    return {**seen, "params": {n: p.detach().clone() for n, p in model.module.named_parameters()}}


def ddp_trainer(world_size: int, folder: Path, **more) -> Trainer:
    return Trainer(model=small_llama(), args=arguments(folder, world_size, **more), train_dataset=data())


def accelerate_loop(rank: int, world_size: int, fsdp2: bool) -> dict:
    """The run of `ddp_loop` over Accelerate, with a schedule that is made before the optimizer is replaced."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    if fsdp2:
        put_fsdp2_in(accelerator, fsdp2_plugin())
    model: Any = small_llama()
    inner = optimizer_of(model)
    scheduler = get_scheduler("linear", inner, WARMUP * world_size, STEPS * world_size)  # stepped once a process
    model, optimizer, scheduler = accelerator.prepare(model, inner, scheduler)
    grass = optimizer.optimizer.grass
    seen: dict = {"layers": [], "lr": [], "backend": grass.backend.name}
    for at, step in enumerate(STEPS_OF_LOOP):
        for x in micro_batches(step, rank, world_size):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, x, world_size) * ACCUMULATION)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    seen["lr"].append(inner.param_groups[0]["lr"])
                optimizer.step()
                if at >= PROBE:
                    scheduler.step()
                optimizer.zero_grad()
        seen["layers"].append(grass.active_layers)
    seen = {name: values[PROBE:] if isinstance(values, list) else values for name, values in seen.items()}
    accelerator.state._reset_state(reset_partial_state=True)
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}
    return {**seen, "params": {n.removeprefix("module."): p for n, p in whole.items()}}


def on_ddp(rank: int, world_size: int, folder: Path) -> dict:
    seen: dict = {"loop": ddp_loop(rank, world_size)}
    grass_dist.enable(grass_dist.GrassConfig(**GRASS), report=True)
    seen["accelerate"] = accelerate_loop(rank, world_size, fsdp2=False)
    seen["accelerate, fsdp2"] = accelerate_loop(rank, world_size, fsdp2=True)
    trainer = ddp_trainer(world_size, folder, save_strategy="steps", save_steps=SWITCHED_AT)
    trainer.train()
    seen["trainer"] = read(trainer)
    resumed = ddp_trainer(world_size, folder)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{SWITCHED_AT}"))
    seen["resumed"] = read(resumed)
    return seen


def test_without_deepspeed(tmp_path):
    for rank in run_ranks(2, on_ddp, tmp_path, timeout=240):
        check_same(rank["trainer"], rank["loop"])
        check_same(rank["resumed"], rank["loop"])
        check_rows(rank["trainer"])
        assert rank["accelerate"]["backend"] == "ddp"
        check_same(rank["accelerate"], rank["loop"])
        assert rank["accelerate, fsdp2"]["backend"] == "fsdp2"
        check_same(rank["accelerate, fsdp2"], rank["loop"], tolerance=1e-6)
    check_report(tmp_path, rank["resumed"], "ddp")


# TRL.


def sft_trainer(world_size: int, folder: Path, config: dict | None, **more) -> Any:
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
    texts = [{"text": " ".join(f"w{i}" for i in item["input_ids"].tolist())} for item in data()]
    given = {"report_to": "tensorboard", "max_length": LENGTH, **more}
    args = arguments(folder, world_size, SFTConfig, deepspeed=config, **given)
    return SFTTrainer(small_llama(), args=args, train_dataset=Dataset.from_list(texts), processing_class=processing)


def on_sft(rank: int, world_size: int, folder: Path) -> dict:
    """TRL under ZeRO-2, then a model that is not trained with the same ds_config."""
    from trl.models.utils import prepare_deepspeed

    grass_dist.enable()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    trainer = sft_trainer(world_size, folder, ds_config(2, grass=GRASS))
    trainer.train()
    reference = prepare_deepspeed(small_llama(), trainer.accelerator)
    return {**read(trainer), "reference": hasattr(reference, "grass")}


def test_trl_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, second = run_ranks(2, on_sft, tmp_path, timeout=240)
    assert first["layers"] == second["layers"] and len(set(first["layers"])) == 4
    assert all(torch.equal(first["params"][n], p) for n, p in second["params"].items())
    check_rows(first)
    assert first["rows"][-1]["loss"] < first["rows"][2]["loss"]
    assert not first["reference"]  # the model that is not trained is DeepSpeed's own
    written = EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0})
    written.Reload()
    assert [event.step for event in written.Histograms("train/grass/importances")] == [0, 1, 4, 7]
    assert [event.value for event in written.Scalars("train/grass/round")] == [
        row["grass/round"] for row in first["rows"]
    ]
    tokens = GLOBAL_BATCH * LENGTH
    assert [row["num_tokens"] for row in first["rows"]] == [tokens * step for step in range(1, STEPS + 1)]
