"""Weights of frozen layers rest in host memory (``grass.offload.weights: host``), and nothing else is different."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from grass_dist import ConfigError, GrassConfig, GrassError, GrassOptimizer, disable, enable
from grass_dist.backends.fsdp2 import Fsdp2Backend
from grass_dist.backends.zero.ds_config import split_ds_config
from grass_dist.states import weights as module
from grass_dist.states.weights import HostWeights
from tests.offload_runs import make, outcome, same, uneven
from tests.tiny import Tiny, loss_of, take_steps, tiny
from tests.trainers import logged, rows, run_of, switched_off  # noqa: F401

HOST = {"weights": "host"}
STEPS = 14
"""Two of a probe, and three rounds of layers."""
BLOCK = 4 * (8 + 8 + 16 * 8 + 16 + 8 * 16 + 8)
"""Bytes of the weights of a block of `Tiny`; each of its six parameters begins at a multiple of 64."""
PADDED = 4 * (16 + 16 + 16 * 8 + 16 + 8 * 16 + 16)


def weights_of(optimizer: GrassOptimizer) -> HostWeights:
    assert optimizer._weights is not None
    return optimizer._weights


class Checkpointed(Tiny):
    """Recomputes each block in the backward."""

    def __init__(self, *, reentrant: bool = False, segments: int | None = None) -> None:
        super().__init__()
        self.reentrant, self.segments = reentrant, segments

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        if torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()  # what reentrant checkpointing needs
        if self.segments is not None:
            x = checkpoint_sequential(list(self.layers), self.segments, x, use_reentrant=self.reentrant)
        else:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


class Twice(Tiny):
    """Runs its blocks up and down, so that each of them is used twice."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in (*self.layers, *reversed(self.layers)):
            x = layer(x)
        return self.head(self.norm(x))


class Skipping(Tiny):
    """Leaves out every third block of the second half, and takes its blocks in another order than they have."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for n in (3, 0, 6, 1, 7, 2, 4, 5):
            x = self.layers[n](x)
        return self.head(self.norm(x))


class Packed:
    """What a block returns that no container of torch's knows."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class InObjects(Tiny):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.register_forward_hook(lambda _, __, x: Packed(x), prepend=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x).x
        return self.head(self.norm(x))


def seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": uneven,
    "bf16": partial(uneven, torch.bfloat16),
    "recomputed": partial(seeded, Checkpointed),
    "reentrant": partial(seeded, partial(Checkpointed, reentrant=True)),
    "segments": partial(seeded, partial(Checkpointed, segments=3)),
    "reentrant segments": partial(seeded, partial(Checkpointed, segments=2, reentrant=True)),
    "twice": partial(seeded, Twice),
    "another order": partial(seeded, Skipping),
    "objects": partial(seeded, InObjects),
}


def trained(
    model: nn.Module, offload: dict[str, Any], *, accumulation: int = 1, steps: int = STEPS, **settings: Any
) -> tuple[list[Any], list[torch.Tensor]]:
    """Layers drawn and losses, also in evaluations between steps, and all that is left."""
    config = {"active_layers": 3, "sampling_interval": 4, "update_interval": 6, "probe_steps": 2, "seed": 5, **settings}
    optimizer = GrassOptimizer(
        model,
        torch.optim.AdamW,
        {"lr": 1e-2},
        config=GrassConfig(offload=offload, **config),
        gradient_accumulation_steps=accumulation,
    )
    seen: list[Any] = []
    for step in range(steps):
        for batch in range(accumulation):
            loss = loss_of(model, accumulation * step + batch)
            loss.backward()
            seen.append(loss.item())
        if optimizer.grass.phase == "train":
            seen.append(optimizer.clip_grad_norm_(0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        if step % 3 == 0:
            with torch.no_grad():
                seen.append(loss_of(model.eval(), 100).item())
            model.train()
        seen.append(optimizer.grass.active_layers)
    return seen, outcome(optimizer, model)


def equal(ours: tuple[list[Any], list[torch.Tensor]], theirs: tuple[list[Any], list[torch.Tensor]]) -> bool:
    return ours[0] == theirs[0] and same(ours[1], theirs[1])


@pytest.mark.parametrize("kind", MODELS)
def test_every_number_is_as_with_resident_weights(kind: str) -> None:
    expected = trained(MODELS[kind](), {})
    for more in ({}, {"chaos": 1}, {"chaos": 2, "weight_slots": 3}, {"mode": "stream", "slots": 2}):
        assert equal(trained(MODELS[kind](), HOST | more), expected), more


@pytest.mark.parametrize("settings", [{"always_active": ()}, {"always_active": ("lm_head",), "freeze": ("layers.2",)}])
def test_accumulation_and_a_backward_that_ends_early(settings: dict[str, Any]) -> None:
    for accumulation in (1, 3):
        expected = trained(uneven(), {}, accumulation=accumulation, **settings)
        for more in ({}, {"chaos": 3}):
            assert equal(trained(uneven(), HOST | more, accumulation=accumulation, **settings), expected)


def test_it_fails_without_what_brings_and_what_waits() -> None:
    """The tests above see it when weights are not there."""
    expected = trained(uneven(), {})

    def differs(**broken: Any) -> bool:
        for chaos in range(4):
            with mock.patch.multiple(HostWeights, **broken):
                try:
                    if not equal(trained(uneven(), HOST | {"chaos": chaos}), expected):
                        return True
                except Exception:
                    return True
        return False

    bring, settle = HostWeights._bring, HostWeights._settle

    def unmarked(self: HostWeights, first: int) -> None:
        self._depth += 1

    def no_wait(self: HostWeights, n: int, *, trusted: bool) -> None:
        with mock.patch.object(self.transfers, "wait"):
            bring(self, n, trusted=trusted)

    assert differs(backward_begins=lambda self, n, epoch: None)
    assert differs(_bring=no_wait)
    assert differs(_computed=lambda self: module.DONE, _bring=no_wait)
    assert differs(leave=lambda self, active: settle(self))
    assert not differs(_prefetch=lambda self, n, down: None), "prefetches change times alone"


# --- memory and bytes


@contextmanager
def tracking(model: nn.Module, where: list[tuple[str, ...]]) -> Iterator[None]:
    """Notes which layers are not in host memory whenever a block runs."""
    layers = list(model.layers)
    homes = [{p.data_ptr() for p in layer.parameters()} for layer in layers]

    def note(*_: Any) -> None:
        where.append(
            tuple(n for n, layer in enumerate(layers) if not {p.data_ptr() for p in layer.parameters()} <= homes[n])
        )

    handles = [layer.register_forward_hook(note, prepend=True) for layer in layers]
    yield
    for handle in handles:
        handle.remove()


def test_layers_rest_in_host_memory_and_slots_are_all_else() -> None:
    model = tiny()
    optimizer = GrassOptimizer(
        model,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9},
        config=GrassConfig(active_layers=2, sampling_interval=3, update_interval=3, probe_steps=1, offload=HOST),
    )
    weights, where = weights_of(optimizer), []
    assert weights.host_bytes == 8 * PADDED and weights.device_bytes == (2 + 2) * PADDED
    buffers = [(weights.store[n].data_ptr(), weights.store[n].data_ptr() + PADDED) for n in range(8)]

    def rests(n: int) -> bool:
        start, end = buffers[n]
        return all(start <= p.data_ptr() < end for p in model.layers[n].parameters())

    assert all(map(rests, range(8)))
    with tracking(model, where):
        take_steps(model, optimizer, range(1))
    assert where == [(n,) for n in range(8)], "one layer at a time is bound to a slot"
    for step in range(1, 8):
        active = optimizer.grass.active_layers
        assert all(rests(n) == (n not in active) for n in range(8))
        assert all(p.requires_grad == (n in active) for n in range(8) for p in model.layers[n].parameters())
        where.clear()
        take_steps(model, optimizer, range(step, step + 1))


def test_bytes_of_each_step_are_those_that_are_planned() -> None:
    model = tiny()
    config = GrassConfig(active_layers=2, sampling_interval=3, update_interval=3, probe_steps=1, offload=HOST)
    optimizer = GrassOptimizer(model, torch.optim.SGD, {"lr": 0.1}, config=config)
    weights, before = weights_of(optimizer), optimizer.grass.traffic
    # The first layers of a pass come anew; the last two are still there when the backward begins.
    take_steps(model, optimizer, range(1))
    now = optimizer.grass.traffic
    active = len(optimizer.grass.active_layers)
    assert now.weight_bytes_to_device == (8 + (8 - 2) + active) * PADDED and now.weight_bytes_to_host == 0
    for step in range(1, 10):
        before, old = now, optimizer.grass.active_layers
        take_steps(model, optimizer, range(step, step + 1))
        now, new = optimizer.grass.traffic, optimizer.grass.active_layers
        resting = [n for n in range(8) if n not in old]
        came = 2 * len(resting) - 2 + len(set(new) - set(old))
        assert now.weight_bytes_to_device - before.weight_bytes_to_device == came * PADDED
        assert now.weight_bytes_to_host - before.weight_bytes_to_host == len(set(old) - set(new)) * PADDED
        assert now.bytes_to_device == now.bytes_to_host == 0  # SGD without momentum keeps nothing
    assert now.copies == (now.weight_bytes_to_device + now.weight_bytes_to_host) / PADDED
    with torch.no_grad():
        loss_of(model, 0)
    passed = optimizer.grass.traffic.weight_bytes_to_device - now.weight_bytes_to_device
    assert passed == 6 * PADDED
    assert weights.transfers.harvest() is weights.transfers.traffic


def test_recomputing_shares_the_copy_of_the_backward() -> None:
    moved = []
    for kind in (Tiny, Checkpointed, partial(Checkpointed, reentrant=True)):
        model = seeded(kind)
        config = GrassConfig(active_layers=2, probe_steps=0, sampler="uniform", offload=HOST)
        optimizer = GrassOptimizer(model, torch.optim.SGD, {"lr": 0.1}, config=config)
        take_steps(model, optimizer, range(3))
        moved.append(optimizer.grass.traffic.weight_bytes_to_device)
    assert moved[0] == moved[1] == moved[2]


def test_a_backward_that_stops_brings_nothing_below() -> None:
    model = tiny()
    config = GrassConfig(
        active_layers=2,
        probe_steps=0,
        sampler="fixed",
        fixed_layers=(4, 5),
        always_active=("lm_head",),
        offload=HOST,
    )
    optimizer = GrassOptimizer(model, torch.optim.SGD, {"lr": 0.1}, config=config)
    first = optimizer.grass.traffic.weight_bytes_to_device
    assert first == 2 * PADDED
    take_steps(model, optimizer, range(2))
    # 0 to 3, 6 and 7 for the forward; the backward passes 7 and 6, which are still there.
    assert optimizer.grass.traffic.weight_bytes_to_device - first == 2 * 6 * PADDED


def test_no_memory_is_allocated_in_steady_state() -> None:
    made: list[int] = []
    model = tiny()
    config = GrassConfig(active_layers=2, sampling_interval=2, update_interval=2, probe_steps=1, offload=HOST)
    optimizer = GrassOptimizer(model, torch.optim.SGD, {"lr": 0.1}, config=config)
    weights = weights_of(optimizer)
    pointers = {id(window): window.slot.flat.data_ptr() for window in weights._windows}
    threads = threading.active_count()
    for step in range(9):
        take_steps(model, optimizer, range(step, step + 1))
        made.append(len(weights.transfers._copied) + len(weights.transfers._computed))
        assert pointers == {id(window): window.slot.flat.data_ptr() for window in weights._windows}
        slots = {slot.flat.data_ptr() for slot in weights._homes.values()}
        assert len(slots) == 2 and len({*slots, *pointers.values()}) == 4
    assert threading.active_count() == threads and max(made) < 12 * 8, "events are kept"


# --- what else reads and writes weights


def both(steps: int = 6, **settings: Any) -> list[tuple[nn.Module, GrassOptimizer]]:
    made = []
    for offload in ({}, HOST):
        model, optimizer = make(offload, **settings)
        take_steps(model, optimizer, range(steps))
        made.append((model, optimizer))
    return made


def test_what_is_saved_is_as_with_resident_weights() -> None:
    (theirs, _), (ours, optimizer) = both()
    dicts = [model.state_dict() for model in (ours, theirs)]
    assert dicts[0].keys() == dicts[1].keys()
    assert all(torch.equal(dicts[0][key], dicts[1][key]) for key in dicts[0])
    files = []
    for saved in dicts:
        files.append(io.BytesIO())
        torch.save(saved, files[-1])
    assert files[0].tell() == files[1].tell(), "each tensor is saved with its own memory alone"
    files[0].seek(0)
    fresh = uneven()
    fresh.load_state_dict(torch.load(files[0]))
    one = io.BytesIO()
    active = optimizer.grass.active_layers[0]
    for n in (active, next(n for n in range(8) if n not in optimizer.grass.active_layers)):
        one = io.BytesIO()
        torch.save(ours.layers[n].norm.weight.detach(), one)
        assert one.tell() < 2000


@pytest.mark.parametrize("how", ["load_state_dict", "data.copy_", "copy_", "data", "to", "vector"])
def test_weights_that_someone_sets_are_used(how: str) -> None:
    def setting(model: nn.Module) -> None:
        other = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
        if how == "load_state_dict":
            model.load_state_dict(other)
        elif how == "vector":
            torch.nn.utils.vector_to_parameters(torch.cat([p.flatten() for p in other.values()]), model.parameters())
        elif how == "to":
            model.to(torch.float64).to(torch.float32)
        for name, p in model.named_parameters():
            if how == "data.copy_":
                p.data.copy_(other[name])
            elif how == "copy_":
                with torch.no_grad():
                    p.copy_(other[name])
            elif how == "data":
                p.data = other[name].clone()

    left = []
    for model, optimizer in both():
        losses = []
        for step in range(6, 13):
            if step in (7, 9):
                setting(model)
            with torch.no_grad():
                losses.append(loss_of(model, step).item())
            take_steps(model, optimizer, range(step, step + 1))
        left.append((losses, outcome(optimizer, model)))
    assert equal(left[0], left[1])


def test_a_copy_of_the_model_stands_alone() -> None:
    (theirs, _), (ours, optimizer) = both()
    average = copy.deepcopy(ours)
    assert torch.equal(loss_of(average, 3), loss_of(theirs, 3))
    loss_of(average, 3).backward()
    moved = optimizer.grass.traffic.weight_bytes_to_device
    loss_of(average, 3)
    assert optimizer.grass.traffic.weight_bytes_to_device == moved
    pickled = io.BytesIO()
    torch.save(ours, pickled)
    pickled.seek(0)
    loaded = torch.load(pickled, weights_only=False)
    assert torch.equal(loss_of(loaded, 3), loss_of(theirs, 3))
    averaged = torch.optim.swa_utils.AveragedModel(ours)
    take_steps(ours, optimizer, range(6, 10))
    averaged.update_parameters(ours)
    assert torch.isfinite(loss_of(averaged.module, 0))


def test_detach_gives_the_model_back() -> None:
    (theirs, _), (ours, optimizer) = both()
    weights = weights_of(optimizer)
    optimizer.detach()
    own = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    assert not any(
        weights.store[n].data_ptr() <= at < weights.store[n].data_ptr() + PADDED for at in own for n in range(8)
    )
    moved = weights.transfers.traffic.copies
    assert torch.equal(loss_of(ours, 3), loss_of(theirs, 3)) and weights.transfers.traffic.copies == moved
    assert all(p.requires_grad for p in ours.parameters())
    GrassOptimizer(ours, torch.optim.SGD, {"lr": 0.1}, config=GrassConfig(active_layers=2, offload=HOST))


@pytest.mark.parametrize("cross", [False, True])
def test_a_state_is_loaded_in_any_mode(cross: bool) -> None:
    (_, first), (_, second) = both(steps=5)
    left = []
    for source, offload in ((first, {}), (second, HOST)):
        saved = copy.deepcopy((first if cross else source).state_dict())
        weights = {k: v.clone() for k, v in (first._model).state_dict().items()}
        model, optimizer = make(offload)
        take_steps(model, optimizer, range(2))
        model.load_state_dict(weights)
        optimizer.load_state_dict(saved)
        take_steps(model, optimizer, range(5, 12))
        left.append(outcome(optimizer, model))
    assert same(*left)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_exception_in_the_middle_leaves_all_right(when: str) -> None:
    left = []
    for model, optimizer in both(steps=4):

        def fail(*_: Any) -> None:
            raise ZeroDivisionError

        if when == "forward":
            handle = model.layers[5].up.register_forward_pre_hook(fail)
            with pytest.raises(ZeroDivisionError):
                loss_of(model, 4).backward()
            handle.remove()
        else:
            handle = model.layers[3].up.register_forward_hook(lambda _, __, out: out.register_hook(fail) and None)
            with pytest.raises(ZeroDivisionError):
                loss_of(model, 4).backward()
            handle.remove()
            with torch.no_grad():
                for param in model.parameters():
                    param.mul_(0.5)
        optimizer.zero_grad()
        take_steps(model, optimizer, range(5, 11))
        left.append(outcome(optimizer, model))
    assert same(*left)


def test_a_gradient_that_comes_in_at_the_side() -> None:
    """A loss on what is inside a layer, which no gradient of the layer's output precedes."""
    norms = []
    for model, _ in both():
        inside: list[torch.Tensor] = []
        handle = model.layers[4].up.register_forward_hook(lambda _, __, x: inside.append(x))  # noqa: B023
        loss_of(model, 3)
        handle.remove()
        norms.append(torch.autograd.grad(inside[0].square().mean(), model.embed.weight)[0])
    assert torch.equal(*norms) and norms[0].abs().sum() > 0


def test_forwards_within_and_between_backwards() -> None:
    left = []
    for model, optimizer in both():

        def look(_: torch.Tensor) -> None:
            with torch.no_grad():
                loss_of(model, 50)  # noqa: B023

        handle = model.layers[3].register_forward_hook(
            lambda _, __, x: x.register_hook(look) and None if torch.is_grad_enabled() else None
        )
        for step in range(6, 10):
            losses = [loss_of(model, step), loss_of(model, step + 20)]
            with torch.no_grad():
                loss_of(model, 51)
            losses[0].backward(retain_graph=True)
            losses[1].backward()
            losses[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        handle.remove()
        left.append(outcome(optimizer, model))
    assert same(*left)


def test_tied_and_odd_weights_stay() -> None:
    def tied() -> nn.Module:
        model = tiny()
        model.layers[2].norm.weight = model.norm.weight
        model.layers[5].up.weight = nn.Parameter(model.layers[5].up.weight.detach().T.contiguous().T)
        for layer in model.layers[6:]:
            layer.register_buffer("scale", torch.ones(3))
        return model

    assert equal(trained(tied(), HOST), trained(tied(), {}))


@pytest.mark.usefixtures("switched_off")
def test_a_trainer_saves_evaluates_loads_the_best_and_goes_on(tmp_path) -> None:
    settings = {"active_layers": 2, "probe_steps": 1, "sampling_interval": 2, "update_interval": 2}
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    often |= {"num_train_epochs": 3, "evaluated": rows(4)}
    ran, sizes, answers = {}, {}, {}
    for name, offload in (("resident", {}), ("host", HOST)):
        enable(GrassConfig(offload=offload, **settings))
        run = ran[name] = run_of(tmp_path / name, load_best_model_at_end=True, **often)
        run.train()
        disable()
        run.save_model(str(tmp_path / f"model-{name}"))
        sizes[name] = [file.stat().st_size for file in sorted((tmp_path / name / "checkpoint-4").iterdir())]
        answers[name] = run.model.generate(torch.arange(6)[None], max_new_tokens=5, do_sample=False, pad_token_id=0)
        sizes[name].append((tmp_path / f"model-{name}" / "model.safetensors").stat().st_size)
    losses = {name: logged(run, "loss") for name, run in ran.items()}
    assert losses["host"] == losses["resident"] and torch.equal(answers["host"], answers["resident"])
    pairs = zip(sizes["host"], sizes["resident"], strict=True)
    assert all(abs(ours - theirs) < 100 for ours, theirs in pairs), "each file holds what it is of, and nothing more"
    states = [run.model.state_dict() for run in ran.values()]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    enable(GrassConfig(offload=HOST, **settings))
    again = run_of(tmp_path / "host", **often)
    again.train(resume_from_checkpoint=str(tmp_path / "host" / "checkpoint-4"))
    assert logged(again, "loss")[-8:] == losses["resident"][-8:]


# --- what is refused


def refusal(model: nn.Module, **offload: Any) -> str:
    with pytest.raises((ConfigError, GrassError)) as caught:
        GrassOptimizer(model, torch.optim.AdamW, config=GrassConfig(active_layers=2, offload=HOST | offload))
    return str(caught.value)


def test_what_cannot_be_is_refused_by_name() -> None:
    model = tiny()
    model.layers[1].compile()
    assert "weights='host'" in refusal(model) and "compile nothing" in refusal(model)
    assert "interval" in refusal(tiny(), mode="none") and "perhaps" in refusal(tiny(), mode="auto")
    with pytest.raises(ConfigError, match="CPUOffloadPolicy"):
        Fsdp2Backend.rest_weights(mock.Mock(spec=Fsdp2Backend))
    block = {"active_layers": 2, "offload": HOST}
    with pytest.raises(ConfigError, match="offload_param"):
        split_ds_config({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "grass": block})


def test_what_would_be_wrong_later_is_an_error() -> None:
    _, (model, optimizer) = both(steps=5)
    loss = loss_of(model, 0)
    with pytest.raises(GrassError, match="create_graph"):
        torch.autograd.grad(loss, model.embed.weight, create_graph=True)
    optimizer.zero_grad()
    late, before = loss_of(model, 1), optimizer.grass.active_layers
    while optimizer.grass.active_layers == before:
        optimizer.step()
    with pytest.raises(GrassError, match="before optimizer.step"):
        late.backward()
    optimizer.zero_grad()
    take_steps(model, optimizer, range(3))


def test_a_layer_within_a_layer_needs_other_slots() -> None:
    class Nested(Tiny):
        def __init__(self) -> None:
            super().__init__()
            outer, inner = self.layers[1], self.layers[3]
            outer.register_forward_hook(lambda *_: None)
            forward = outer.forward
            outer.forward = lambda x: forward(x) + inner(x)

    with pytest.raises(GrassError, match=r"layers\.3 runs within layers\.1.*weight_slots"):
        trained(seeded(Nested), HOST)
    assert equal(trained(seeded(Nested), HOST | {"weight_slots": 3}), trained(seeded(Nested), {}))
