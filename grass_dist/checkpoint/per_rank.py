"""The part of a run that differs between ranks: generators, and measurements since the last refresh."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from grass_dist.checkpoint.files import printable
from grass_dist.checkpoint.pieces import MARK, Piece, Read
from grass_dist.errors import CheckpointError
from grass_dist.ranks import Ranks

MEASURED, RNG, CUDA_RNG = f"{MARK}measured", f"{MARK}rng", f"{MARK}cuda_rng"
"""Keys of tensors that have one row for each rank that saved."""


def per_rank_pieces(engine: Mapping[str, Any], ranks: Ranks) -> list[Piece]:
    """This rank's rows: sums of squares (fp64), and the states of torch's generators (uint8)."""
    rows = [x for row in engine["measured"]["rows"] for x in row]
    found = {MEASURED: torch.tensor(rows, dtype=torch.float64), RNG: torch.get_rng_state()}
    if torch.cuda.is_available():
        found[CUDA_RNG] = torch.cuda.get_rng_state(_cuda(ranks))
    return [
        Piece(key, row.numel() * ranks.world_size, row.numel() * ranks.rank, row)
        for key, row in found.items()
        if row.numel()
    ]


def measured_of(layers: Sequence[Sequence[int]], saved_by: int, ranks: Ranks, read: Read) -> dict[str, Any]:
    """The engine's "measured" for this rank.

    With as many ranks as saved the checkpoint, each rank gets its own rows back. With another number, the first rank
    gets their sum and the others get zeros: the refresh adds up to the same, except for rounding in fp64.
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


SetGenerator = Callable[[torch.Tensor], object]


def read_rng(
    tensors: Mapping[str, tuple[int, torch.dtype]], saved_by: int, ranks: Ranks, read: Read
) -> list[tuple[SetGenerator, torch.Tensor]] | None:
    """The states of torch's generators, each with the function that sets it; None with another number of ranks.

    Raises:
        CheckpointError: one is damaged.
    """
    if saved_by != ranks.world_size:
        return None
    found: list[tuple[SetGenerator, torch.Tensor]] = []
    put_on_gpu = partial(torch.cuda.set_rng_state, device=_cuda(ranks))
    for key, put, device in ((RNG, torch.set_rng_state, "cpu"), (CUDA_RNG, put_on_gpu, _cuda(ranks))):
        if device == "cpu" or (key in tensors and torch.cuda.is_available()):
            trial = torch.Generator(device)
            size = trial.get_state().numel()
            if tensors.get(key, (0, None))[0] != saved_by * size:
                raise CheckpointError(f"The checkpoint does not hold the random numbers {key} of {saved_by} ranks.")
            state = read(key, ranks.rank * size, torch.empty(size, dtype=torch.uint8))
            try:
                trial.set_state(state)
            except RuntimeError as error:
                damaged = f"The random numbers {key} of the checkpoint are damaged: {printable(error)}."
                raise CheckpointError(damaged) from None
            found.append((put, state))
    return found


def _cuda(ranks: Ranks) -> torch.device:
    """The GPU of this rank's model, or else the current one."""
    return ranks.device if ranks.device is not None and ranks.device.type == "cuda" else torch.device("cuda")
