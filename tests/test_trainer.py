"""What `enable` wraps, refuses and logs, in one process; integration_tests/test_trainer.py trains with it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import accelerate
import deepspeed
import transformers
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

import grass_dist
from grass_dist import (
    CheckpointError,
    ConfigError,
    GrassConfig,
    GrassError,
    GrassOptimizer,
    Refreshed,
    Sampled,
    UnsupportedModel,
    disable,
    enable,
)
from grass_dist.backends.zero.ds_config import split_ds_config
from grass_dist.checkpoint.marker import read_marker, write_marker
from grass_dist.cli import app
from grass_dist.deepspeed import stock_initialize
from grass_dist.huggingface import logs as logs_module
from grass_dist.huggingface import zero
from grass_dist.huggingface.logs import LayerLog, controller_of, log_numbers
from grass_dist.huggingface.prepare import arguments_of, checked_model, prepare_with_grass, put_grass_in
from grass_dist.huggingface.switch import TRAINING
from grass_dist.huggingface.trainer import check_switched_on, train_with_grass
from grass_dist.huggingface.zero import check_recomputation, initialize_engine
from tests.tiny import loss_of, tiny
from tests.trainers import CONFIG, llama, run_of, switched_off  # noqa: F401

ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
OWNERS = (
    (deepspeed, "initialize"),
    (accelerate.Accelerator, "prepare"),
    (transformers.Trainer, "train"),
    (transformers.Trainer, "evaluation_loop"),
    (transformers.Trainer, "log"),
)

pytestmark = pytest.mark.usefixtures("switched_off")


@pytest.fixture
def stock():
    """The five functions as they were."""
    return [getattr(owner, name) for owner, name in OWNERS]


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
    assert transformers.Trainer.log is theirs and now()[:4] == stock[:4]
    logs = {"loss": 1.0}
    monkeypatch.setattr(logs_module, "controller_of", lambda trainer: pytest.fail("GRASS is off"))
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

    monkeypatch.setattr(importlib, "import_module", broken)
    enable()
    assert "deepspeed is installed but cannot be imported (no compiler)" in caplog.text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    caplog.clear()
    enable()
    assert not caplog.text


# --- with DeepSpeed


def initialize(config, optimizer=None, name="config_params"):
    def stock(args=None, model=None, optimizer=None, config=None, config_params=None):
        return "stock"

    return initialize_engine(stock, model=tiny(), optimizer=optimizer, **{name: config})


@pytest.mark.parametrize("config", [{"grass": False}, {"grass": None, "optimizer": {"type": "AdamW"}}])
def test_a_block_that_says_no_leaves_the_engine_to_deepspeed(config):
    enable()
    assert initialize(config, torch.optim.AdamW(tiny().parameters())) == "stock"
    enable(CONFIG)
    with pytest.raises(ConfigError, match="grass=.*the ds_config switches GRASS off; leave one of them out"):
        initialize(config, torch.optim.AdamW(tiny().parameters()))


@pytest.mark.parametrize("name", ["config", "config_params"])
def test_a_ds_config_without_a_block_takes_enables(monkeypatch, name):
    class Given(dict):
        """The place of an engine."""

    monkeypatch.setattr(zero, "initialize_with", lambda stock, args, given, observers: [Given(given)])
    enable(CONFIG)
    optimizer = torch.optim.AdamW(tiny().parameters())
    [given] = initialize({"zero_optimization": {"stage": 2}}, optimizer, name)
    assert set(given) == {"model", "optimizer", "config"}
    setup = split_ds_config({**given["config"], "train_micro_batch_size_per_gpu": 1})
    assert setup.grass == CONFIG and setup.stage == 2
    assert initialize({"grass": CONFIG.model_dump()}, optimizer, name)[0][name]["grass"] == CONFIG.model_dump()


NOTHING = r'nothing would train by GRASS, .*call enable\(GrassConfig\(active_layers=4\)\), or .*"grass": .* into the ds'


def test_enable_without_any_configuration_is_refused():
    enable()
    with pytest.raises(ConfigError, match=NOTHING):
        initialize({}, torch.optim.AdamW(tiny().parameters()))
    with pytest.raises(ConfigError, match=NOTHING):
        prepared([("model", "optimizer")])
    accelerator = accelerate.Accelerator(cpu=True)
    with pytest.raises(ConfigError, match=NOTHING):
        train_with_grass(lambda _: pytest.fail("it trains"), SimpleNamespace(accelerator=accelerator))
    model = tiny()
    assert accelerator.prepare(model) is model  # an evaluation


@pytest.mark.parametrize("section", [{}, {"optimizer": {"type": None}}], ids=["no section", "no type"])
def test_a_model_that_is_not_trained_stays_deepspeeds(section):
    enable(CONFIG)
    assert initialize({"grass": {"active_layers": 2}, **section}) == "stock"
    assert initialize({"grass": {"active_layers": 2}, **section}, name="config") == "stock"


def test_enable_and_the_ds_config_must_not_differ():
    enable(CONFIG)
    block = {**CONFIG.model_dump(), "temperature": 0.5}
    sentence = r"temperature=0.5: enable\(\) was given 1.0, .*; write it there, or call enable\(\) without"
    with pytest.raises(ConfigError, match=sentence):
        initialize({"grass": block}, torch.optim.AdamW(tiny().parameters()))


def test_offload_does_not_make_accelerate_change_the_optimizer():
    enable()
    config = {"grass": {"active_layers": 2}, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    plugin = SimpleNamespace(deepspeed_config=config)
    accelerator = SimpleNamespace(distributed_type="DEEPSPEED", deepspeed_plugin=plugin)
    assert prepare_with_grass(lambda _, *args: args, accelerator, 1, 2) == (1, 2)
    assert config["zero_force_ds_cpu_optimizer"] is False
    del config["grass"], config["zero_force_ds_cpu_optimizer"]
    prepare_with_grass(lambda _, *args: args, accelerator)
    assert "zero_force_ds_cpu_optimizer" not in config
    enable(CONFIG)
    prepare_with_grass(lambda _, *args: args, accelerator)
    assert config["zero_force_ds_cpu_optimizer"] is False


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

    args, callbacks = SimpleNamespace(gradient_accumulation_steps=3), []
    running = SimpleNamespace(
        accelerator=accelerator,
        args=args,
        add_callback=callbacks.append,
        remove_callback=callbacks.remove,
        callback_handler=SimpleNamespace(callbacks=callbacks),
    )
    assert train_with_grass(train, running) == 3
    assert not TRAINING and not callbacks


def test_what_is_prepared_twice_is_left_alone():
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
        put_grass_in(optimizer, accelerator, [again], CONFIG)
    used = tiny()
    stepped = torch.optim.AdamW(used.parameters())
    loss_of(used, 0).backward()
    stepped.step()
    with pytest.raises(ConfigError, match="states already; pass one without"):
        accelerator.prepare(used, stepped)


@pytest.mark.parametrize(
    ("kind", "sentence"), [("XLA", "does not run under XLA"), ("MEGATRON_LM", "does not run under MEGATRON_LM")]
)
def test_what_is_refused_where_it_cannot_run(kind, sentence):
    model = tiny()
    with pytest.raises(GrassError, match=sentence):
        checked_model(torch.optim.AdamW(model.parameters()), SimpleNamespace(distributed_type=kind), model)


@pytest.mark.parametrize(
    ("release", "stage", "kwargs", "refused"),
    [
        ("0.16.9", 3, None, True),
        ("0.19.2", 3, {"use_reentrant": False}, True),
        ("0.19.2", 3, {"use_reentrant": True}, False),
        ("0.19.2", 2, None, False),
        ("0.19.3", 3, None, False),
    ],
)
def test_recomputing_of_frozen_layers_needs_a_release_that_can(monkeypatch, release, stage, kwargs, refused):
    enable()
    monkeypatch.setattr(zero, "deepspeed_version", lambda: release)
    monkeypatch.setattr(transformers, "__version__", "5.24.0")
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"grass": {"active_layers": 2}})
    trainer = SimpleNamespace(
        args=SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs),
        accelerator=SimpleNamespace(distributed_type="DEEPSPEED", deepspeed_plugin=plugin),
    )
    sentence = f"stage 3 of DeepSpeed {release} cannot recompute frozen layers"
    with pytest.raises(ConfigError, match=sentence) if refused else contextlib.nullcontext():
        check_recomputation(trainer)
    plugin.deepspeed_config = {"grass": False}
    check_recomputation(trainer)


# --- a GradScaler


def scaled_run(scale: float | None, clip: float | None, **scaler: float):
    """Twelve steps over Accelerate, with a scaler on a CPU, for which Accelerate makes none by itself."""
    enable(CONFIG)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="fp16" if scale else "no")
    if scale:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, **scaler)
    model = tiny()
    inner = torch.optim.AdamW(model.parameters(), **ADAMW)
    model, optimizer = accelerator.prepare(model, inner)
    accelerator.native_amp = True  # so that clipping unscales; not before, so that the forward is in fp32
    skipped = []
    for step in range(12):
        accelerator.backward(loss_of(model, step) * 2.0**6)
        if clip:
            accelerator.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
        optimizer.zero_grad()
    return model, optimizer.optimizer.grass, skipped


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_scaler_of_accelerate_changes_no_norm_and_no_weight(clip):
    model, grass, skipped = scaled_run(2.0**16, clip, growth_interval=2)
    other, plain, _ = scaled_run(None, clip)
    assert not any(skipped) and grass.step == plain.step == 12
    assert grass.importances == plain.importances and grass.active_layers == plain.active_layers
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_step_that_a_scaler_of_accelerate_skips_is_none():
    _, grass, skipped = scaled_run(2.0**127, None, backoff_factor=2.0**-20, growth_interval=100)
    assert skipped == [True] + [False] * 11 and grass.step == 11 and grass.skipped == 1


def test_adamw_is_made_from_the_defaults_that_it_takes():
    inner = torch.optim.AdamW(tiny().parameters(), lr=0.3, betas=(0.8, 0.9))
    kwargs = arguments_of(inner)
    assert kwargs.items() >= {"lr": 0.3, "betas": (0.8, 0.9)}.items() and "decoupled_weight_decay" not in kwargs
    torch.optim.AdamW(tiny().parameters(), **kwargs)


# --- whole runs of a Trainer


SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"active_layers": 3}, "active_layers=2 in the saved state, and 3 here"),
        ({"sampler": "uniform"}, "sampler='grass' in the saved state, and 'uniform' here"),
        ({"seed": 9}, "seed=0 in the saved state, and 9 here"),
        ({"probe_steps": 2}, "probe_steps=1 in the saved state, and 2 here"),
        ({}, "optimizer class='AdamW' in the saved state, and 'Adamax' here"),
    ],
    ids=["gamma", "sampler", "seed", "probe", "optimizer"],
)
def test_a_run_does_not_go_on_with_other_settings(tmp_path, change, sentence):
    enable(CONFIG)
    run_of(tmp_path, **SAVED).train()
    enable(CONFIG.model_copy(update=change))
    again = run_of(tmp_path, max_steps=8)
    if not change:
        again.optimizer = torch.optim.Adamax(groups_of(again.model), **ADAMW)
    with pytest.raises(CheckpointError, match=sentence):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step in (0, 4)  # transformers 4 reads it after the optimizer


def test_a_run_does_not_go_on_with_other_layers(tmp_path):
    enable(CONFIG)
    run_of(tmp_path, **SAVED).train()
    again = run_of(tmp_path, max_steps=8)
    again.model.model.layers[0].requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"layers \[0, 1, 2, 3\] compete, and here \[1, 2, 3\]"):
        again.train(resume_from_checkpoint=True)


def test_an_ordinary_checkpoint_gives_its_weights_and_says_so(tmp_path, caplog):
    first = run_of(tmp_path, **{**SAVED, "max_steps": 8}, learning_rate=1e-2, logging_steps=1)
    first.train()
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    enable(CONFIG.model_copy(update={"probe_steps": 3}))
    again = run_of(tmp_path, max_steps=8, learning_rate=1e-2, logging_steps=1)
    seen = []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append([p.detach().clone() for p in again.model.parameters()])

    again.add_callback(Look())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    [told] = [message for message in caplog.messages if "saved without GRASS" in message]
    assert told.endswith("its optimizer states are not. Moments start again, after a probe of 3 steps.")
    unmoved = [all(torch.equal(a, b) for a, b in zip(saved.parameters(), now, strict=True)) for now in seen]
    assert unmoved == [False] * 4
    assert controller_of(again).step == 3 + 4
    rates = [row["learning_rate"] for row in again.state.log_history if "loss" in row and row["step"] > 4]
    assert rates == pytest.approx([1e-2 * left / 8 for left in (4, 3, 2, 1)])


def test_a_checkpoint_is_marked_as_one_of_grass(tmp_path):
    enable(CONFIG)
    run = run_of(tmp_path, **SAVED)
    run.train()
    folder = tmp_path / "checkpoint-4"
    marked = read_marker(folder)
    assert marked and GrassConfig(**marked["config"]) == CONFIG
    active = list(controller_of(run).active_layers)
    assert (marked["step"], marked["phase"], marked["round"], marked["active_layers"]) == (1 + 4, "train", 2, active)
    enable()
    for resume in (True, str(folder)):
        with pytest.raises(ConfigError, match=r"checkpoint-4 is a checkpoint of a GRASS run, .* in its grass.json, or"):
            run_of(tmp_path, max_steps=8).train(resume_from_checkpoint=resume)
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert shown.exit_code == 0 and "5 steps done, phase train, round 2" in shown.output
    assert (
        "active_layers: 2" in shown.output
        and json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).output) == marked
    )
    (folder / "grass.json").write_text('{"format": "grass_dist marker"}')
    assert CliRunner().invoke(app, ["inspect", str(folder.parent), "--json"]).output == (
        CliRunner().invoke(app, ["inspect", str(folder), "--json"]).output
    )
    broken = CliRunner().invoke(app, ["inspect", str(folder)])
    assert broken.exit_code == 1 and "grass.json is damaged, or was not written by grass_dist" in broken.stderr


@pytest.mark.parametrize("off", [False, None])
def test_a_ds_config_that_says_no_goes_on_from_a_marked_one(tmp_path, caplog, off):
    model = tiny()
    write_marker(tmp_path, GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=CONFIG).grass)
    enable()
    plugin = SimpleNamespace(deepspeed_config={"grass": off})
    accelerator = SimpleNamespace(distributed_type="DEEPSPEED", deepspeed_plugin=plugin)
    check_switched_on(accelerator, tmp_path)
    assert 'this run would train all layers: the ds_config has "grass": ' + ("false." if off is False else "null.") in (
        caplog.text
    )
    del plugin.deepspeed_config["grass"]
    with pytest.raises(ConfigError, match="is a checkpoint of a GRASS run"):
        check_switched_on(accelerator, tmp_path)
    plugin.deepspeed_config["grass"] = {"active_layers": 2}
    check_switched_on(accelerator, tmp_path)


def test_an_accelerate_loop_resumes_with_the_same_checks(tmp_path, caplog):
    def loop(config, steps, load=None):
        disable()
        AcceleratorState._reset_state(reset_partial_state=True)
        if config:
            enable(config)
        accelerator, model, optimizer, *_ = prepared([("model", "optimizer")])
        if load:
            accelerator.load_state(load)
        for step in range(steps):
            accelerator.backward(loss_of(model, step))
            optimizer.step()
            optimizer.zero_grad()
        return accelerator, model, optimizer

    for config, name in ((None, "stock"), (CONFIG, "ours")):
        accelerator, _, optimizer = loop(config, 3)
        accelerator.save_state(str(tmp_path / name))
        assert (read_marker(tmp_path / name) is None) == (config is None)
    _, model, again = loop(CONFIG, 0, str(tmp_path / "ours"))
    assert (
        again.optimizer.grass.step == 3 and again.optimizer.grass.importances == optimizer.optimizer.grass.importances
    )
    with pytest.raises(CheckpointError, match="temperature=1.0 in the saved state, and 0.5 here"):
        loop(CONFIG.model_copy(update={"temperature": 0.5}), 0, str(tmp_path / "ours"))
    assert "saved without GRASS" not in caplog.text
    _, model, again = loop(CONFIG, 0, str(tmp_path / "stock"))
    assert again.optimizer.grass.step == 0 and "saved without GRASS" in caplog.text
    assert not torch.equal(model.embed.weight, tiny().embed.weight)


# --- logs


def log(optimizer, **logs):
    """What reaches Trainer's own `log`, through two wrappers around the optimizer."""
    holder = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    return log_numbers(lambda _, logs, start_time=None: logs, holder, logs, 1.0)


def test_the_numbers_in_the_logs():
    model = tiny()
    optimizer = GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=CONFIG)
    assert log(optimizer, loss=1.0) == {"loss": 1.0, "grass/round": -1}
    loss_of(model, 0).backward()
    optimizer.step()
    layers = " ".join(map(str, optimizer.grass.active_layers))
    assert log(optimizer, loss=1.0) == {"loss": 1.0, "grass/round": 0, "grass/layers": layers}


def test_each_switch_is_logged_whatever_logging_steps_is(tmp_path):
    enable(CONFIG)  # layers switch every other step
    run = run_of(tmp_path, max_steps=7, logging_steps=100)
    run.train()
    assert [(row["step"], row["grass/round"]) for row in run.state.log_history if "loss" in row] == [
        (1, 0),
        (2, 1),
        (4, 2),
        (6, 3),
    ]
    silent = run_of(tmp_path, max_steps=7, logging_strategy="no")
    silent.train()
    assert not [row for row in silent.state.log_history if "loss" in row]


def test_tensorboard_shows_importances_over_the_layers(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    enable(CONFIG)
    model = llama()
    model.model.layers[1].requires_grad_(False)
    run = run_of(tmp_path, model, max_steps=4, report_to="tensorboard")
    run.train()
    board = EventAccumulator(str(tmp_path / "board"), {"histograms": 0})
    board.Reload()
    grass = controller_of(run)
    for name, values in (("importances", grass.importances), ("probabilities", grass.probabilities)):
        told = board.Histograms(f"train/grass/{name}")
        assert [event.step for event in told] == [0, 3]  # the refresh after step 1 is of the probe's batch
        last = told[-1].histogram_value
        assert list(last.bucket_limit) == [0.5, 1.5, 2.5, 3.5]
        assert list(last.bucket) == [values[0], 0, *values[1:]]
    assert "train/grass/layers/text_summary" in board.Tags()["tensors"]
    assert set(board.Tags()["scalars"]) >= {"train/grass/round", "train/loss"}


@pytest.mark.parametrize(("kind", "module"), [("WandbCallback", "wandb"), ("TrackioCallback", "trackio")])
def test_other_trackers_get_their_own_histograms(monkeypatch, kind, module):
    sent = []
    tracker = SimpleNamespace(Histogram=lambda np_histogram: np_histogram, log=sent.append)
    monkeypatch.setitem(sys.modules, module, tracker)
    optimizer = GrassOptimizer(tiny(), torch.optim.AdamW, ADAMW, config=CONFIG)
    callback = object.__new__(getattr(transformers.integrations, kind))
    layers = LayerLog(optimizer.grass, [callback, transformers.TrainerCallback()])
    layers.send(7)
    layers.send(8)  # nothing is new
    [told] = sent
    heights, edges = told["train/grass/probabilities"]
    assert told["train/global_step"] == 7 and heights.tolist() == [1 / 8] * 8 and edges.tolist()[:2] == [-0.5, 0.5]
    assert told["train/grass/importances"][0].tolist() == [0] * 8  # none is measured


# --- notebooks


def test_disable_gives_the_model_back(tmp_path):
    enable(CONFIG)
    run = run_of(tmp_path, max_steps=4)
    run.model.model.layers[1].requires_grad_(False)
    run.train()
    disable()
    model = run.model
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    assert frozen == {f"model.layers.1.{name}" for name, _ in model.model.layers[1].named_parameters()}
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    run_of(tmp_path, model, max_steps=4, learning_rate=1e-2).train()
    still = {name for name, param in model.named_parameters() if torch.equal(param, before[name])}
    assert still == frozen
    with pytest.raises(GrassError, match="was detached from its model; make another one"):
        run.train()


def test_observers_are_told_of_every_run(tmp_path):
    seen = []
    enable(CONFIG, observers=[seen.append])
    run_of(tmp_path, max_steps=4).train()
    assert [event.round for event in seen if isinstance(event, Sampled)] == [0, 1, 2]
    assert [event.step for event in seen if isinstance(event, Refreshed)] == [1, 2, 4]
    enable(CONFIG)
    before = len(seen)
    run_of(tmp_path, max_steps=4).train()
    assert len(seen) == before


def test_accumulation_by_hand_is_told_how_accelerate_does_it():
    enable(CONFIG)
    accelerator, model, *_ = prepared([("model", "optimizer")])
    accelerator.backward(loss_of(model, 0) / 2)
    with pytest.raises(GrassError, match=r"with Accelerate to Accelerator\(gradient_accumulation_steps=...\) and use"):
        accelerator.backward(loss_of(model, 1) / 2)


def test_evaluations_and_other_optimizers_are_logged_as_they_are():
    optimizer = GrassOptimizer(tiny(), torch.optim.AdamW, ADAMW, config=CONFIG)
    assert log(optimizer, eval_loss=1.0) == {"eval_loss": 1.0}
    assert log(torch.optim.AdamW(tiny().parameters()), loss=1.0) == {"loss": 1.0}
    assert log(None, loss=1.0) == {"loss": 1.0}
    assert controller_of(object()) is None
    turning = SimpleNamespace()
    turning.optimizer = turning
    assert controller_of(turning) is None


def test_both_are_public():
    assert (
        grass_dist.enable is enable and grass_dist.disable is disable and {"enable", "disable"} <= {*grass_dist.__all__}
    )
