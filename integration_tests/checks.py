"""What spawned ranks do in the parity and byte tests: many checks in one spawn, since a spawn is what costs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import grass_dist
from grass_dist.states.unit_optimizer import ELEMENTWISE
from integration_tests.support.model import (
    ADAMW,
    CLIP,
    FROZEN,
    GLOBAL_BATCH,
    decay_groups,
    global_batch,
    schedule,
    small_llama,
    wrapped,
)
from integration_tests.support.ranks import refused
from integration_tests.support.training import full, local, train_grass
from integration_tests.support.wire import Wire
from tests.tiny import loss_of, take_steps, tiny

SETTINGS = {
    "active_layers": 2,
    "probe_steps": 3,
    "sampling_interval": 4,
    "update_interval": 3,
    "ema_alpha": 0.3,
    "temperature": 0.5,
    "seed": 15,  # with it, a refresh or draw at another step draws other layers
}
STEPS = 30
RESIDENT = {**SETTINGS, "offload": {"mode": "none"}}


def on_two_ranks(rank: int, world_size: int) -> dict[str, Any]:
    return {
        "fsdp2": train_grass(rank, world_size, "fsdp2", SETTINGS, STEPS),
        "fsdp2 no sync": train_grass(rank, world_size, "fsdp2", SETTINGS, STEPS, sync_every_micro_batch=False),
        "ddp": train_grass(rank, world_size, "ddp", SETTINGS, STEPS),
        "fsdp2 frozen layers": train_grass(rank, world_size, "fsdp2", SETTINGS, STEPS, frozen=FROZEN),
        "ddp frozen layers": train_grass(rank, world_size, "ddp", SETTINGS, STEPS, frozen=FROZEN),
        "ddp no sync": train_grass(rank, world_size, "ddp", RESIDENT, STEPS, sync_every_micro_batch=False),
        "fsdp2 bf16": train_grass(rank, world_size, "fsdp2", SETTINGS, STEPS, dtype=torch.bfloat16),
        "fsdp2 bf16 no sync": train_grass(
            rank, world_size, "fsdp2", SETTINGS, STEPS, dtype=torch.bfloat16, sync_every_micro_batch=False
        ),
        "ddp bf16": train_grass(rank, world_size, "ddp", SETTINGS, STEPS, dtype=torch.bfloat16),
        "fsdp2 one micro-batch": train_grass(rank, world_size, "fsdp2", SETTINGS, STEPS, accumulation=1),
        "fsdp2 full": full_is_adamw(rank, world_size, "fsdp2"),
        "ddp full": full_is_adamw(rank, world_size, "ddp"),
        "fsdp2 wire": bytes_of_a_step(rank, world_size, "fsdp2"),
        "ddp wire": bytes_of_a_step(rank, world_size, "ddp"),
        "fsdp2 wire bf16": bytes_of_a_step(rank, world_size, "fsdp2", torch.bfloat16),
        "ddp wire bf16": bytes_of_a_step(rank, world_size, "ddp", torch.bfloat16),
        **{
            f"{backend} probe {micro}": gradients_held_in_probe(rank, world_size, backend, micro)
            for backend in ("fsdp2", "ddp")
            for micro in (1, 2)
        },
        "fsdp2 resume": resumed(rank, world_size, "fsdp2"),
        "ddp resume": resumed(rank, world_size, "ddp"),
        "ddp gradients": ddp_gradients(rank, world_size),
        "fsdp2 not finite": not_finite_on_one_rank(rank, world_size, "fsdp2"),
        "ddp not finite": not_finite_on_one_rank(rank, world_size, "ddp"),
        "ddp unused": embeddings_without_gradient(rank, world_size),
        **{
            f"{backend} cut off {what}": refused(lambda b=backend, s=settings: cut_off(rank, world_size, b, s))
            for backend in ("fsdp2", "ddp")
            for what, settings in CUT_OFF.items()
        },
    }


CUT_OFF: dict[str, dict[str, Any]] = {
    "in a probe": {"probe_steps": 2},
    "in a round": {"sampler": "uniform", "always_active": ["final_norm", "lm_head"]},
}


def cut_off(rank: int, world_size: int, backend: str, settings: dict[str, Any]) -> None:
    """A step whose layers reentrant checkpointing cuts off."""
    bare = small_llama().train()
    layers = [checkpoint_wrapper(layer, CheckpointImpl.REENTRANT) for layer in bare.model.layers]
    bare.model.layers = nn.ModuleList(layers)
    model = wrapped(bare, backend, world_size)
    config = grass_dist.GrassConfig(active_layers=2, **settings)
    optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=config)
    x = global_batch(0)[rank * 4 :][:4]
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()


def on_four_ranks(rank: int, world_size: int) -> dict[str, Any]:
    return {
        "fsdp2": train_grass(rank, world_size, "fsdp2", SETTINGS, STEPS),
        "hsdp": train_grass(rank, world_size, "hsdp", SETTINGS, STEPS),
        "ddp": train_grass(rank, world_size, "ddp", SETTINGS, STEPS),
        "hsdp full": full_is_adamw(rank, world_size, "hsdp"),
        "hsdp wire": bytes_of_a_step(rank, world_size, "hsdp"),
        "ddp wire": bytes_of_a_step(rank, world_size, "ddp"),
        "ddp parts": {
            **{cls.__name__: divided_and_whole(rank, world_size, cls) for cls in (*ELEMENTWISE, torch.optim.Adafactor)},
            "bfloat16": divided_and_whole(rank, world_size, torch.optim.AdamW, torch.bfloat16),
        },
        "ddp in backward": in_backward_and_after(rank, world_size),
        "ddp foreign states": foreign_states(rank, world_size),
        "ddp disagree": refused(lambda: divided(world_size, shard_states=rank != 3)),
    }


def full_is_adamw(rank: int, world_size: int, backend: str) -> dict[str, Any]:
    """γ = L without a probe beside stock AdamW under the same wrapper: six steps, accumulation, clipping, groups."""

    def run(make_optimizer) -> dict[str, torch.Tensor]:
        model = wrapped(small_llama(), backend, world_size)
        optimizer = make_optimizer(model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        per = GLOBAL_BATCH // world_size // 2
        for step in range(6):
            x = global_batch(step)
            for micro in range(2):
                mine = x[(micro * world_size + rank) * per :][:per]
                with model.no_sync() if backend == "ddp" and micro == 0 else contextlib.nullcontext():
                    (model(input_ids=mine, labels=mine).loss / 2).backward()
            if isinstance(optimizer, grass_dist.GrassOptimizer):
                optimizer.clip_grad_norm_(CLIP)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return {n: full(p).clone() for n, p in model.named_parameters()}

    config = grass_dist.GrassConfig(active_layers=8, probe_steps=0, sampling_interval=2, update_interval=2)
    ours = run(lambda m: grass_dist.GrassOptimizer(m, torch.optim.AdamW, ADAMW, config=config, params=decay_groups(m)))
    stock = run(lambda m: torch.optim.AdamW(decay_groups(m), **ADAMW))
    return {"differing": [n for n in stock if not torch.equal(ours[n], stock[n])], "compared": len(stock)}


def bytes_of_a_step(rank: int, world_size: int, backend: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Bytes of four training steps, with and without the always-active roles: gradients, weights, what trains, states.

    The states are summed over the device and the host. After the first and the third step no layer without a state has
    a slot on the device, so that the sum is of those that have trained.
    """
    out = {}
    for name, always in (("with roles", grass_dist.config.ROLES), ("layers only", ())):
        reduce_dtype = torch.float32 if dtype != torch.float32 else None
        model = wrapped(small_llama(dtype), backend, world_size, reduce_dtype)
        config = grass_dist.GrassConfig(
            active_layers=2,
            probe_steps=0,
            sampling_interval=2,
            update_interval=3,
            draw_ahead=0,
            always_active=always,
        )
        optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=config)
        counted, expected, claimed, squares, lowest = [], [], [], [], []
        states, trained = [], {}
        roles = 4 * sum(len(unit.params) for unit in optimizer.grass.roles)  # AdamW's steps; layers' are not counted
        for step in range(4):
            units = optimizer.grass.trainable_units()
            expected.append(4 * sum(p.numel() for u in units for _, p in u.params))
            reached = layers_reached_by_backward(model, optimizer)
            before = optimizer.grass.bytes_reduced
            x = global_batch(step, 2 * world_size)[2 * rank : 2 * rank + 2]
            with Wire() as wire:
                model(input_ids=x, labels=x).loss.backward()
                optimizer.step()
            lowest.append((min(optimizer_active(units)), min(reached, default=None)))
            counted.append({kind: wire.floats[kind] for kind in ("reduce_scatter", "all_reduce", "all_gather")})
            trained.update((unit.name, unit.numel) for unit in units)
            states.append((optimizer.state_bytes + optimizer.host_state_bytes - roles, sum(trained.values())))
            squares.append((wire.calls["all_reduce"], wire.bytes["all_reduce"] - wire.floats["all_reduce"]))
            claimed.append(optimizer.grass.bytes_reduced - before)
            optimizer.zero_grad()
        out[name] = {
            "counted": counted,
            "expected": expected,
            "claimed": claimed,
            "squares": squares,
            "lowest": lowest,
            "states": states[0::2],
            "all layers": 4 * sum(unit.numel for unit in optimizer.grass.layers),
        }
    return out


def optimizer_active(units: list) -> list[int]:
    return [u.index for u in units if u.index is not None]


def layers_reached_by_backward(model: nn.Module, optimizer: grass_dist.GrassOptimizer) -> set[int]:
    """Fills with the indices of the layers whose output gets a gradient in the next backward."""
    reached: set[int] = set()
    handles = []
    inner = model.module if hasattr(model, "module") else model

    def watch(index):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: reached.add(index))

        return hook

    for index, layer in enumerate(inner.model.layers):
        handles.append(layer.register_forward_hook(watch(index)))
    return reached


def gradients_held_in_probe(rank: int, world_size: int, backend: str, accumulation: int) -> dict[str, Any]:
    """The most bytes of gradients that parameters hold at any hook of a probe, on this rank."""
    model = wrapped(small_llama(), backend, world_size)
    config = grass_dist.GrassConfig(
        active_layers=1, probe_steps=2, sampling_interval=2, update_interval=2, offload={"mode": "none"}
    )
    held = HeldGradients(model)
    optimizer = grass_dist.GrassOptimizer(
        model, torch.optim.AdamW, ADAMW, config=config, gradient_accumulation_steps=accumulation
    )
    state_in_probe = 0
    for step in range(2):
        x = global_batch(step, 4 * world_size)
        for micro in range(accumulation):
            mine = x[(micro * world_size + rank) * 2 :][:2]
            (model(input_ids=mine, labels=mine).loss / accumulation).backward()
        optimizer.step()
        state_in_probe += optimizer.state_bytes
    return {
        "peak": held.peak,
        "left": held.now(),
        "hooks": held.calls,
        "layer": max(sum(local(p).nbytes for _, p in unit.params) for unit in optimizer.grass.layers),
        "all": sum(local(p).nbytes for p in model.parameters()),
        "state": state_in_probe,
        "moved": sum(
            not torch.equal(full(a), b) for a, b in zip(model.parameters(), small_llama().parameters(), strict=True)
        ),
    }


class HeldGradients:
    """Adds up, at each gradient's arrival, the memory behind all ``.grad``s: each storage once."""

    def __init__(self, model: nn.Module) -> None:
        self.params = list(model.parameters())
        self.peak = self.calls = 0
        for param in self.params:  # registered before the optimizer's hooks, so it runs before they free anything
            param.register_post_accumulate_grad_hook(self._arrived)

    def now(self) -> int:
        storages = {}
        for param in self.params:
            if param.grad is not None:
                grad = local(param.grad)
                storages[grad.untyped_storage().data_ptr()] = grad.nbytes + storages.get(
                    grad.untyped_storage().data_ptr(), 0
                )
        return sum(storages.values())

    def _arrived(self, _: torch.Tensor) -> None:
        self.calls += 1
        self.peak = max(self.peak, self.now())


def embeddings_without_gradient(rank: int, world_size: int) -> dict[str, Any]:
    """Under DDP, a unit that trains and gets no gradient: the last one to be reduced, which others could wait for."""
    model = wrapped(small_llama(), "ddp", world_size)
    config = grass_dist.GrassConfig(active_layers=2, probe_steps=2, sampling_interval=2, update_interval=2)
    optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=config)
    reduced = []
    for step in range(6):
        before = optimizer.grass.bytes_reduced
        generator = torch.Generator().manual_seed(100 * step + rank)
        hidden = torch.randn(2, 8, 64, generator=generator)
        x = torch.randint(0, 128, (2, 8), generator=generator)
        model(inputs_embeds=hidden, labels=x).loss.backward()
        expected = 4 * sum(u.numel for u in optimizer.grass.trainable_units())
        optimizer.step()
        optimizer.zero_grad()
        reduced.append((optimizer.grass.bytes_reduced - before, expected))
    return {"reduced": reduced, "sum": sum(p.double().sum().item() for p in model.parameters())}


def ddp_gradients(rank: int, world_size: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Gradients of two micro-batches under DDP beside those of one process with all of them.

    Each micro-batch synchronises, or the last one, or none (then the step does it); the model is given ids, or
    embeddings, which leaves its own embeddings without a gradient.
    """

    def loss(model, inputs, micro, of_rank):
        generator = torch.Generator().manual_seed(10 * micro + of_rank)
        ids = torch.randint(0, 128, (2, 8), generator=generator)
        given = {"input_ids": ids} if inputs == "ids" else {"inputs_embeds": torch.randn(2, 8, 64, generator=generator)}
        return model(labels=ids, **given).loss / 2

    out = {}
    for inputs in ("ids", "embeddings"):
        reference = small_llama()
        for micro in range(2):
            for of_rank in range(world_size):
                (loss(reference, inputs, micro, of_rank) / world_size).backward()
        expected = {n: p.grad for n, p in reference.named_parameters()}
        for mode in ("each", "last", "none"):
            model = wrapped(small_llama(), "ddp", world_size)
            config = grass_dist.GrassConfig(active_layers=2, probe_steps=0, update_interval=1, sampling_interval=9)
            optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, {"lr": 0.0}, config=config)
            units = optimizer.grass.trainable_units()
            for micro in range(2):
                quiet = mode == "none" or (mode == "last" and micro == 0)
                with model.no_sync() if quiet else contextlib.nullcontext():
                    loss(model, inputs, micro, rank).backward()
            optimizer.clip_grad_norm_(1e9)  # makes gradients final; the step then has nothing more to reduce
            once = optimizer.grass.bytes_reduced
            pairs = [
                (p.grad, expected[n.removeprefix("module.")]) for u in units for n, p in u.params if p.grad is not None
            ]
            worst = max((g - (torch.zeros_like(g) if e is None else e)).abs().max().item() for g, e in pairs)
            optimizer.clip_grad_norm_(1e-3)
            optimizer.step()
            layer = units[0]
            squares = sum(expected[n.removeprefix("module.")].double().square().sum().item() for n, _ in layer.params)
            out[mode, inputs] = {
                "worst": worst,
                "largest": max(g.abs().max().item() for g, _ in pairs),
                "importance": optimizer.grass.importances[layer.index],
                "expected importance": (squares / layer.numel) ** 0.5,
                "reduced once": once == optimizer.grass.bytes_reduced,
            }
    return out


def not_finite_on_one_rank(rank: int, world_size: int, backend: str) -> dict[str, Any]:
    """A probe of three steps, in the second of which the last rank's loss is not finite."""
    model = wrapped(small_llama(), backend, world_size)
    config = grass_dist.GrassConfig(active_layers=2, probe_steps=3)
    optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=config)
    for step in range(3):
        x = global_batch(step, 2 * world_size)[2 * rank : 2 * rank + 2]
        scale = float("inf") if step == 1 and rank == world_size - 1 else 1.0
        (model(input_ids=x, labels=x).loss * scale).backward()
        optimizer.step()
    return {"dropped": optimizer.grass.dropped, "importances": optimizer.grass.importances}


def resumed(rank: int, world_size: int, backend: str) -> dict[str, Any]:
    """Weights of an undisturbed run, and of one saved between a draw and its switch, built anew and loaded."""
    settings = {**SETTINGS, "probe_steps": 2, "draw_ahead": 2}  # drawn after 8 steps, switched after 10

    def build(state=None):
        model = wrapped(small_llama(), backend, world_size)
        optimizer = grass_dist.GrassOptimizer(
            model, torch.optim.AdamW, ADAMW, config=grass_dist.GrassConfig(**settings), params=decay_groups(model)
        )
        if state is not None:
            weights, optimizer_state = state
            with torch.no_grad():
                for p, w in zip(model.parameters(), weights, strict=True):
                    local(p).copy_(w)
            optimizer.load_state_dict(optimizer_state)
        return model, optimizer

    def steps(model, optimizer, numbers):
        for step in numbers:
            x = global_batch(step, 2 * world_size)[2 * rank : 2 * rank + 2]
            model(input_ids=x, labels=x).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = build()
    steps(model, optimizer, range(9))
    saved = [local(p).clone() for p in model.parameters()], optimizer.state_dict()
    saved = (saved[0], _copied(saved[1]))
    steps(model, optimizer, range(9, 20))
    other, other_optimizer = build(saved)
    steps(other, other_optimizer, range(9, 20))
    return {
        "differing": [
            n
            for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True)
            if not torch.equal(local(p), local(q))
        ],
        "same layers": optimizer.grass.active_layers == other_optimizer.grass.active_layers,
        "step": other_optimizer.grass.step,
    }


ODD = {"layers": 4, "width": 5, "vocab": 17}  # a norm in four parts: 2, 2, 1 and no entries
DIVIDED = {"active_layers": 3, "probe_steps": 1, "sampling_interval": 2, "update_interval": 2}


def divided(
    world_size: int,
    cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    shard_states: bool = True,
    dtype: torch.dtype = torch.float32,
    **offload: Any,
) -> tuple[nn.Module, grass_dist.GrassOptimizer]:
    model = wrapped(tiny(dtype, **ODD), "ddp", world_size)
    config = grass_dist.GrassConfig(**DIVIDED, offload=offload or {"mode": "none"})
    return model, grass_dist.GrassOptimizer(model, cls, {"lr": 1e-3}, config=config, shard_states=shard_states)


def divided_and_whole(
    rank: int, world_size: int, cls: type[torch.optim.Optimizer], dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Six steps under DDP with states in parts, and with whole ones: weights, bytes of states, bytes of the gathers."""
    out: dict[str, Any] = {}
    for shard_states in (True, False):
        model, optimizer = divided(world_size, cls, shard_states, dtype)
        gathered, padded = [], []
        for step in range(6):
            units = optimizer.grass.trainable_units() if optimizer.grass.phase == "train" else []
            padded.append(
                sum(-(-p.numel() // world_size) * world_size * p.element_size() for u in units for _, p in u.params)
            )
            loss_of(model, step * world_size + rank).backward()
            with Wire() as wire:
                optimizer.step()
            gathered.append(wire.floats["all_gather"])
            optimizer.zero_grad()
        state = optimizer.state_dict()["state"]
        kept = [v for entry in state.values() for v in entry.values() if torch.is_tensor(v) and v.ndim]
        out["parts" if shard_states else "whole"] = {
            "params": [p.detach().clone() for p in model.parameters()],
            "entries": sum(v.numel() for v in kept),
            "gathered": gathered,
            "padded": padded,
        }
    return out


def in_backward_and_after(rank: int, world_size: int) -> list[str]:
    """Parameters that differ when layers are updated within the backward, with states in parts."""
    runs = []
    for in_backward in (True, False):
        model, optimizer = divided(world_size, mode="stream", slots=2, update_in_backward=in_backward)
        for step in range(9):
            loss_of(model, step * world_size + rank).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(dict(model.named_parameters()))
    return [name for name in runs[0] if not torch.equal(runs[0][name], runs[1][name])]


def foreign_states(rank: int, world_size: int) -> dict[str, str]:
    """What loading says of a state that is not this rank's: of whole parameters, of another rank, of other ranks."""

    def said(shard_states: bool, state: dict[str, Any]) -> str:
        try:
            divided(world_size, shard_states=shard_states)[1].load_state_dict(state)
        except ValueError as error:
            return str(error)
        return "loaded"

    states = {}
    for shard_states in (True, False):
        model, optimizer = divided(world_size, shard_states=shard_states)
        take_steps(model, optimizer, range(4))
        states[shard_states] = _copied(optimizer.state_dict())
    theirs = optimizer.grass.backend.gather_objects(states[True])[0]
    fewer = {**states[True], "state": {i: {**s, "part": (rank, 2)} for i, s in states[True]["state"].items()}}
    return {
        "own": said(True, states[True]),
        "own whole": said(False, states[False]),
        "whole": said(True, states[False]),
        "part": said(False, states[True]),
        "of rank 0": said(True, theirs),
        "of fewer": said(True, fewer),
    }


def _copied(state: Any) -> Any:
    import copy

    return copy.deepcopy(state)
