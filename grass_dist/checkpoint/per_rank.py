"""What each rank has for itself: random numbers and its part of the measurements since the last refresh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from grass_dist.backends.base import Ranks
from grass_dist.checkpoint.pieces import MARK, Piece, Read

MEASURED, RNG, CUDA_RNG = f"{MARK}measured", f"{MARK}rng", f"{MARK}cuda_rng"
"""Tensors of one row for each rank that saved."""


def per_rank_pieces(engine: Mapping[str, Any], ranks: Ranks) -> list[Piece]:
    """This rank's rows: sums of squares (fp64), and the states of torch's generators (uint8)."""
    rows = [x for row in engine["measured"]["rows"] for x in row]
    found = {MEASURED: torch.tensor(rows, dtype=torch.float64), RNG: torch.get_rng_state()}
    if torch.cuda.is_available():
        found[CUDA_RNG] = torch.cuda.get_rng_state()
    return [
        Piece(key, row.numel() * ranks.world_size, row.numel() * ranks.rank, row)
        for key, row in found.items()
        if row.numel()
    ]


def measured_of(layers: Sequence[Sequence[int]], saved_by: int, ranks: Ranks, read: Read) -> dict[str, Any]:
    """The engine's "measured" for this rank.

    With as many ranks as saved it, each has its own rows back. Else the first has their sum, and the others zeros:
    what the refresh adds up is the same but for rounding in fp64.
    """
    numel = sum(len(active) for active in layers)
    if not numel:
        return {"rows": [], "layers": []}
    if saved_by == ranks.world_size:
        rows = read(MEASURED, ranks.rank * numel, torch.empty(numel, dtype=torch.float64))
    else:
        rows = read(MEASURED, 0, torch.empty(saved_by * numel, dtype=torch.float64)).view(saved_by, numel).sum(0)
        rows = rows if ranks.rank == 0 else torch.zeros_like(rows)
    parts = torch.split(rows, [len(active) for active in layers])
    return {"rows": [part.tolist() for part in parts], "layers": [list(active) for active in layers]}


def restore_rng(tensors: Mapping[str, tuple[int, torch.dtype]], saved_by: int, ranks: Ranks, read: Read) -> bool:
    """Gives torch's generators their states back; False, and nothing, with another number of ranks."""
    if saved_by != ranks.world_size:
        return False
    for key, put in ((RNG, torch.set_rng_state), (CUDA_RNG, torch.cuda.set_rng_state)):
        if key in tensors and (key == RNG or torch.cuda.is_available()):
            size = tensors[key][0] // saved_by
            put(read(key, ranks.rank * size, torch.empty(size, dtype=torch.uint8)))
    return True
