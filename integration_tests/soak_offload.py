"""Many short trainings with states that move, in settings drawn at random, each to the bit as with states that stay.

    python -m integration_tests.soak_offload --minutes 20 [--seed 0]        # or: make soak
    python -m integration_tests.soak_offload --trainings 3 --first 17       # those three again

Two ranks train the small Llama under FSDP2, DDP and ZeRO-1 to 3. After each step what is counted must hold (`Account`);
at the end weights, masters and moments are compared with those of the mode "none". Memory and threads of each process
are read after each training, and must not grow: the last third of the run is compared with the first, without the
trainings that warm it up. ZeRO-3 has processes of its own, which may grow: DeepSpeed 0.19.8 keeps a ZeRO-3 optimizer
for good, without GRASS too. Prints a line for each training; the exit code is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import grass_dist
from grass_dist.offload.moving import MovingStates
from integration_tests.model import ADAMW, CLIP, GLOBAL_BATCH, LAYERS, decay_groups, global_batch, wrapped
from integration_tests.offload import model_of
from integration_tests.ranks import run_ranks
from integration_tests.training import full, local

BACKENDS = ("fsdp2", "ddp", "zero1", "zero2", "zero3")
ROLES = ("embeddings", "final_norm", "lm_head")
WARM_UP = 10
"""Trainings before memory and threads are compared, if at least three times as many follow."""
GROWTH = 16e6
"""Bytes of a process that are taken for noise."""


def drawn(seed: int, number: int) -> dict[str, Any]:
    """Settings of training ``number``; backends take turns, all else is random."""
    rng = random.Random(f"{seed}/{number}")
    backend = BACKENDS[number % len(BACKENDS)]
    interval, update, probe = rng.randint(1, 5), rng.randint(1, 6), rng.randint(0, 2)
    offload: dict[str, Any] = {"mode": rng.choice(["interval", "stream"]), "prefetch_steps": rng.randint(0, 3)}
    offload |= {"slots": rng.randint(2, 4), "chaos": rng.choice([None, rng.randrange(1000)])}
    offload |= {"update_in_backward": not backend.startswith("zero") and rng.random() < 0.4}
    settings = {
        **{"active_layers": rng.randint(1, LAYERS), "sampling_interval": interval, "update_interval": update},
        **{"draw_ahead": rng.randrange(min(interval, update)), "probe_steps": probe, "temperature": 2.0},
        **{"sampler": rng.choice(["grass", "uniform", "random-cyclic"]), "seed": rng.randrange(1000)},
        "always_active": rng.choice([ROLES, ROLES, ("final_norm",), ()]),
    }
    return {
        **{"backend": backend, "offload": offload, "settings": settings, "accumulation": rng.choice([1, 2])},
        **{"dtype": rng.choice([torch.float32, torch.bfloat16]), "uneven": rng.random() < 0.3},
        **{"steps": probe + interval * rng.randint(2, 4) + rng.randint(0, 2), "reads": rng.choice([0, 0.3])},
    }


class TorchTraining:
    """Under FSDP2 or DDP."""

    born_on_host = False

    def __init__(self, rank: int, world_size: int, case: dict[str, Any], offload: dict[str, Any]) -> None:
        self._rank, self._world_size, self._micro_batches = rank, world_size, case["accumulation"]
        self._clips = not case["offload"]["update_in_backward"]
        reduce_dtype = None if case["dtype"] == torch.float32 else torch.float32
        self.model = wrapped(model_of(case["dtype"], case["uneven"]), case["backend"], world_size, reduce_dtype)
        self.optimizer = grass_dist.GrassOptimizer(
            self.model,
            torch.optim.AdamW,
            ADAMW,
            config=grass_dist.GrassConfig(**case["settings"], offload=offload),
            params=decay_groups(self.model),
            gradient_accumulation_steps=self._micro_batches,
        )
        self.grass = self.optimizer.grass
        self.moving: MovingStates = self.grass.states  # unless they stay

    def step(self, number: int) -> float:
        per, total = GLOBAL_BATCH // self._world_size // self._micro_batches, 0.0
        for micro in range(self._micro_batches):
            x = global_batch(number)[(micro * self._world_size + self._rank) * per :][:per]
            loss = self.model(input_ids=x, labels=x).loss / self._micro_batches
            loss.backward()
            total += loss.item()
        if self._clips:
            self.optimizer.clip_grad_norm_(CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def bytes_now(self) -> tuple[int, int]:
        return self.optimizer.state_bytes, self.optimizer.host_state_bytes

    def roles(self) -> int:
        return sum(own.nbytes for own in self.optimizer._role_optimizers)

    def tensors(self) -> dict[str, torch.Tensor]:
        state = self.optimizer.state_dict()["state"]
        return {f"{i}/{k}": local(v) for i, own in state.items() for k, v in own.items() if torch.is_tensor(v)}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: full(param) for name, param in self.model.named_parameters()}

    def on_host(self, layer: int) -> bool | None:
        """Whether the state of the layer is where the host keeps it."""
        states = [self.optimizer.state[p] for _, p in self.grass.layers[layer].params]
        return lie_in(self.moving.store[layer], [v for own in states for v in own.values() if v.numel() > 1])

    def end(self) -> None:
        pass


class ZeroTraining:
    """Under DeepSpeed."""

    born_on_host = True

    def __init__(self, rank: int, world_size: int, case: dict[str, Any], offload: dict[str, Any]) -> None:
        from integration_tests.zero import ds_config, make_engine

        self._place, self._micro_batches = (rank, world_size), case["accumulation"]
        settings = {**case["settings"], "offload": offload}
        config = ds_config(int(case["backend"][-1]), settings, case["accumulation"], case["dtype"])
        self.engine = make_engine(config, case["dtype"], model_of(case["dtype"], case["uneven"]))
        self.grass, self._states = self.engine.grass, self.engine.optimizer.states
        self.moving: MovingStates = self._states._moving

    def step(self, number: int) -> float:
        from integration_tests.zero import train_step

        return train_step(self.engine, number, *self._place, self._micro_batches)

    def bytes_now(self) -> tuple[int, int]:
        return self._states.device_bytes, self._states.host_bytes

    def roles(self) -> int:
        units = self._states._units[LAYERS:]
        return sum(t.nbytes for unit in units for group in unit.groups for t in group.tensors())

    def tensors(self) -> dict[str, torch.Tensor]:
        self._states.settle()
        found = {}
        for key, own in self._states.of.items():
            values = {**own.state, "master": own.master}
            found |= {f"{key}/{name}": value for name, value in values.items() if torch.is_tensor(value)}
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        from integration_tests.zero import full as gathered

        return {name: gathered(param) for name, param in self.engine.module.named_parameters()}

    def on_host(self, layer: int) -> bool | None:
        groups = self._states._units[layer].groups
        return lie_in(self.moving.store[layer], [t for group in groups for t in group.tensors()])

    def end(self) -> None:
        self.engine.destroy()


def lie_in(memory: torch.Tensor, tensors: list[torch.Tensor]) -> bool | None:
    """Whether ``tensors`` are in ``memory``, all or none of them; None if there are none yet."""
    start = memory.data_ptr()
    inside = {start <= t.data_ptr() < start + memory.nbytes for t in tensors}
    assert len(inside) < 2, "a state is in two places"
    return inside.pop() if inside else None


class Account:
    """What the bytes of a training must be, from nothing but the layers that train and those that are drawn."""

    def __init__(self, training: TorchTraining | ZeroTraining, case: dict[str, Any]) -> None:
        self._training, self._last_first = training, not training.born_on_host
        offload, settings = case["offload"], case["settings"]
        gamma, self._lead = settings["active_layers"], settings["draw_ahead"]
        self._streams = offload["mode"] == "stream" and offload["slots"] < gamma
        self._prefetch = offload["prefetch_steps"] if offload["mode"] == "interval" else 0
        self._slots = offload["slots"] if self._streams else gamma
        self._sizes = [place.state.layout.host_bytes for place in training.moving._places]
        self._slot = max(place.state.layout.device_bytes for place in training.moving._places)
        self._born: set[int] = set()
        self._there: set[int] = set()
        self._in = self._out = self.switches = 0
        if training.grass.phase == "train":
            self._switch(set(training.grass.active_layers))

    def _sum(self, layers: set[int]) -> int:
        return sum(self._sizes[layer] for layer in layers)

    def _switch(self, active: set[int]) -> None:
        self.switches += 1
        if self._training.born_on_host:
            self._there -= active - self._born  # one that came before its birth comes again
            self._born |= active
        if not self._streams:
            self._out += self._sum((self._there - active) & self._born)
            self._there &= active
            self._arrive(active - self._there)

    def _arrive(self, layers: set[int]) -> None:
        self._in += self._sum(layers & self._born)
        self._there |= layers

    def after_step(self, active: tuple[int, ...], *, settled: bool) -> list[str]:
        """``active`` trained in the step; nothing did if it was of the probe. What is wrong now."""
        grass = self._training.grass
        self._born |= set(active)
        if self._streams:
            self._out += self._sum(set(active))
        if grass.schedule.switch_due(grass.step):
            self._switch(set(grass.active_layers))
        elif known := grass.state_dict()["next"]:
            new = set(known["active_layers"]) - set(grass.active_layers)
            if new and grass.schedule.steps_to_switch(grass.step) <= self._prefetch:
                self._arrive({max(new) if self._last_first else min(new)} - self._there)
        return [f"{what} after step {grass.step}" for what in self._wrong(settled)]

    def _wrong(self, settled: bool) -> list[str]:
        training = self._training
        traffic, (device, host), pool = training.grass.traffic, training.bytes_now(), training.moving.pool
        came, went, born = traffic.bytes_to_device, traffic.bytes_to_host, self._sum(self._born)
        landing = min(self._prefetch, self._lead) > 0
        waste = self._slots * max(self._sizes) * self.switches if self._streams and not self._lead else 0
        checks = {
            "device bytes": device - training.roles() <= (self._slots + landing) * self._slot,
            "slots": pool.allocations <= self._slots + (self.switches if landing else 0),
            # a state is made in a slot, or in host memory under ZeRO, and then it is either here or there
            "sum of both ways": went - came == (host - born if training.born_on_host else host),
            "bytes to the host": self._out <= went <= self._out + waste,
            "host bytes": born - self._slots * max(self._sizes) <= host <= born,
        }
        if not self._streams:
            checks["bytes to the device"] = came == self._in
            checks["host bytes"] = host == born - self._sum(self._there & self._born)
        if settled:
            where = {layer: training.on_host(layer) for layer in self._born}
            resting, unmade = ({layer for layer in where if where[layer] is kind} for kind in (True, None))
            checks["memory that states lie in"] = self._sum(resting) <= host <= self._sum(resting | unmade)
        return [f"{name} ({device=}, {host=}, {came=}, {went=})" for name, holds in checks.items() if not holds]


def train(rank: int, world_size: int, case: dict[str, Any], offload: dict[str, Any], watched: bool) -> dict[str, Any]:
    kind = ZeroTraining if case["backend"].startswith("zero") else TorchTraining
    training = kind(rank, world_size, case, offload)
    account = Account(training, case) if watched else None
    rng = random.Random(case["settings"]["seed"])
    told: dict[str, Any] = {"losses": [], "wrong": []}
    for number in range(case["steps"]):
        active = training.grass.active_layers if training.grass.phase == "train" else ()
        told["losses"].append(training.step(number))
        reads = rng.random() < case["reads"]
        if account is not None:
            if reads:
                training.grass.states.settle()
            told["wrong"] += account.after_step(active, settled=reads)
    told["tensors"] = {name: t.clone() for name, t in {**training.weights(), **training.tensors()}.items()}
    told["moved"] = training.grass.traffic.bytes_to_host + training.grass.traffic.bytes_to_device
    training.end()
    return told


def compared(rank: int, world_size: int, case: dict[str, Any]) -> tuple[list[str], int]:
    """What is wrong with a training, and the bytes that it moved."""
    moves = train(rank, world_size, case, case["offload"], watched=True)
    stays = train(rank, world_size, case, {"mode": "none"}, watched=False)
    wrong, ours, theirs = moves["wrong"], moves["tensors"], stays["tensors"]
    if moves["losses"] != stays["losses"]:
        wrong.append("losses differ")
    if odd := ours.keys() ^ theirs.keys() or {n for n, t in ours.items() if not torch.equal(t, theirs[n])}:
        wrong.append(f"{len(odd)} of {len(theirs)} tensors differ, {min(odd)} for one")
    return wrong, moves["moved"]


def soak(rank: int, world_size: int, backends: tuple[str, ...], seed: int, numbers: range, seconds: float) -> dict:
    """The trainings of ``numbers`` under ``backends``, until the time is over on rank 0."""
    from integration_tests import zero  # noqa: F401  # its imports belong to no training

    began = time.monotonic()
    told: dict[str, Any] = {"wrong": 0, "bytes": [], "threads": [], "moved": 0}
    for number in numbers:
        case, started = drawn(seed, number), time.monotonic()
        if case["backend"] not in backends:
            continue
        goes_on = torch.tensor(started - began < seconds)
        dist.broadcast(goes_on, 0)
        if not goes_on:
            break
        mine, moved = compared(rank, world_size, case)
        found: list[Any] = [None] * world_size
        dist.all_gather_object(found, mine)
        told["bytes"].append(resident_bytes())
        told["threads"].append(threads())
        told["wrong"] += any(found)
        told["moved"] += moved
        if rank == 0:
            said = "; ".join(f"rank {i}: {own[0]} and {len(own) - 1} more" for i, own in enumerate(found) if own)
            print(
                f"{number}: {described(case)}: {said or 'the same'}; {moved / 1e6:.1f} MB moved, "
                f"{time.monotonic() - started:.1f} s, {told['bytes'][-1] / 1e6:.0f} MB, {told['threads'][-1]} threads",
                flush=True,
            )
    return told


def described(case: dict[str, Any]) -> str:
    own, offload = case["settings"], {k: v for k, v in case["offload"].items() if v is not None}
    return (
        f"{case['backend']} {str(case['dtype']).removeprefix('torch.')}, γ {own['active_layers']}, T_s "
        f"{own['sampling_interval']}, T_u {own['update_interval']}, ahead {own['draw_ahead']}, {own['sampler']}, "
        f"{len(own['always_active'])} roles, {case['accumulation']} micro-batches, {case['steps']} steps, {offload}"
    )


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is freed and kept for later is no growth
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def threads() -> int:
    """Of Python and of libraries."""
    deadline = time.monotonic() + 5
    while any("grass_dist" in thread.name for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(os.listdir("/proc/self/task"))


def grown(rank: int, told: dict[str, Any]) -> list[str]:
    """Prints how memory and threads went; what has grown."""
    found = []
    for key, name, unit, noise in (("bytes", "MB", 1e6, GROWTH), ("threads", "threads", 1, 0)):
        values = told[key][WARM_UP:]
        third = len(values) // 3
        if third < WARM_UP:
            continue
        early, late = statistics.median(values[:third]), statistics.median(values[-third:])
        text = f"rank {rank}: {name} in the first third {early / unit:.0f}, in the last {late / unit:.0f}"
        print(text)
        if late > early + noise:
            found.append(text)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--trainings", type=int, default=10**9, help="at most")
    parser.add_argument("--first", type=int, default=0, help="number of the first training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    numbers = range(args.first, args.first + args.trainings)
    trainings, wrong, moved, growth = 0, 0, 0, []
    for backends, share in ((BACKENDS[:-1], 0.75), (BACKENDS[-1:], 0.25)):
        seconds = 60 * args.minutes * share
        ranks = run_ranks(2, soak, backends, args.seed, numbers, seconds, timeout=seconds + 300)
        trainings += len(ranks[0]["bytes"])
        wrong += ranks[0]["wrong"]
        moved += sum(told["moved"] for told in ranks)
        growth += [text for rank, told in enumerate(ranks) for text in grown(rank, told) if "zero3" not in backends]
    print(f"{trainings} trainings, {wrong} with something wrong, {moved / 1e9:.2f} GB of states moved")
    print("\n".join(f"grown: {text}" for text in growth) or "nothing that must not grow has grown")
    return 1 if wrong or growth else 0


if __name__ == "__main__":
    sys.exit(main())
