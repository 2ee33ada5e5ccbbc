"""What `enable` wraps, refuses and logs, in one process; integration_tests/test_trainer.py trains with it."""

from __future__ import annotations

import functools
import math
import os
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import accelerate
import deepspeed
import transformers
from accelerate.state import AcceleratorState, GradientState

import grass_dist
from grass_dist import ConfigError, GrassConfig, GrassError, GrassOptimizer, UnsupportedModel, disable, enable
from grass_dist import huggingface as trainer
from grass_dist.deepspeed import stock_initialize
from tests.tiny import loss_of, tiny

CONFIG = GrassConfig(active_layers=2, probe_steps=1, sampling_interval=2, update_interval=2)
ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
OWNERS = (
    (deepspeed, "initialize"),
    (accelerate.Accelerator, "prepare"),
    (transformers.Trainer, "train"),
    (transformers.Trainer, "log"),
)


@pytest.fixture(autouse=True)
def stock():
    """The four functions as they were; all is undone after a test."""
    yield [getattr(owner, name) for owner, name in OWNERS]
    disable()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def now():
    return [getattr(owner, name) for owner, name in OWNERS]


# --- on and off


def test_wraps_once_and_undoes_it(stock):
    enable()
    first = now()
    enable(CONFIG)
    assert now() == first and not set(first) & set(stock)
    assert [function.__wrapped__ for function in first] == stock
    assert stock_initialize() is stock[0]
    disable()
    assert now() == stock
    disable()
    assert now() == stock


def test_what_another_library_wraps_around_ours_is_left_alone(stock, monkeypatch):
    enable(CONFIG)
    ours = transformers.Trainer.log

    @functools.wraps(ours)
    def theirs(*args, **kwargs):
        return ours(*args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "log", theirs)
    disable()
    assert transformers.Trainer.log is theirs and now()[:3] == stock[:3]
    logs = {"loss": 1.0}
    monkeypatch.setattr(trainer, "_numbers", lambda engine: pytest.fail("GRASS is off"))
    state = SimpleNamespace(epoch=None, global_step=1, log_history=[])
    handler = SimpleNamespace(on_log=lambda *_: None)
    args = SimpleNamespace(include_num_input_tokens_seen="no")
    theirs(SimpleNamespace(state=state, callback_handler=handler, args=args, control=None), logs)
    assert state.log_history == [{"loss": 1.0, "step": 1}]
    enable()
    assert transformers.Trainer.log is theirs  # and ours, inside of it, is on again
    monkeypatch.setattr(transformers.Trainer, "log", ours)


def test_a_library_that_cannot_be_imported_is_named(monkeypatch, caplog):
    def broken(name):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(trainer.importlib, "import_module", broken)
    enable()
    assert "deepspeed is installed but cannot be imported (no compiler)" in caplog.text
    monkeypatch.setattr(trainer.importlib.util, "find_spec", lambda name: None)
    caplog.clear()
    enable()
    assert not caplog.text


# --- with DeepSpeed


def initialize(config, optimizer=None, name="config_params"):
    def stock(args=None, model=None, optimizer=None, config=None, config_params=None):
        return "stock"

    return trainer._initialize(stock, model=tiny(), optimizer=optimizer, **{name: config})


@pytest.mark.parametrize("config", [{}, {"grass": False}, {"grass": None, "optimizer": {"type": "AdamW"}}])
def test_without_a_block_the_engine_is_deepspeeds(config):
    enable()
    assert initialize(config, torch.optim.AdamW(tiny().parameters())) == "stock"


@pytest.mark.parametrize("section", [{}, {"optimizer": {"type": None}}], ids=["no section", "no type"])
def test_a_model_that_is_not_trained_stays_deepspeeds(section):
    enable(CONFIG)
    assert initialize({"grass": {"active_layers": 2}, **section}) == "stock"
    assert initialize({"grass": {"active_layers": 2}, **section}, name="config") == "stock"


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ({**CONFIG.model_dump(), "temperature": 0.5}, r"grass.temperature=0.5: enable\(\) was given 1.0, and under"),
        (None, r"grass.active_layers=None: enable\(\) was given 2, .*; write it there, or call enable\(\) without"),
    ],
    ids=["another", "none"],
)
def test_enable_and_the_ds_config_must_not_differ(block, sentence):
    enable(CONFIG)
    with pytest.raises(ConfigError, match=sentence):
        initialize({"grass": block}, torch.optim.AdamW(tiny().parameters()))


def test_offload_does_not_make_accelerate_change_the_optimizer():
    enable()
    config = {"grass": {"active_layers": 2}, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    plugin = SimpleNamespace(deepspeed_config=config)
    accelerator = SimpleNamespace(distributed_type="DEEPSPEED", deepspeed_plugin=plugin)
    assert trainer._prepare(lambda _, *args: args, accelerator, 1, 2) == (1, 2)
    assert config["zero_force_ds_cpu_optimizer"] is False
    del config["grass"], config["zero_force_ds_cpu_optimizer"]
    trainer._prepare(lambda _, *args: args, accelerator)
    assert "zero_force_ds_cpu_optimizer" not in config


# --- without DeepSpeed


def groups_of(model):
    params = list(model.parameters())
    return [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0}]


def prepared(order, accumulation=1):
    """(accelerator, model, accelerated optimizer, inner optimizer, scheduler), prepared in the calls of ``order``."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    made = {"model": tiny()}
    made["optimizer"] = inner = torch.optim.AdamW(groups_of(made["model"]), **ADAMW)
    made["scheduler"] = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1 / (1 + step))
    for call in order:
        given = accelerator.prepare(*(made[name] for name in call))
        made.update(zip(call, given if len(call) > 1 else [given], strict=True))
    return accelerator, made["model"], made["optimizer"], inner, made["scheduler"]


@pytest.mark.parametrize(
    "order",
    [[("scheduler", "optimizer", "model")], [("model",), ("optimizer",), ("scheduler",)]],
    ids=["one call", "separate calls"],
)
@pytest.mark.filterwarnings("error:.*lr_scheduler:UserWarning")
def test_an_accelerate_loop_is_a_loop_over_grass_optimizer(order):
    plain = tiny()
    ours = GrassOptimizer(
        plain, torch.optim.AdamW, ADAMW, config=CONFIG, params=groups_of(plain), gradient_accumulation_steps=2
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 1 / (1 + step))
    enable(CONFIG)
    accelerator, model, optimizer, inner, scheduler = prepared(order, accumulation=2)
    assert isinstance(optimizer.optimizer, GrassOptimizer) and optimizer.param_groups is inner.param_groups
    assert inner.param_groups[1].items() >= {"weight_decay": 0.0, "lr": 1e-2, "initial_lr": 1e-2}.items()
    for step in range(6):
        for micro in (0, 1):
            (loss_of(plain, 2 * step + micro) / 2).backward()
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, 2 * step + micro))
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        assert norm == ours.clip_grad_norm_(0.1)
        ours.step()
        schedule.step()
        ours.zero_grad()
        assert optimizer.optimizer.grass.active_layers == ours.grass.active_layers
        assert optimizer.param_groups[0]["lr"] == ours.param_groups[0]["lr"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert optimizer.optimizer.grass.importances == ours.grass.importances


def test_gradients_are_finished_before_clipping_at_a_steps_end():
    enable(CONFIG)
    accelerator, model, optimizer, *_ = prepared([("model", "optimizer")])
    calls = []
    optimizer.optimizer.grass.finish_gradients = lambda: calls.append("finished")
    for sync in (False, True):
        accelerator.gradient_state._set_sync_gradients(sync)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        accelerator.clip_grad_value_(model.parameters(), 1.0)
    assert calls == ["finished"] * 2


def test_trainer_says_how_many_micro_batches_a_step_has(monkeypatch):
    enable(CONFIG)
    accelerator = accelerate.Accelerator(cpu=True)
    model = tiny()

    def train(running):
        _, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        return optimizer.optimizer.grass.backend.accumulation_steps

    args = SimpleNamespace(gradient_accumulation_steps=3)
    assert trainer._train(train, SimpleNamespace(accelerator=accelerator, args=args)) == 3
    assert not trainer._TRAINING


def test_what_is_prepared_twice_or_has_no_config_is_left_alone():
    enable()
    accelerator, model, optimizer, inner, _ = prepared([("model", "optimizer")])
    assert optimizer.optimizer is inner
    enable(CONFIG)
    accelerator, model, optimizer, *_ = prepared([("model", "optimizer")])
    first = optimizer.optimizer
    assert accelerator.prepare(model, optimizer)[1].optimizer is accelerator.prepare(optimizer).optimizer is first


def test_refusals():
    enable(CONFIG)
    with pytest.raises(GrassError, match=r"given an optimizer \(AdamW\) before the model .*; prepare both in one call"):
        prepared([("optimizer",), ("model",)])
    accelerator, model, optimizer, *_ = prepared([("model", "optimizer")])
    with pytest.raises(UnsupportedModel, match="has a GrassOptimizer already"):
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    again = torch.nn.Sequential(model)
    with pytest.raises(GrassError, match="wrapped again, as auto_find_batch_size"):
        trainer._put_grass_in(optimizer, accelerator, [again], CONFIG)
    used = tiny()
    stepped = torch.optim.AdamW(used.parameters())
    loss_of(used, 0).backward()
    stepped.step()
    with pytest.raises(ConfigError, match="states already; pass one without"):
        accelerator.prepare(used, stepped)


@pytest.mark.parametrize(
    ("kind", "scaler", "sentence"),
    [
        ("MULTI_GPU", object(), "a GradScaler scales; use bf16"),
        ("XLA", None, "does not run under XLA"),
        ("MEGATRON_LM", None, "does not run under MEGATRON_LM"),
        ("FSDP", None, "save_only_model=False: .*; set it to true, or use DeepSpeed ZeRO-3"),
    ],
)
def test_what_is_refused_where_it_cannot_run(kind, scaler, sentence):
    model = tiny()
    running = SimpleNamespace(args=SimpleNamespace(save_strategy="steps", save_only_model=False))
    accelerator, accelerated = SimpleNamespace(distributed_type=kind), SimpleNamespace(scaler=scaler)
    with pytest.raises(GrassError, match=sentence):
        trainer._checked(torch.optim.AdamW(model.parameters()), accelerated, accelerator, model, running)


def test_adamw_is_made_from_the_defaults_that_it_takes():
    inner = torch.optim.AdamW(tiny().parameters(), lr=0.3, betas=(0.8, 0.9))
    kwargs = trainer._arguments_of(inner)
    assert kwargs.items() >= {"lr": 0.3, "betas": (0.8, 0.9)}.items() and "decoupled_weight_decay" not in kwargs
    torch.optim.AdamW(tiny().parameters(), **kwargs)


# --- logs


def log(optimizer, **logs):
    """What reaches Trainer's own `log`, through two wrappers around the optimizer."""
    holder = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    return trainer._log(lambda _, logs, start_time=None: logs, holder, logs, 1.0)


def test_the_numbers_in_the_logs():
    model = tiny()
    optimizer = GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=CONFIG)
    first = log(optimizer, loss=1.0)
    assert first == {"loss": 1.0, "grass/round": -1.0, "grass/entropy": pytest.approx(math.log(8))}
    loss_of(model, 0).backward()
    optimizer.step()
    second, third = log(optimizer, loss=1.0), log(optimizer, loss=1.0)
    grass = optimizer.grass
    assert [second[f"grass/active_{i}"] for i in (0, 1)] == list(grass.active_layers) and second["grass/round"] == 0
    assert tuple(second[f"grass/importance_{i:02d}"] for i in range(8)) == grass.importances
    assert second["grass/entropy"] == pytest.approx(-sum(p * math.log(p) for p in grass.probabilities))
    assert third.items() <= second.items() and not [key for key in third if "importance" in key]
    assert all(type(value) is float for value in second.values())


def test_evaluations_and_other_optimizers_are_logged_as_they_are():
    optimizer = GrassOptimizer(tiny(), torch.optim.AdamW, ADAMW, config=CONFIG)
    assert log(optimizer, eval_loss=1.0) == {"eval_loss": 1.0}
    assert log(torch.optim.AdamW(tiny().parameters()), loss=1.0) == {"loss": 1.0}
    assert log(None, loss=1.0) == {"loss": 1.0}
    assert trainer._controller_of(object()) is None
    turning = SimpleNamespace()
    turning.optimizer = turning
    assert trainer._controller_of(turning) is None


def test_both_are_public():
    assert (
        grass_dist.enable is enable and grass_dist.disable is disable and {"enable", "disable"} <= {*grass_dist.__all__}
    )
