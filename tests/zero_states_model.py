"""`ZeroStates` without DeepSpeed, and `HostSums` without a model: driven as their callers do, and checked.

All numbers are small integers, so that every result is exact.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.backends.zero.groups import groups_of
from grass_dist.model.discovery import Unit
from tests.late_cuda import DEVICE, LateCuda
from tests.offload_model import CPU, quiet

LAYERS = 5
KEPT = ("exp_avg", "exp_avg_sq")


class Zero:
    """What DeepSpeed does: makes masters of the weights at each switch, updates them and copies them to the weights."""

    def __init__(self, parts: Any, mode: str, seed: int, cuda: LateCuda | None) -> None:
        rng = random.Random(seed)
        self.rng, self.device = rng, CPU if cuda is None else DEVICE
        self.on, self.stays = quiet(cuda), mode == "interval"
        units, user = [], [{"params": []}, {"params": []}]
        for i in range(LAYERS + 1):  # the last one is a role
            own = [(f"{i}.{j}", nn.Parameter(torch.full((4 + 5 * (i % 3) + j,), float(i)))) for j in range(1 + i % 2)]
            units.append(Unit(f"unit {i}", i if i < LAYERS else None, tuple(own)))
            for j, (_, param) in enumerate(own):
                user[j]["params"].append(param)
        kept = [(key, torch.Size([1]), torch.float32) for key in KEPT]
        made = {unit.name: [] for unit in units}
        for group in groups_of(units, user):
            made[group.unit.name].append(parts.states.GroupState(group, kept, {}, 1, has_master=True))
        all_units = [parts.layer_state.LayerState(name, groups) for name, groups in made.items()]
        layers, roles = all_units[:LAYERS], all_units[LAYERS:]
        active = rng.randint(1, 3)
        ahead = rng.randint(0, 1) if mode == "interval" else 0
        sizes = [unit.layout.host_bytes for unit in layers]
        transfers = parts.transfer.TransferEngine(self.device, chaos=None if cuda else seed, inline=True)
        pool = parts.slots.SlotPool(
            active + ahead if mode == "interval" else 2,
            max(unit.layout.device_bytes for unit in layers),
            self.device,
            transfers.allocated,
        )
        store = parts.store.LayerStateStore(sizes, self.device)
        if mode == "interval":
            moving = parts.moving.IntervalStates(layers, pool, store, transfers, last_first=False, prefetch_steps=ahead)
        else:
            moving = parts.moving.StreamedStates(layers, pool, store, transfers, last_first=False)
        self.states = parts.states.ZeroStates(layers, roles, moving, self.device)
        self.count, self.units = active, all_units
        numbers = {key: own.group.params[0].numel() for key, own in self.states.of.items()}
        self.weights = {key: torch.full((n,), 1.0, device=self.device) for key, n in numbers.items()}
        self.known: dict[Any, dict[str, float]] = {key: {"weight": 1.0, "master": 1.0} for key in numbers}
        self.masters: dict[Any, nn.Parameter] = {}
        self.base: dict[Any, dict[str, Any]] = {}

    def switch(self, layers: tuple[int, ...]) -> None:
        """As `NarrowZero.narrow`, between the calls of the method's engine."""
        self.states.leave(layers)
        self.states.keep_new()
        for own in self.states.of.values():
            own.param = None
        self.masters, self.base = {}, {}
        for index in self.rng.choice([(*layers, LAYERS), (LAYERS, *layers)]):
            for own in self.units[index].targets:
                key = own.group.key
                self.masters[key] = master = nn.Parameter(self.weights[key].clone())
                self.base[master] = {}
        for key, master in self.masters.items():
            self.states.of[key].adopt(master, self.base)
        self.states.enter(layers)
        moving = self.states.mode
        assert not self.stays or set(moving._on_device()) == set(layers), "not all have come"
        for own in (own for index in layers for own in self.units[index].targets):
            assert own.resident == self.stays, "DeepSpeed has another master than it must have"

    def step(self, follow: Sequence[int] | None) -> None:
        """Updates all that trains; ``follow`` trains from the next step on, if that is known."""
        for key, master in self.masters.items():
            number = float(self.rng.randint(1, 5))
            with self.on(), self.states.updating([master], self.base):
                state = self.base[master]
                if KEPT[0] not in state:
                    self.born(self.states.of[key], state, master)
                state["exp_avg"].neg_().add_(number)
                state["exp_avg_sq"].add_(state["exp_avg"])
                master.data.add_(state["exp_avg_sq"])
            with self.on():
                self.weights[key].copy_(master.data)  # DeepSpeed's, when the group has been updated
            own = self.known[key]
            own["exp_avg"] = number - own.get("exp_avg", 0.0)
            own["exp_avg_sq"] = own.get("exp_avg_sq", 0.0) + own["exp_avg"]
            own["weight"] = own["master"] = own["master"] + own["exp_avg_sq"]
        with self.on():
            self.states.end_step()
        assert follow is None or not self.stays or set(self.states.mode._on_device()) == set(follow)

    def born(self, own: Any, state: dict[str, Any], master: nn.Parameter) -> None:
        """Optimizer classes make a state in one of two ways, of which one is born where it belongs."""
        if self.rng.random() < 0.5:
            state.update({name: torch.zeros(master.shape, device=self.device) for name in KEPT})
            return
        state.update({name: torch.zeros_like(master) for name in KEPT})
        found = [state[name].data_ptr() for name in KEPT]
        assert not own.homes or found == [own.homes[name].data_ptr() for name in KEPT], "born outside of its memory"

    def check(self, key: tuple[str, int]) -> None:
        own, known = self.states.of[key], self.known[key]
        assert bool(self.weights[key].eq(known["weight"]).all()), f"weights of {key}"
        if own.current_master is not None:
            assert bool(own.current_master.eq(known["master"]).all()), f"master of {key}"
        for name in KEPT:
            if name in own.state:
                assert bool(own.state[name].eq(known[name]).all()), f"{name} of {key}"
            else:
                assert name not in known

    def replace(self, name: str) -> None:
        """As `reads.set_full` does: all groups of a unit get states that a caller gives."""
        groups = [own for own in self.states.of.values() if own.group.unit.name == name]
        self.states.put(name, [(own, *self.given(own.group.key)) for own in groups])
        for own in groups:
            rest = [home[own.numel :] for key, home in own.homes.items() if key == "master" or key in own.state]
            assert rest and all(bool(padding.eq(0).all()) for padding in rest), "padding is not zero"

    def given(self, key: tuple[str, int]) -> tuple[int, torch.Tensor, dict[str, torch.Tensor]]:
        """A state of a checkpoint, of a group that has been updated or not: (elements, master, moments)."""
        size, known = self.weights[key].numel(), self.known[key]
        moments = {part: float(i + 2) for i, part in enumerate(KEPT)} if self.rng.random() < 0.5 else {}
        self.known[key] = {"weight": known["weight"], "master": 9.0, **moments}
        return size, torch.full((size,), 9.0), {part: torch.full((size,), n) for part, n in moments.items()}


def drive_zero(parts: Any, mode: str, seed: int, *, cuda: LateCuda | None = None, steps: int = 18) -> None:
    """A run of ``parts.states.ZeroStates``, checked as it goes: under chaos, or on a GPU that is late.

    Raises:
        AssertionError: a state or weight is not what it must be.
    """
    zero = Zero(parts, mode, seed, cuda)
    rng, states = zero.rng, zero.states
    layers, following, told = tuple(sorted(rng.sample(range(LAYERS), zero.count))), (), False
    if rng.random() < 0.3:
        states.replace({key: zero.given(key) for key in states.of})
    zero.switch(layers)
    for step in range(steps):
        zero.step(following if told and step % 3 == 2 else None)
        if step % 3 == 2:
            layers = following
            zero.switch(layers)
        elif step % 3 == 0:
            following, told = tuple(sorted(rng.sample(range(LAYERS), zero.count))), rng.random() < 0.8
        if told and step % 3 != 2:
            with zero.on():
                states.expect(following, 2 - step % 3)
        draw = rng.random()
        if draw < 0.3:
            own = rng.choice(list(states.of.values()))
            with states.at_hand(own):
                zero.check(own.group.key)
        elif draw < 0.45:
            states.settle()
            for key in states.of:
                zero.check(key)
        elif draw < 0.6:
            zero.replace(rng.choice(zero.units).name)
            zero.switch(layers)
            if told and step % 3 != 2:
                states.expect(following, 2 - step % 3)
    states.settle()
    for key in states.of:
        zero.check(key)
    assert len(states.mode.transfers._copied) < 8 * LAYERS, "events are kept"
    if rng.random() < 0.3:
        states.forget()
        states.settle()
        assert not any(own.tensors() for own in states.of.values()) and states.host_bytes == 0


def drive_sums(parts: Any, seed: int, cuda: LateCuda) -> None:
    """Probes that accumulate: gradients come on a stream of their own, as those of FSDP2 do."""
    rng = random.Random(seed)
    shapes = {f"{i}": torch.Size([3 + i, 2]) for i in range(4)}
    sums = parts.host_sums.HostSums(shapes, DEVICE)
    compute, reduces = torch.cuda.current_stream(DEVICE), torch.cuda.Stream(DEVICE)
    expected: dict[str, float] = {}
    on = quiet(cuda)
    for _ in range(5):
        fires = {key: rng.choice([0, 2, 3, 3, 3]) for key in shapes}
        expected.clear()
        for micro in range(3):
            begins, ends = torch.cuda.Event(), torch.cuda.Event()
            begins.record(compute)
            reduces.wait_event(begins)
            with torch.cuda.stream(reduces):
                for key, shape in shapes.items():
                    if micro >= fires[key]:
                        continue
                    number = float(rng.randint(1, 9))
                    expected[key] = expected.get(key, 0.0) + number
                    grad = torch.full(shape, number, device=DEVICE, dtype=rng.choice([torch.float32, torch.bfloat16]))
                    with on():
                        whole = sums.add(key, grad, last=micro == 2)
                    assert (whole is None) == (micro < 2)
                    if whole is not None:
                        found = whole.clone()
                        whole.zero_()
                        assert bool(found.eq(expected[key]).all()), f"sum of {key}"
                    del grad, whole
                ends.record(reduces)
            compute.wait_event(ends)
        for key in sums.pending():
            with on():
                found = sums.take(key)
            assert found.is_cuda and bool(found.eq(expected[key]).all()), f"sum so far of {key}"
            del found
        if rng.random() < 0.3:
            sums.add("0", torch.ones(shapes["0"], device=DEVICE), last=False)
            sums.clear()
        assert not sums.pending()
