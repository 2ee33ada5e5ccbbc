"""`changed_since` and `WeightSync`: a copy that is given what they tell is the trained model, to the bit."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grass_dist import ConfigError, GrassConfig, GrassOptimizer, WeightSync, load_checkpoint, save_checkpoint
from tests.test_optimizers import Averaging
from tests.tiny import Tiny, loss_of, take_steps, tiny

ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
QUICK = {"active_layers": 2, "probe_steps": 2, "sampling_interval": 3, "update_interval": 3}


def grass(model: nn.Module, optimizer_class: Any = torch.optim.AdamW, kwargs: Any = ADAMW, **config) -> GrassOptimizer:
    return GrassOptimizer(model, optimizer_class, kwargs, config=GrassConfig(**{**QUICK, **config}))


def told(optimizer: GrassOptimizer, step: int) -> set[str]:
    return {name for unit in optimizer.grass.changed_since(step) for name, _ in unit.params}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def differing(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}


CONFIGS = st.fixed_dictionaries(
    {
        "active_layers": st.integers(1, 8),
        "probe_steps": st.integers(0, 3),
        "sampling_interval": st.integers(1, 4),
        "update_interval": st.integers(1, 4),
        "sampler": st.sampled_from(["uniform", "cyclic"]),
        "always_active": st.sampled_from([(), ("final_norm",), ("embeddings", "final_norm", "lm_head")]),
        "seed": st.integers(0, 9),
    }
)


@settings(max_examples=40)
@given(config=CONFIGS, steps=st.lists(st.sampled_from(["step", "step", "step", "skip", "drop"]), max_size=14))
def test_a_unit_has_changed_since_all_steps_before_its_last(config, steps):
    model = tiny()
    optimizer = grass(model, **config)
    view, last, seen = optimizer.grass, {}, {0: weights(model)}
    for number, what in enumerate(steps):
        trains = view.trainable_units() if view.phase == "train" and what == "step" else []
        loss_of(model, number).backward()
        {"step": optimizer.step, "skip": optimizer.skip_step, "drop": optimizer.zero_grad}[what]()
        optimizer.zero_grad()
        last |= {unit.name: view.step for unit in trains}
        seen[view.step] = weights(model)
    for step, before in seen.items():
        units = view.changed_since(step)
        assert [u.name for u in units] == [u.name for u in (*view.layers, *view.roles) if step < last.get(u.name, 0)]
        assert differing(model, before) == {name for unit in units for name, _ in unit.params}


class Course:
    """A run in which much happens between its steps, and all the weights that a copy may have been given."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.model = tiny()
        self.optimizer = grass(self.model, Averaging, {"lr": 0.05}, **config)
        self.seen: list[tuple[int, dict[str, torch.Tensor]]] = []
        self.saved: list[Any] = []
        self.number = 0

    def step(self) -> None:
        self.optimizer.train()
        take_steps(self.model, self.optimizer, range(self.number, self.number + 1))
        self.number += 1

    def evaluate(self) -> None:
        self.optimizer.eval()

    def train(self) -> None:
        self.optimizer.train()

    def save(self) -> None:
        self.saved.append(copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict())))

    def load(self) -> None:
        if self.saved:
            model, optimizer = copy.deepcopy(self.saved[self.number % len(self.saved)])
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict(optimizer)

    def load_weights(self) -> None:
        module = (self.model.layers[self.number % 8].down, self.model.embed, self.model.layers[2])[self.number % 3]
        module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})

    def set(self) -> None:
        layer = self.optimizer.grass.layers[self.number % 8]
        with torch.no_grad():
            layer.params[0][1].add_(1)
        self.optimizer.grass.note_changed([layer])


WHAT = st.sampled_from(["step"] * 6 + ["evaluate", "train", "save", "load", "load_weights", "set"])


@settings(max_examples=60)
@given(config=CONFIGS, course=st.lists(WHAT, max_size=20))
def test_nothing_that_changes_weights_goes_untold(config, course):
    run = Course(config)
    for what in course:
        run.seen.append((run.optimizer.grass.step, weights(run.model)))
        getattr(run, what)()
        for step, before in run.seen:
            assert differing(run.model, before) <= told(run.optimizer, step), (what, step)


def test_after_a_load_all_counts_until_the_run_is_past_it():
    model = tiny()
    optimizer = grass(model)
    take_steps(model, optimizer, range(4))
    state = copy.deepcopy(optimizer.state_dict())
    take_steps(model, optimizer, range(4, 7))
    optimizer.load_state_dict(state)
    for step in range(8):
        everything = told(optimizer, min(step, 7)) == {name for name, _ in model.named_parameters()}
        assert everything
        take_steps(model, optimizer, range(4 + step, 5 + step))
    assert optimizer.grass.step == 12
    assert 0 < len(optimizer.grass.changed_since(11)) < 11 == len(optimizer.grass.changed_since(7))
    fresh = grass(tiny())
    fresh.load_state_dict(state)
    assert len(fresh.grass.changed_since(0)) == len(fresh.grass.changed_since(4)) == 11
    take_steps(fresh._model, fresh, range(4, 6))
    assert len(fresh.grass.changed_since(4)) == 11 > len(fresh.grass.changed_since(5))


def test_a_checkpoint_that_is_loaded_changes_everything(tmp_path):
    model = tiny()
    optimizer = grass(model)
    take_steps(model, optimizer, range(4))
    save_checkpoint(tmp_path, optimizer, 4)
    assert 0 < len(optimizer.grass.changed_since(3)) < 11 and optimizer.grass.changed_since(4) == ()
    load_checkpoint(tmp_path, optimizer)
    assert len(optimizer.grass.changed_since(4)) == 11


def test_an_update_in_the_backward_is_told_before_its_step():
    model = tiny()
    optimizer = grass(model, probe_steps=0, sampler="uniform", offload={"update_in_backward": True})
    before = weights(model)
    loss_of(model, 0).backward()
    assert differing(model, before) == told(optimizer, 0) != set()


def test_a_step_that_a_scaler_skips_changes_nothing():
    model = tiny()
    optimizer = grass(model, probe_steps=0, sampler="uniform")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, factor in enumerate((1.0, float("inf"))):
        scaler.scale(loss_of(model, step) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.grass.skipped == 1 and optimizer.grass.changed_since(1) == ()
    assert len(optimizer.grass.changed_since(0)) == 5


@pytest.mark.parametrize("step", [-1, 4, 100])
def test_a_step_that_was_never_reached_is_refused(step):
    optimizer = grass(tiny())
    take_steps(optimizer._model, optimizer, range(3))
    with pytest.raises(ConfigError, match=rf"^changed_since\(step\)={step}: this process has seen steps 0 to 3 of"):
        optimizer.grass.changed_since(step)


def test_a_copy_of_the_model_tells_nothing_when_it_is_loaded():
    model = tiny()
    optimizer = grass(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.load_state_dict(model.state_dict())
    assert optimizer.grass.changed_since(0) == ()
    model.load_state_dict(twin.state_dict())
    assert len(optimizer.grass.changed_since(0)) == 11


def test_without_its_optimizer_a_model_has_no_hook_of_loads():
    def hooks() -> int:
        return sum(len(module._load_state_dict_post_hooks) for module in model.modules())

    model = tiny()
    optimizer = grass(model)
    assert hooks() > 8
    optimizer.detach()
    assert hooks() == 0
    known = weakref.ref(optimizer := grass(model))
    del optimizer
    gc.collect()
    assert known() is None and hooks() == 0


# --- WeightSync


class Tied(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight
        self.tower = nn.Linear(3, 3)  # has no role: frozen, unless somebody else trains it


class Receiver:
    """A copy of the model, which takes weights by name as a server does."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        with torch.no_grad():
            for param in self.model.parameters():
                param.zero_()
        self.names: list[str] = []

    def put(self, name: str, weights: torch.Tensor) -> None:
        self.names.append(name)
        self.model.get_parameter(name).data.copy_(weights)

    def taken(self) -> tuple[str, ...]:
        names, self.names = tuple(self.names), []
        return names


def test_a_sync_carries_what_has_changed_and_no_more():
    torch.manual_seed(0)
    model = Tied()
    optimizer = grass(model, sampler="cyclic", probe_steps=0, active_layers=2, always_active=["final_norm"])
    copied, sync = Receiver(model), WeightSync(model, optimizer)
    names = tuple(name for name, _ in model.named_parameters())
    first = sync.push(copied.put)
    assert copied.taken() == first.names == names and "head.weight" not in names
    assert first.nbytes == first.of == sum(p.nbytes for p in model.parameters())
    for step in range(7):
        active = {f"layers.{n}." for n in optimizer.grass.active_layers} | {"norm."}
        take_steps(model, optimizer, range(step, step + 1))
        done = sync.push(copied.put)
        assert copied.taken() == done.names == tuple(n for n in names if n.startswith(tuple(active)))
        assert done.nbytes == sum(model.get_parameter(name).nbytes for name in done.names) < done.of == first.of
        assert differing(model, weights(copied.model)) == set()
    assert sync.push(copied.put).names == ()
    model.tower.requires_grad_(True)  # another optimizer's, of which nothing is known
    assert sync.push(None).names == ("tower.weight", "tower.bias")
    model.load_state_dict(model.state_dict())
    assert sync.push(copied.put).names == names


def test_a_sync_that_fails_is_carried_once_more():
    model = tiny()
    optimizer = grass(model, probe_steps=0, sampler="uniform")
    copied, sync = Receiver(model), WeightSync(model, optimizer)
    sync.push(copied.put)
    take_steps(model, optimizer, range(1))

    def broken(name: str, weights: torch.Tensor) -> None:
        raise ConnectionError("the server is gone")

    with pytest.raises(Exception, match="the server is gone"):
        sync.push(broken)
    assert len(sync.push(copied.put).names) > 4 and differing(model, weights(copied.model)) == set()


def test_another_optimizer_begins_with_everything():
    class Holder:
        optimizer: Any = None

    model, trainer = tiny(), Holder()
    sync = WeightSync(model, trainer)
    with pytest.raises(ConfigError, match=r"WeightSync\(trained_by\)='Holder': GRASS does not train it, or not yet"):
        sync.push(None)
    trainer.optimizer = optimizer = grass(model)
    assert len(sync.push(None).names) == len(list(model.parameters())) and sync.push(None).names == ()
    optimizer.detach()
    trainer.optimizer = grass(model)
    assert len(sync.push(None).names) == len(list(model.parameters()))
    with pytest.raises(ConfigError, match=r"WeightSync\(model\)='Block': it has no embed.weight, which is trained"):
        WeightSync(model.layers[0], trainer).push(None)


def test_names_are_those_without_wrappers():
    model = tiny()
    wrapped = torch.compile(model, backend="eager")
    optimizer = grass(wrapped)
    assert WeightSync(wrapped, optimizer).push(None).names == tuple(name for name, _ in model.named_parameters())
    assert WeightSync(model, optimizer).push(None).names == tuple(name for name, _ in model.named_parameters())
