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

from integration_tests.support.model import LAYERS
from integration_tests.support.ranks import run_ranks
from integration_tests.support.soak_trainings import Account, TorchTraining, ZeroTraining

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
    from integration_tests.support import zero  # noqa: F401  # its imports belong to no training

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
    for text in growth:
        print(f"grown: {text}")
    return 1 if wrong or growth else 0


if __name__ == "__main__":
    sys.exit(main())
