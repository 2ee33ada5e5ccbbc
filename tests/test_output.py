"""What a rank says reaches the terminal or its file; errors reach the terminal once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ONE_RANK = """
import os, sys
from pathlib import Path
import torch
from grass_dist.errors import GrassError
from grass_dist.job.output import Output
from grass_dist.job.peers import Peers, Roll
from grass_dist.job.world import World

rank = int(sys.argv[1])
world = World(rank, rank, 4, torch.device("cpu"), None, peers=Peers(rank, ["a", "a", "a", "b"]))
output = Output(world)
print("before")
output.to_file(Path(sys.argv[2]))
print("said")
os.write(2, b"by a library\\n")
output.own_error(ValueError("of its own"))
output.own_error(GrassError("wrong."))
output.shared_error(GrassError("of all."))
if len(sys.argv) > 3:  # the rank whose error came first
    world.peers._roll = Roll(int(sys.argv[3]), {})
output.lost(GrassError("somebody is lost."))
"""


def run(rank: int, folder: Path, *more: str) -> tuple[str, list[str], list[str]]:
    """What it wrote to stdout, stderr and its file."""
    argv = [sys.executable, "-c", ONE_RANK, str(rank), str(folder), *more]
    ended = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=100)
    file = folder / "logs" / f"rank_{rank}.log"
    return ended.stdout, ended.stderr.splitlines(), file.read_text().splitlines() if file.exists() else []


def test_the_main_rank_speaks_on_the_terminal(tmp_path):
    out, err, log = run(0, tmp_path)
    assert out == "before\nsaid\n" and log == []
    assert err == [
        "by a library",
        "error: rank 0 (on host a): ValueError: of its own",
        "error: rank 0 (on host a): wrong.",
        "error: of all.",
        "error: somebody is lost.",
    ]


@pytest.mark.parametrize(("rank", "tells"), [(2, False), (3, True)], ids=["third of its host", "first of its host"])
def test_another_rank_has_a_file_and_errors_on_the_terminal(tmp_path, rank, tells):
    out, err, log = run(rank, tmp_path)
    me = f"rank {rank} (on host {'b' if rank == 3 else 'a'})"
    own = [
        f"error: {me}: ValueError: of its own (its log: {tmp_path}/logs/rank_{rank}.log)",
        f"error: {me}: wrong.",
    ]
    lost = "error: somebody is lost."
    assert out == "before\n"
    assert err == [*own, *([lost] if tells else [])]
    assert log[0].startswith(f"--- {me} of 4, process ")
    assert log[1:] == ["said", "by a library", *own, lost]
    run(rank, tmp_path)  # a run that goes on adds to it
    assert (tmp_path / "logs" / f"rank_{rank}.log").read_text().count("--- ") == 2


@pytest.mark.parametrize(("first", "tell"), [(0, {0}), (1, {1}), (3, {0, 3})], ids=["rank 0", "its host", "another"])
def test_a_lost_rank_is_reported_per_terminal_and_in_each_file(tmp_path, first, tell):
    lost = "error: somebody is lost."
    for rank in (0, 1, 3):
        _, err, log = run(rank, tmp_path, str(first))
        assert (lost in err) == (rank in tell)
        assert (lost in log) == (rank != 0)
