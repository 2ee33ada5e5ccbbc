"""Layers that the user has frozen or left out of the optimizer: they stay as they are, and the others compete."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from grass_dist import (
    CheckpointError,
    ConfigError,
    GrassConfig,
    GrassError,
    GrassOptimizer,
    load_checkpoint,
    save_checkpoint,
)
from grass_dist.checkpoint.inspect import describe
from grass_dist.checkpoint.loading import open_checkpoint
from tests.tiny import Tiny, loss_of, take_steps, tiny

ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
CYCLIC = {"sampler": "cyclic", "active_layers": 2, "sampling_interval": 2, "always_active": ()}


def frozen_tiny(*layers: int) -> Tiny:
    model = tiny()
    for layer in layers:
        model.layers[layer].requires_grad_(False)
    return model


def grass(model: nn.Module, params=None, **config) -> GrassOptimizer:
    return GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=GrassConfig(**config), params=params)


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_the_others_compete_and_train_as_with_an_optimizer_each():
    model, by_hand = frozen_tiny(0, 3, 5), frozen_tiny(0, 3, 5)
    before = copy.deepcopy(model.state_dict())
    optimizer = grass(model, **CYCLIC)
    engine = optimizer.grass
    assert engine.numbers == (1, 2, 4, 6, 7) and [u.name for u in engine.layers] == [
        f"layers.{n}" for n in (1, 2, 4, 6, 7)
    ]
    assert engine.probabilities == (0.2,) * 5 and engine.active_layers == (0, 1)
    plain = {n: torch.optim.AdamW(by_hand.layers[n].parameters(), **ADAMW) for n in engine.numbers}
    for step in range(12):
        active = [engine.numbers[layer] for layer in engine.active_layers]
        take_steps(model, optimizer, range(step, step + 1))
        loss_of(by_hand, step).backward()
        for number in active:
            plain[number].step()
        by_hand.zero_grad()
    assert moved(model, by_hand.state_dict()) == set()
    assert {name.split(".")[1] for name in moved(model, before)} == {"1", "2", "4", "6", "7"}
    assert engine.never_trained == ()


def test_layers_left_out_of_the_optimizer_do_not_compete_either(caplog):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING, "grass_dist"):
        optimizer = grass(model, params=list(model.layers[2:].parameters()), active_layers=6, probe_steps=1)
    told = [record.message for record in caplog.records if "compete" in record.message]
    assert told == [
        "2 of 8 layers do not compete, since none of their parameters has requires_grad and is in the optimizer: "
        "layers.0, layers.1; the other 6 compete."
    ]
    take_steps(model, optimizer, range(3))
    assert {name.split(".")[1] for name in moved(model, before)} == {str(n) for n in range(2, 8)}


def test_nothing_is_said_where_all_compete(caplog):
    with caplog.at_level(logging.WARNING, "grass_dist"):
        grass(tiny(), **CYCLIC)
    assert not [r for r in caplog.records if "compete" in r.message or "frozen" in r.message]


def test_fixed_layers_are_numbers_of_the_stack():
    model = frozen_tiny(0, 3)
    before = copy.deepcopy(model.state_dict())
    optimizer = grass(model, sampler="fixed", active_layers=2, fixed_layers=(4, 7), always_active=())
    assert [optimizer.grass.numbers[layer] for layer in optimizer.grass.active_layers] == [4, 7]
    take_steps(model, optimizer, range(3))
    assert {name.split(".")[1] for name in moved(model, before)} == {"4", "7"}
    with pytest.raises(ConfigError, match=r"fixed_layers=\[3\]: these layers are frozen.*1, 2, 4, 5, 6, 7"):
        grass(frozen_tiny(0, 3), sampler="fixed", active_layers=2, fixed_layers=(3, 7))


def test_a_checkpoint_goes_on_with_the_same_layers_alone(tmp_path):
    def begun(*layers: int) -> tuple[Tiny, GrassOptimizer]:
        model = frozen_tiny(*layers)
        return model, grass(model, active_layers=2, probe_steps=2, sampling_interval=2, update_interval=2)

    model, optimizer = begun(0, 3)
    take_steps(model, optimizer, range(7))
    save_checkpoint(tmp_path, optimizer, 7)
    take_steps(model, optimizer, range(7, 15))
    again, resumed = begun(0, 3)
    load_checkpoint(tmp_path, resumed)
    take_steps(again, resumed, range(7, 15))
    assert moved(again, model.state_dict()) == set()

    wrong = begun(0, 4)[1]
    with pytest.raises(
        CheckpointError, match="layers 1, 2, 4, 5, 6, 7 compete in it, and in this run 1, 2, 3, 5, 6, 7"
    ):
        load_checkpoint(tmp_path, wrong)
    with pytest.raises(GrassError, match="6 layers, and this one has 8"):
        load_checkpoint(tmp_path, begun()[1])

    state = optimizer.state_dict()
    before = copy.deepcopy(wrong.state_dict())
    with pytest.raises(ValueError, match=r"layers \[1, 2, 4, 5, 6, 7\] compete, and here \[1, 2, 3, 5, 6, 7\]"):
        wrong.load_state_dict(state)
    assert str(wrong.state_dict()) == str(before)

    good = describe(open_checkpoint(next(tmp_path.glob("step-*"))), tmp_path)
    assert [layer["layer"] for layer in good["layers"]] == [1, 2, 4, 5, 6, 7]
    assert [layer["name"] for layer in good["layers"]] == [f"layers.{n}" for n in (1, 2, 4, 5, 6, 7)]
    assert set(good["active_layers"]) <= {1, 2, 4, 5, 6, 7}


def test_a_refused_optimizer_leaves_the_model_as_it_was():
    model = frozen_tiny(0)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ConfigError, match="active_layers=8"):
        grass(model, active_layers=8)
    with pytest.raises(ConfigError, match="there is no such sampler"):
        grass(model, sampler="gras")
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    optimizer = grass(model, **CYCLIC)
    take_steps(model, optimizer, range(3))
    with pytest.raises(GrassError, match="has a GrassOptimizer already"):
        grass(model, **CYCLIC)
    take_steps(model, optimizer, range(3, 6))  # and that one goes on
    assert optimizer.grass.step == 6
