"""`train.optimizer`: names, what each of them takes, and the class that it becomes."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from pydantic import ValidationError

from grass_dist import ConfigError, GrassConfig, GrassOptimizer, MuonAdamW
from grass_dist.finetune.config import RunConfig, TrainConfig
from grass_dist.finetune.optimizers import optimizer_of
from grass_dist.finetune.setup import parameter_groups
from tests.tiny import take_steps, tiny


def train(**given):
    return TrainConfig.model_validate({"max_steps": 4, "learning_rate": 1e-2, **given})


@pytest.mark.parametrize(
    ("given", "kind", "kwargs"),
    [
        ({}, torch.optim.AdamW, {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}),
        ({"optimizer": "muon"}, MuonAdamW, {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}),
        (
            {"optimizer": {"name": "muon", "momentum": 0.9, "ns_steps": 3}, "betas": [0.8, 0.9]},
            MuonAdamW,
            {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-8, "momentum": 0.9, "ns_steps": 3},
        ),
        ({"optimizer": {"name": "sgd", "momentum": 0.5}}, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.5}),
        ({"optimizer": "adafactor", "checkpoint": None}, torch.optim.Adafactor, {"lr": 1e-2}),
    ],
)
def test_a_name_becomes_a_class_that_trains(given, kind, kwargs):
    settings = train(**given)
    assert optimizer_of(settings) == (kind, kwargs)
    assert TrainConfig.model_validate(settings.model_dump()) == settings
    model = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = GrassOptimizer(
        model,
        *optimizer_of(settings),
        config=GrassConfig(active_layers=8, probe_steps=0),
        params=parameter_groups(model, 0.1),
    )
    take_steps(model, optimizer, range(2))
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("name", ["lion", "lion-8bit", "adamw-8bit"])
def test_a_class_whose_package_is_missing_is_named(name):
    with pytest.raises(ConfigError, match="bitsandbytes is not installed; install it"):
        optimizer_of(train(optimizer=name, checkpoint=None))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"optimizer": {"name": "adamw", "momentum": 0.9}}, "optimizer adamw does not take it"),
        ({"optimizer": {"name": "sgd", "ns_steps": 3}}, "optimizer sgd does not take it"),
        ({"optimizer": {"name": "sgd", "nesterov": True}}, "sgd needs a momentum for it"),
        ({"optimizer": "sgd", "betas": (0.5, 0.9)}, "optimizer sgd does not take it"),
        ({"optimizer": "lion", "eps": 1e-6}, "optimizer lion does not take it"),
        ({"optimizer": "adafactor"}, "set train.checkpoint to null"),
        ({"optimizer": "adam"}, "adam"),
    ],
)
def test_what_an_optimizer_does_not_take_is_refused(given, sentence):
    with pytest.raises((ConfigError, ValidationError), match=sentence):
        train(**given)


def test_deepspeed_has_adamw_alone():
    given = {
        "model": {"name": "m"},
        "data": {"name": "d", "prompt": "p", "completion": "c"},
        "train": {"max_steps": 100, "optimizer": "muon"},
        "grass": {"active_layers": 2, "probe_steps": 2},
    }
    RunConfig.model_validate(given)
    with pytest.raises((ConfigError, ValidationError), match="use adamw, or parallel: fsdp2"):
        RunConfig.model_validate({**given, "parallel": {"backend": "deepspeed", "config": "x.json"}})


def test_adafactor_needs_whole_parameters():
    given = {
        "model": {"name": "m"},
        "data": {"name": "d", "prompt": "p", "completion": "c"},
        "train": {"max_steps": 100, "optimizer": "adafactor", "checkpoint": None},
        "grass": {"active_layers": 2, "probe_steps": 2},
    }
    RunConfig.model_validate({**given, "parallel": "ddp"})
    with pytest.raises((ConfigError, ValidationError), match="Adafactor does not update shards.*use parallel: ddp"):
        RunConfig.model_validate({**given, "parallel": "fsdp2"})
