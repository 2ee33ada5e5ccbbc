"""States that come and go leave the same weights and states, to the bit, as states that stay."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

from grass_dist import GrassConfig, GrassError, GrassOptimizer
from grass_dist.states.moving import StreamedStates
from tests.offload_runs import SETTINGS, make, outcome, returned, run, same, train, uneven
from tests.tiny import Tiny, loss_of, take_steps

MODES = [
    {"mode": "interval", "prefetch_steps": 0},
    {"mode": "interval", "prefetch_steps": 1, "chaos": 1},
    {"mode": "interval", "prefetch_steps": 2, "update_in_backward": True},
    {"mode": "stream", "slots": 2, "chaos": 2},
    {"mode": "stream", "slots": 2, "chaos": 3, "update_in_backward": True},
    {"mode": "stream", "slots": 3},
    {"mode": "none", "update_in_backward": True},
]
CHAOS = [mode for mode in MODES if "chaos" in mode and "update_in_backward" not in mode]
LONG = {"AdamW": {}, "masters": {"dtype": torch.bfloat16}}
"""50 steps in all modes; the others take 22, in the two with chaos."""
SHORT = {
    "one layer": {"active_layers": 1, "sampling_interval": 2},
    "five layers": {"active_layers": 5, "sampling_interval": 3},
    "all layers": {"active_layers": 8},
    "every step": {"sampling_interval": 1, "update_interval": 2},
    "not ahead": {"draw_ahead": 0},
    "amsgrad": {"kwargs": {"lr": 1e-2, "amsgrad": True}},
    "SGD": {"cls": torch.optim.SGD, "kwargs": {"lr": 1e-2, "momentum": 0.9}},
    "Adagrad": {"cls": torch.optim.Adagrad, "kwargs": {"lr": 1e-2, "initial_accumulator_value": 0.1}},
    "Rprop": {"cls": torch.optim.Rprop},
    "NAdam": {"cls": torch.optim.NAdam, "dtype": torch.bfloat16},
    "Adafactor": {"cls": torch.optim.Adafactor},
}
RUNS = [
    *[(case, LONG[case], 50, mode) for case in LONG for mode in MODES],
    *[(case, SHORT[case], 22, mode) for case in SHORT for mode in CHAOS],
]


@pytest.fixture(scope="module")
def resident():
    known = {}

    def get(case, options, steps):
        if case not in known:
            known[case] = run({"mode": "none"}, steps, **options)
        return known[case]

    return get


@pytest.mark.parametrize(
    ("case", "options", "steps", "mode"), RUNS, ids=[f"{run[0]}-{' '.join(map(str, run[3].values()))}" for run in RUNS]
)
def test_the_same_to_the_bit(case, options, steps, mode, resident):
    (drawn, ours), (expected, theirs) = run(mode, steps, **options), resident(case, options, steps)
    assert drawn == expected and (returned(drawn) or case == "all layers")
    assert same(ours, theirs)


# --- memory

BYTES = [2 * 768, 2 * 1280, 2 * 1856]
"""Of the states of layers 0, 1, 2 and so on: two moments of which each tensor takes a multiple of 64 bytes, as in
64 + 64 (norm) + 256 + 64 (8 x 8 + 8) + 256 + 64 (8 x 8 + 8)."""


@pytest.mark.parametrize(
    "mode",
    [
        *({"mode": "interval", "prefetch_steps": steps} for steps in (0, 1, 2)),
        *({"mode": "stream", "slots": slots} for slots in (2, 3)),
        {"mode": "stream", "slots": 2, "update_in_backward": True},
    ],
    ids=lambda mode: " ".join(map(str, mode.values())),
)
def test_fifty_steps_take_the_expected_slots_and_host_bytes(mode):
    model, optimizer = make(mode)
    states, grass, longest, streams = optimizer._states, optimizer.grass, BYTES[2], mode.get("slots") == 2
    assert [own.state.layout.device_bytes for own in optimizer._layer_optimizers] == [BYTES[i % 3] for i in range(8)]
    born, adds, waiting, used = set(), 0, False, set()
    count = 2 if streams else 3 + bool(mode.get("prefetch_steps"))
    for step in range(50):
        born |= set(grass.active_layers if grass.phase == "train" else ())
        take_steps(model, optimizer, range(step, step + 1))
        states.settle()
        if grass.phase == "probe":
            continue
        inside = set(sorted(grass.active_layers)[-2:] if streams else grass.active_layers)
        new = set(grass._next.active_layers) - inside if grass._next is not None else set()
        ahead = new and grass.schedule.steps_to_switch(grass.step) <= mode.get("prefetch_steps", 0)
        adds += bool(ahead and not waiting)
        inside |= {max(new)} if ahead else set()
        assert states.device_bytes == count * longest
        used |= {place.slot.flat.data_ptr() for place in states._places if place.slot is not None}
        assert optimizer.host_state_bytes == sum(BYTES[i % 3] for i in born - inside)
        waiting = bool(ahead)
    assert len(born) == 8 and (adds > 8) == bool(mode.get("prefetch_steps"))
    assert len(used) == count  # the same memory for the whole run


@pytest.mark.parametrize("ahead", [0, 2])
def test_every_streamed_layer_has_been_brought_before_its_update(ahead, monkeypatch):
    """In the first step after a switch too, where five of the seven are not the first to come."""
    late, stock = [], StreamedStates._views_for_update

    def noted(self, layer):
        if self._places[layer].slot is None:
            late.append((layer, self._active))
        return stock(self, layer)

    monkeypatch.setattr(StreamedStates, "_views_for_update", noted)
    run({"mode": "stream", "slots": 2}, 26, active_layers=7, draw_ahead=ahead)
    assert not late


def test_with_all_layers_each_has_a_slot_and_none_is_for_landing():
    _, optimizer = make({"mode": "interval", "prefetch_steps": 2}, active_layers=8)
    assert optimizer._states.pool.count == 8


# --- checkpoints

PLACES = {
    "none": {"mode": "none"},
    "interval": {"mode": "interval", "prefetch_steps": 1},
    "stream": {"mode": "stream", "slots": 2},
}


def wide() -> nn.Module:
    """Eight layers of which the states take 135 kB, 267 kB and 400 kB."""
    torch.manual_seed(0)
    model = Tiny(width=64)
    for i, layer in enumerate(model.layers):
        inner = 128 * (1 + i % 3)
        layer.up, layer.down = nn.Linear(64, inner), nn.Linear(inner, 64)
    return model


@pytest.mark.parametrize("steps", [12, 13])  # in the middle of an interval, and when a layer has come ahead
@pytest.mark.parametrize("source", PLACES)
def test_a_checkpoint_is_as_small_as_states_and_fits_any_mode(source, steps, tmp_path):
    model, optimizer = make(PLACES[source], model=wide())
    train(model, optimizer, range(steps))
    saved = optimizer.state_dict()
    torch.save(saved, tmp_path / "states")
    inside = {optimizer._states.in_slot(i) for i, own in enumerate(optimizer._layer_optimizers) if own.has_state}
    assert inside == ({False} if source == "none" else {False, True})
    nbytes = [v.nbytes for entry in saved["state"].values() for v in entry.values() if torch.is_tensor(v)]
    assert (tmp_path / "states").stat().st_size < sum(nbytes) + 8 * 2 * 4096 + 300 * len(nbytes) + 10_000
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, optimizer, range(steps, 24))
    expected = outcome(optimizer, model)
    for target, place in PLACES.items():
        other, resumed = make(place, model=wide())
        other.load_state_dict(weights)
        resumed.load_state_dict(torch.load(tmp_path / "states", weights_only=True))
        train(other, resumed, range(steps, 24))
        assert same(outcome(resumed, other), expected), target


def test_a_checkpoint_in_memory_is_not_overwritten_by_new_layers():
    model, optimizer = make(PLACES["interval"])
    train(model, optimizer, range(12))
    saved, active = optimizer.state_dict()["state"], optimizer.grass.active_layers
    position = {id(p): i for i, p in enumerate(model.parameters())}
    mine = [saved[position[id(p)]]["exp_avg"] for i in active for p in model.layers[i].parameters()]
    before = [t.clone() for t in mine]
    train(model, optimizer, range(12, 30))
    assert len(mine) == 18 and same(mine, before)


# --- updates within the backward


@pytest.mark.parametrize("mode", PLACES)
def test_an_update_in_backward_frees_gradients_and_is_the_same(mode):
    def train_two(offload, check):
        model = uneven()
        config = GrassConfig(offload=offload, **SETTINGS)
        optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=config, gradient_accumulation_steps=2)
        for step in range(16):
            (loss_of(model, 2 * step) / 2).backward()
            if optimizer.grass.phase == "train":
                assert all(p.grad is not None for i in optimizer.grass.active_layers for p in layer(model, i))
            (loss_of(model, 2 * step + 1) / 2).backward()
            check(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        return outcome(optimizer, model), optimizer.grass.traffic.copies

    def layer(model, i):
        return model.layers[i].parameters()

    def freed(model, optimizer):
        assert all(p.grad is None for i in range(8) for p in layer(model, i))
        assert optimizer.grass.phase == "probe" or model.head.weight.grad is not None

    def kept(model, optimizer):
        assert optimizer.grass.phase == "probe" or any(p.grad is not None for i in range(8) for p in layer(model, i))

    ours, copies = train_two({**PLACES[mode], "update_in_backward": True}, freed)
    theirs, expected = train_two(PLACES[mode], kept)
    assert same(ours, theirs) and copies == expected  # no layer comes once more for `step`


def test_what_cannot_be_updated_in_backward_is_refused():
    model, optimizer = make({"mode": "interval", "update_in_backward": True})
    train(model, optimizer, range(3))
    with pytest.raises(GrassError) as refusal:
        optimizer.clip_grad_norm_(1.0)
    assert str(refusal.value) == (
        "clip_grad_norm_ comes too late: grass.offload.update_in_backward updates the layers before the norm of all "
        "gradients is known. Set it to False, or do not clip."
    )
    with torch.no_grad():
        loss_of(model, 3)  # an evaluation counts for nothing
    loss_of(model, 3).backward()
    loss = loss_of(model, 3)
    with pytest.raises(GrassError) as refusal:
        loss.backward()
    last = optimizer.grass.active_layers[-1]
    assert str(refusal.value) == (
        f"gradient_accumulation_steps=1: layers.{last} got one gradient more than that before optimizer.step(), and "
        "grass.offload.update_in_backward has updated it already; pass GrassOptimizer the number of micro-batches of "
        "a step, run the model once for each, or set update_in_backward=False."
    )


# --- rounded moments


def by_layer(model, optimizer) -> list[list[dict]]:
    """For each layer the states of its parameters, copied."""
    state, position = optimizer.state_dict()["state"], {id(p): i for i, p in enumerate(model.parameters())}
    return [
        [{k: v.clone() for k, v in state.get(position[id(p)], {}).items()} for p in layer.parameters()]
        for layer in model.layers
    ]


def equal(ours: list[dict], theirs: list[dict]) -> bool:
    """Whether two states of a layer are the same to the bit."""
    pairs = list(zip(ours, theirs, strict=True))
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def test_moments_are_rounded_when_they_leave_and_masters_are_not():
    rounds = {"mode": "interval", "host_dtype": "bfloat16", "prefetch_steps": 0}
    model, optimizer = make(rounds, dtype=torch.bfloat16)
    other, exact = make({"mode": "none"}, dtype=torch.bfloat16)
    left: dict[int, list[dict]] = {}
    checked, back = set(), set()
    for step in range(30):
        before = set(optimizer.grass.active_layers)
        for trained in ((model, optimizer), (other, exact)):
            take_steps(*trained, range(step, step + 1))
        states, active = by_layer(model, optimizer), set(optimizer.grass.active_layers)
        if optimizer.grass.phase == "probe" or step == 1:
            continue
        for layer in before - active:
            left[layer] = states[layer]
            if not back:  # nothing has been rounded and used yet, so that the other run has what has left
                for ours, theirs in zip(states[layer], by_layer(other, exact)[layer], strict=True):
                    for key in ("exp_avg", "exp_avg_sq"):
                        assert ours[key].dtype == torch.float32 and not torch.equal(ours[key], theirs[key])
                        assert torch.equal(ours[key], theirs[key].bfloat16().float())
                    assert ours["master"].dtype == torch.float32 and torch.equal(ours["master"], theirs["master"])
                checked.add(layer)
        for layer in (active - before) & set(left):
            for ours, theirs in zip(states[layer], left[layer], strict=True):
                assert ours["exp_avg"].dtype == torch.float32 and ours["exp_avg"].any()
                assert all(torch.equal(ours[key], theirs[key].float()) for key in ("exp_avg", "exp_avg_sq", "master"))
            back.add(layer)
    assert len(checked) >= 2 and len(back) >= 2
    away = [
        i for i, own in enumerate(optimizer._layer_optimizers) if own.has_state and not optimizer._states.in_slot(i)
    ]
    assert optimizer.host_state_bytes == sum(BYTES[i % 3] for i in away)  # half of it masters, half of it moments
    ours, theirs = (torch.cat([p.flatten().float() for p in m.parameters()]) for m in (model, other))
    assert ours.isfinite().all() and 0 < (ours - theirs).abs().max() < 0.1


def test_a_checkpoint_of_rounded_moments_goes_on_in_any_mode(tmp_path):
    model, optimizer = make({"mode": "interval", "host_dtype": "bfloat16"})
    train(model, optimizer, range(13))
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "states")
    runs = []
    for place in PLACES.values():
        weights, states = torch.load(tmp_path / "states", weights_only=True)
        other, resumed = make(place)
        other.load_state_dict(weights)
        resumed.load_state_dict(states)
        train(other, resumed, range(13, 24))
        runs.append(outcome(resumed, other))
    assert all(t.dtype == torch.float32 for t in runs[0]) and all(same(run, runs[0]) for run in runs)


# --- failures


class Broken(torch.optim.AdamW):
    error: Exception | None = None

    def step(self, closure=None):
        if Broken.error is not None:
            raise Broken.error
        return super().step(closure)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: " ".join(map(str, mode.values())))
def test_what_an_optimizer_class_raises_reaches_the_user(mode, monkeypatch):
    model, optimizer = make(mode, cls=Broken)
    train(model, optimizer, range(8))
    before = by_layer(model, optimizer)
    monkeypatch.setattr(Broken, "error", KeyError("mine"))
    with pytest.raises(KeyError) as raised:
        train(model, optimizer, range(8, 9))
    assert raised.value is Broken.error
    assert all(map(equal, by_layer(model, optimizer), before))


def torn(optimizer, direction: str, number: int, *, late: bool) -> None:
    """Has a copy fail, counted in its direction; ``late``: when all has been copied."""
    transfers = optimizer._states.transfers
    queue, count = getattr(transfers, direction), iter(range(10**6))
    unequal = (torch.zeros(2, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8))

    def queued(name, runs, *args, **kwargs):
        if next(count) == number:
            runs = [*runs, unequal] if late else [unequal, *runs]
            optimizer.torn = name
        return queue(name, runs, *args, **kwargs)

    setattr(transfers, direction, queued)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("direction", ["to_device", "to_host"])
@pytest.mark.parametrize(
    "mode",
    [PLACES["interval"], PLACES["stream"], {**PLACES["stream"], "update_in_backward": True}],
    ids=["interval", "stream", "in backward"],
)
def test_a_failed_copy_is_reported_by_its_update_no_state_lost(mode, direction, late):
    model, optimizer = make(mode)
    other, exact = make({"mode": "none"})
    torn(optimizer, direction, 5, late=late)
    stood = active = ()
    for step in range(50):
        stood = active if mode["mode"] == "interval" else ()  # what has stood in its slot is updated first
        active, before = optimizer.grass.active_layers, by_layer(other, exact)
        take_steps(other, exact, range(step, step + 1))
        try:
            take_steps(model, optimizer, range(step, step + 1))
        except GrassError as error:
            told = str(error)
            break
    else:
        pytest.fail("the copy did not fail")
    assert told.startswith(f"GRASS::{'h2d' if direction == 'to_device' else 'd2h'} ({optimizer.torn}) failed: ")
    after, ours = by_layer(other, exact), by_layer(model, optimizer)
    updated = [i for i in active if equal(ours[i], after[i])]
    assert all(equal(ours[i], before[i]) for i in range(8) if i not in updated)
    order = sorted(active, key=lambda layer: (layer not in stood, -layer))
    assert set(order[: len(updated)]) == set(updated) and len(updated) < 3
    assert any(before[int(optimizer.torn.rpartition(".")[2])])
    model.load_state_dict(other.state_dict())  # and training can go on from a checkpoint
    optimizer.load_state_dict(copy.deepcopy(exact.state_dict()))
    for trained in ((model, optimizer), (other, exact)):
        trained[1].zero_grad()
        take_steps(*trained, range(step + 1, step + 12))
    assert same(outcome(optimizer, model), outcome(exact, other))


# --- the end


@pytest.mark.parametrize("mode", [*PLACES.values(), MODES[2]], ids=[*PLACES, "in backward"])
def test_a_dropped_optimizer_frees_memory_and_ends_its_threads(mode):
    def threads():
        return {thread for thread in threading.enumerate() if thread.name.startswith("grass_dist")}

    gc.collect()
    before = threads()
    model, optimizer = make(mode)
    train(model, optimizer, range(7))
    assert len(threads() - before) == (0 if mode["mode"] == "none" else 2)
    held = weakref.ref(optimizer), weakref.ref(optimizer._states), weakref.ref(model)
    del optimizer
    gc.collect()
    assert [ref() for ref in held] == [None, None, model] and threads() == before
    del model
    gc.collect()
    assert held[2]() is None


ENDS = """
import sys
import torch
from tests.offload_runs import make, train
trained = []
for offload in ({"mode": "interval", "chaos": 1}, {"mode": "stream", "slots": 2}):
    trained.append(make(offload))
    train(*trained[-1], range(10))  # the tenth step is the last before a switch
big = torch.zeros(2**28, dtype=torch.uint8)
copy = trained[-1][1]._states.transfers.to_host("big", [(big, torch.empty_like(big))], [])
print(copy.done())
sys.exit(0)
"""


@pytest.mark.timeout(120)
def test_a_process_that_ends_while_states_move_ends_well():
    ended = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr and "Fatal" not in ended.stderr, ended.stderr
    assert ended.stdout == "False\n"  # it was in a copy
