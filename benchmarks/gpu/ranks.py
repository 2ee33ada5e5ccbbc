"""Two ranks that share one GPU, over gloo, train as one process does: under DDP and FSDP2, also with uneven shards."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.told import Told

RANKS = 2


def show(told: Told) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.jsonl"
        found.touch()
        command = [sys.executable, "-m", "benchmarks.gpu.two_ranks", "--folder", folder, *["--tiny"][: int(told.tiny)]]
        started = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(RANKS)]
        codes = [process.wait() for process in started]  # a rank that hangs is ended with the part
        for line in found.read_text().splitlines():
            row = json.loads(line)
            told.check(row.pop("name"), row.pop("holds"), **row)
    told.check("both ranks end well", not any(codes), exits=codes)
