"""`optimizer.state`, state dicts and their hooks, beside the stock optimizer: γ = L and no probe is AdamW."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from grass_dist import GrassConfig, GrassError, GrassOptimizer, StateError
from grass_dist.states.layer_state import TargetState
from tests.tiny import Tiny, loss_of, take_steps, tiny

MODES: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "interval": {"mode": "interval"},
    "stream": {"mode": "stream", "slots": 2},
    "in the backward": {"mode": "stream", "slots": 2, "update_in_backward": True},
}
KWARGS = {"lr": 1e-2, "weight_decay": 0.1}


def whole(offload: dict[str, Any]) -> GrassConfig:
    return GrassConfig(
        active_layers=4,
        probe_steps=0,
        sampling_interval=2,
        update_interval=2,
        always_active=("embeddings", "final_norm", "lm_head"),
        offload=offload,
    )


def pair(offload: dict[str, Any]) -> list[tuple[Tiny, torch.optim.Optimizer]]:
    ours, stock = tiny(layers=4), tiny(layers=4)
    return [
        (ours, GrassOptimizer(ours, torch.optim.AdamW, KWARGS, config=whole(offload))),
        (stock, torch.optim.AdamW(stock.parameters(), **KWARGS)),
    ]


def reset_all(optimizer, params):
    optimizer.state.clear()


def reset_a_layer(optimizer, params):
    for param in params[1:5]:
        del optimizer.state[param]


def pop_one(optimizer, params):
    optimizer.state.pop(params[3])


def empty_one(optimizer, params):
    optimizer.state[params[3]].clear()


def put_another_dict(optimizer, params):
    old = optimizer.state[params[3]]
    optimizer.state[params[3]] = {key: value.clone() * 2 for key, value in old.items()}


def put_another_tensor(optimizer, params):
    state = optimizer.state[params[3]]
    state["exp_avg"] = torch.ones_like(state["exp_avg"])
    state["step"] = torch.tensor(40.0)


def edit_in_place(optimizer, params):
    for param in params:
        optimizer.state[param]["exp_avg_sq"].mul_(3)
        optimizer.state[param]["step"] += 5


def put_another_mapping(optimizer, params):
    kept = {param: dict(optimizer.state[param]) for param in params[:6]}
    optimizer.state.clear()
    for param, state in kept.items():
        optimizer.state[param] = state


def give_other_memory(optimizer, params):
    state = optimizer.state[params[5]]
    for key in ("exp_avg", "exp_avg_sq"):
        state[key].data = torch.full_like(state[key], 0.25)


EDITS = [
    reset_all,
    reset_a_layer,
    pop_one,
    empty_one,
    put_another_dict,
    put_another_tensor,
    edit_in_place,
    give_other_memory,
    put_another_mapping,
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("edit", EDITS)
def test_what_a_user_does_to_states_counts_as_in_stock(edit, mode):
    runs = pair(MODES[mode])
    for model, optimizer in runs:
        take_steps(model, optimizer, range(3))
        edit(optimizer, list(model.parameters()))
        take_steps(model, optimizer, range(3, 8))
    ours, stock = ([p.detach() for p in model.parameters()] for model, _ in runs)
    assert all(map(torch.equal, ours, stock))


@pytest.mark.parametrize("mode", MODES)
def test_states_before_the_first_step_are_taken(mode):
    runs = pair(MODES[mode])
    for model, optimizer in runs:
        for param in model.parameters():
            made = {"exp_avg": torch.full_like(param, 0.1), "exp_avg_sq": torch.full_like(param, 0.2)}
            optimizer.state[param] = {"step": torch.tensor(3.0), **made}
        take_steps(model, optimizer, range(4))
    ours, stock = ([p.detach() for p in model.parameters()] for model, _ in runs)
    assert all(map(torch.equal, ours, stock))


@pytest.mark.parametrize("mode", MODES)
def test_a_mapping_that_is_assigned_is_the_state(mode):
    (model, optimizer), _ = pair(MODES[mode])
    take_steps(model, optimizer, range(3))
    optimizer.state = {}
    take_steps(model, optimizer, range(3, 4))
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


def test_hooks_around_state_dicts_run_as_in_stock():
    calls = []
    for _, optimizer in pair(MODES["interval"]):
        told = []
        optimizer.register_state_dict_pre_hook(lambda o, told=told: told.append("pre"))
        optimizer.register_state_dict_post_hook(lambda o, sd, told=told: told.append(sorted(set(sd) - {"grass"})))
        optimizer.register_state_dict_post_hook(lambda o, sd: {**sd, "more": 1}, prepend=True)
        optimizer.register_load_state_dict_pre_hook(lambda o, sd, told=told: told.append(sd["more"]))
        gone = optimizer.register_load_state_dict_post_hook(lambda o, told=told: told.append("gone"))
        optimizer.register_load_state_dict_post_hook(lambda o, told=told: told.append("post"))
        gone.remove()
        optimizer.load_state_dict(optimizer.state_dict())
        calls.append(told)
    assert calls[0] == calls[1] == ["pre", ["more", "param_groups", "state"], 1, "post"]


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_is_refused_and_the_original_goes_on(how):
    (model, optimizer), (other, stock) = pair(MODES["interval"])
    take_steps(model, optimizer, range(2))
    with pytest.raises(GrassError, match="cannot be copied or pickled, .*make another GrassOptimizer for the copy"):
        how(optimizer)
    take_steps(model, optimizer, range(2, 4))
    take_steps(other, stock, range(4))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


# What cannot be loaded is refused before anything is written.


def small(cls: Any = torch.optim.AdamW, kwargs: Any = None, dtype: torch.dtype = torch.float32, **grass: Any):
    model = tiny(dtype, layers=4)
    config = GrassConfig(
        **{"active_layers": 2, "probe_steps": 1, "sampling_interval": 2, "update_interval": 2, **grass}
    )
    return model, GrassOptimizer(model, cls, kwargs or {"lr": 1e-2}, config=config)


def saved(*args: Any, **grass: Any) -> dict[str, Any]:
    model, optimizer = small(*args, **grass)
    take_steps(model, optimizer, range(5))
    return copy.deepcopy(optimizer.state_dict())


def stock() -> dict[str, Any]:
    model = tiny(layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    take_steps(model, optimizer, range(1))
    return optimizer.state_dict()


def other_shape() -> dict[str, Any]:
    state = saved()
    entry = next(iter(state["state"].values()))
    entry["exp_avg"] = torch.zeros(3, 1)
    return state


def one_moment() -> dict[str, Any]:
    state = saved()
    for entry in state["state"].values():
        del entry["exp_avg_sq"]
    return state


def stateless() -> dict[str, Any]:
    return {key: value for key, value in saved().items() if key != "state"}


def worded() -> dict[str, Any]:
    state = saved()
    next(iter(state["state"].values()))["exp_avg"] = "often"
    return state


REFUSED = {
    "of a stock optimizer": (stock, r"no position of the method .*another optimizer"),
    "another gamma": (lambda: saved(active_layers=3), r"^active_layers=3 in the saved state, and 2 here; give"),
    "another probe": (lambda: saved(probe_steps=2), r"^probe_steps=2 in the saved state, and 1 here"),
    "another sampler": (lambda: saved(sampler="uniform"), r"^sampler='uniform' in the saved state, and 'grass' here"),
    "another seed": (lambda: saved(seed=7), r"^seed=7 in the saved state, and 0 here"),
    "another class": (lambda: saved(torch.optim.SGD), r"^optimizer class='SGD' in the saved state, and 'AdamW' here"),
    "a moment less": (one_moment, r"has no exp_avg_sq, which this optimizer keeps"),
    "another shape": (other_shape, r"is of shape \(3, 1\) where the parameter's is"),
    "no states": (stateless, r"damaged, or of another kind \(KeyError"),
    "a word as a moment": (worded, r"The saved exp_avg of \S+ is 'often' and no tensor"),
    "a damaged position": (lambda: {**saved(), "grass": {"step": 3}}, r"damaged, or of another kind"),
    "empty": (dict, r"no position of the method"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_state_that_does_not_fit_changes_nothing(case):
    make, message = REFUSED[case]
    given = make()
    model, optimizer = small()
    take_steps(model, optimizer, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(StateError, match=message):
        optimizer.load_state_dict(given)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"] and before["grass"] == after["grass"]
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(v, after["state"][i][k]) for i, s in before["state"].items() for k, v in s.items())


def test_another_offload_mode_and_counts_as_numbers_are_taken():
    model, optimizer = small(offload={"mode": "stream", "slots": 2})
    take_steps(model, optimizer, range(5))
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = int(entry["step"])
    again, other = small(offload={"mode": "none"})
    again.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    take_steps(model, optimizer, range(5, 12))
    take_steps(again, other, range(5, 12))
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_the_truth_of_the_state_asks_and_a_forward_ends_it():
    model, optimizer = small()
    take_steps(model, optimizer, range(4))
    frozen = [p.requires_grad for p in model.parameters()]
    kept = optimizer.state[model.norm.weight]["exp_avg"].clone()
    assert optimizer.state and len(optimizer.state) == len(list(model.parameters()))
    assert all(p.requires_grad for p in model.parameters()) and "grass" in optimizer.param_groups[0]
    assert torch.equal(optimizer.state[model.norm.weight]["exp_avg"], kept)
    loss_of(model, 4)
    assert [p.requires_grad for p in model.parameters()] == frozen and "grass" not in optimizer.param_groups[0]


@pytest.mark.parametrize("rate", [1e-2, 0.0])
def test_a_step_after_the_question_is_a_step(rate):
    """Also in the probe, which frees its gradients, and at a rate of 0, as a warm-up may begin."""
    model, optimizer = small(kwargs={"lr": rate})
    other, reference = small(kwargs={"lr": rate})
    for step in range(6):
        loss_of(model, step).backward()
        bool(optimizer.state)  # asked between backward and step
        optimizer.step()
        optimizer.zero_grad()
    take_steps(other, reference, range(6))
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert optimizer.grass.step == reference.grass.step == 6


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adafactor", "Rprop", "NAdam"])
def test_what_torch_asks_for_resumes_each_class(name, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = small(getattr(torch.optim, name), {"lr": 1e-2})
    take_steps(model, optimizer, range(5))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    again, other = small(getattr(torch.optim, name), {"lr": 1e-2})
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, other, state, options=options)
    take_steps(model, optimizer, range(5, 12))
    take_steps(again, other, range(5, 12))
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_states_that_torch_has_dropped_are_missed():
    model, optimizer = small()
    take_steps(model, optimizer, range(5))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    del state["state"]["norm.weight"]
    _, other = small()
    with pytest.raises(ValueError, match=r"^The state dict lacks the states of 1 parameters \(norm\.weight"):
        other.load_state_dict(state)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", ["often", None, 3.0])
def test_what_is_no_state_is_refused_before_the_step(value, mode):
    (model, optimizer), _ = pair(MODES[mode])
    take_steps(model, optimizer, range(3))
    param = model.layers[1].up.weight
    kept = optimizer.state[param]["exp_avg"].clone()
    good = optimizer.state[param]
    good["exp_avg"], before = value, [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"^optimizer\.state of layers\.1\.up\.weight has .* as exp_avg"):
        take_steps(model, optimizer, range(3, 4))
    assert all(map(torch.equal, model.parameters(), before))
    good["exp_avg"] = kept
    if mode != "in the backward":
        optimizer.step()


@pytest.mark.parametrize("mode", MODES)
def test_a_mapping_that_is_held_stays_the_state(mode):
    runs = pair(MODES[mode])
    for model, optimizer in runs:
        held = optimizer.state
        take_steps(model, optimizer, range(3))
        held.clear()
        take_steps(model, optimizer, range(3, 6))
        param = model.layers[2].down.weight
        held[param]["exp_avg"] = torch.ones_like(param)
        bool(optimizer.state)
        optimizer.state[model.norm.weight]["exp_avg"] = torch.ones_like(model.norm.weight)
        take_steps(model, optimizer, range(6, 8))
    assert all(map(torch.equal, *(list(model.parameters()) for model, _ in runs)))


def test_copies_of_the_mapping_are_plain_and_hooks_see_no_save():
    model, optimizer = small()
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    take_steps(model, optimizer, range(4))
    assert len(copy.deepcopy(optimizer.state)) == len(optimizer.state)
    for _ in range(3):
        get_optimizer_state_dict(model, optimizer)
    assert len(seen) == 4 and all(p.grad is None for p in model.parameters())


def test_asking_between_micro_batches_of_a_probe_moves_nothing():
    config = GrassConfig(active_layers=2, probe_steps=4)
    importances = []
    for asks in (False, True):
        model = tiny(layers=4)
        optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=config, gradient_accumulation_steps=2)
        for step in range(4):
            for micro in range(2):
                if asks:
                    get_optimizer_state_dict(model, optimizer)
                (loss_of(model, 2 * step + micro) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.grass.step == 4
        importances.append(optimizer.grass.importances)
    assert importances[0] == importances[1]


def test_states_of_unknown_parameters_are_refused():
    (model, optimizer), _ = pair(MODES["interval"])
    take_steps(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][99] = copy.deepcopy(saved["state"][0])
    with pytest.raises(ValueError, match=r"^The saved state has states of 1 parameters .* \(99, \.\.\.\); load"):
        optimizer.load_state_dict(saved)


def test_a_copy_that_ends_while_changes_are_sought_is_none():
    """The worker that binds a state to where it has come may do so between any two steps of the thread that looks."""
    own = TargetState("a", [("exp_avg", torch.Size([4]), torch.float32)])
    places, found = [torch.zeros(4), torch.zeros(4)], []
    own.bind(places[:1], resident=True)
    own.state["exp_avg"] = own.homes["exp_avg"]

    def bind_often() -> None:
        for n in range(20000):
            own.bind([places[n % 2]], resident=True)

    worker, interval = threading.Thread(target=bind_often), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        worker.start()
        while worker.is_alive():
            found.append(own.left("exp_avg"))
    finally:
        worker.join()
        sys.setswitchinterval(interval)
    assert len(found) > 100 and not any(found)
    places[1].data = torch.ones(4)
    assert own.left("exp_avg")
