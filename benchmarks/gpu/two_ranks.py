"""One of two ranks on the same device. Rank 0 also trains alone, and compares."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu import training
from benchmarks.gpu.ranks import RANKS
from benchmarks.gpu.told import Told

STEPS = 12
SHAPES = {"even": (2816, 8192), "uneven": (2817, 8193)}
"""Width inside a layer, and tokens of the vocabulary: first dimensions that two ranks can divide, and cannot."""
CLOSE = 1e-5
"""Largest difference of a weight in fp32, of which each has moved by up to 12 times the learning rate of 1e-4."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    told = Told(args.folder / f"rank{args.rank}.json", tiny=args.tiny, seconds=3600)
    if not args.tiny:
        torch.cuda.set_device(0)
    alone = {name: trained(told, "alone", *shape) for name, shape in SHAPES.items()} if args.rank == 0 else {}
    wait = datetime.timedelta(seconds=120)
    store = dist.FileStore(str(args.folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=args.rank, world_size=RANKS, timeout=wait)
    for wrapper in ("DDP", "FSDP2"):
        for name, shape in SHAPES.items():
            draws, ours = trained(told, wrapper, *shape)
            if args.rank == 0:
                apart = training.apart(ours, alone[name][1])
                same = draws == alone[name][0]
                row = {"name": f"{wrapper}, {name}", "holds": same and apart < CLOSE, "apart": apart, "draws": same}
                with (args.folder / "found.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def trained(told: Told, wrapper: str, inner: int, vocabulary: int) -> tuple[list[Any], list[torch.Tensor]]:
    """Draws and weights of 12 steps, in fp32, in which each rank has its part of the same global batches."""
    model = training.llama(told, layers=4, width=512, inner=inner, vocabulary=vocabulary, dtype=torch.float32)
    rank, ranks = (0, 1) if wrapper == "alone" else (dist.get_rank(), RANKS)
    whole = wrapped(told, model, wrapper)
    optimizer = training.grass(whole, training.MODES["interval"], sampler="grass", probe_steps=2)
    draws = []
    for step in range(STEPS):
        draws.append(optimizer.grass.active_layers)
        ids = training.batch(told, model, step, rows=4, length=64)
        training.loss(whole, ids[rank::ranks]).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    training.synchronize(told)
    found = training.weights(model)
    optimizer.detach()
    gc.collect()
    return draws, found


def wrapped(told: Told, model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "DDP":
        return DistributedDataParallel(model)
    if wrapper == "FSDP2":
        training.shard(told, model)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # gloo cannot average, so the sum is divided
                module.set_force_sum_reduction_for_comms(True)
    return model


if __name__ == "__main__":
    main()
