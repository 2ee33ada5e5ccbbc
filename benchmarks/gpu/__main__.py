"""Shows on one GPU what nothing but a GPU can show, in eight minutes at most.

    make gpu                                              # python -m benchmarks.gpu --json benchmarks/results/gpu.json
    python -m benchmarks.gpu --parts slot,errors          # some of the parts
    python -m benchmarks.gpu --tiny                       # a trial of the parts themselves: on the CPU, in two minutes

Each part runs in a process of its own with a time limit of its own. The file has its result as soon as it has ended. If
a part dies, the file has its exit status and its last lines. A part whose libraries are not installed is "not here".
The exit status is 1 if something does not hold, or if a part has died or taken too long.

With --tiny everything runs on the CPU, with small models, and with tests/fake_cuda.py and tests/late_cuda.py where CUDA
is needed. That tries the parts, and says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS, TINY, Part
from benchmarks.gpu.table import show
from benchmarks.gpu.told import write_json

ROOT = Path(__file__).parents[2]
LAST_LINES = 15
GOOD = ("holds", "measured", "not here")
"""States of a part that do not make the exit status 1."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"), help="file of the results")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with stand-ins for CUDA")
    args = parser.parse_args(argv)
    wanted = [name.strip() for name in args.parts.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--parts {','.join(unknown)}: use some of {','.join(PARTS)}")
    if not args.tiny and not _has_gpu():
        parser.error("no CUDA device is visible here; --tiny tries the parts on the CPU")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    record = begin(args.json, tiny=args.tiny)
    for name in [name for name in PARTS if name in wanted]:
        print(f"{name}: {PARTS[name].title} ...", flush=True)
        found = run_part(name, PARTS[name], tiny=args.tiny)
        record = with_part(record, name, found)
        write_json(args.json, record)
    show(record, wanted)
    print(f"The results are in {args.json}.")
    return int(any(record["parts"][name]["state"] not in GOOD for name in wanted))


def begin(file: Path, *, tiny: bool) -> dict[str, Any]:
    """The record that is in the file, for a run of some parts to add to, or a new one."""
    fresh: dict[str, Any] = {"tiny": tiny, "machine": None, "parts": {}}
    if not file.exists():
        return fresh
    known = json.loads(file.read_text())
    if known.get("tiny") == tiny:
        return known
    print(f"{file} is of a run {'with' if known.get('tiny') else 'without'} --tiny; it is written anew.")
    return fresh


def with_part(record: dict[str, Any], name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The record with the result of a part. What other hardware or other versions have shown is taken out."""
    machine = found.pop("machine", None) or record["machine"]
    old = record["parts"] if record["machine"] is None or _same(machine, record["machine"]) else {}
    if old != record["parts"]:
        print("The older results are of other hardware or versions; they are taken out.")
    parts = {**old, name: found}
    return {**record, "machine": machine, "parts": {own: parts[own] for own in PARTS if own in parts}}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("gpus", "cpu", "python", "versions"))


def run_part(name: str, part: Part, *, tiny: bool) -> dict[str, Any]:
    """Runs a part in a process group of its own, which is ended when its time is over.

    Returns:
        ``state``: "holds", "measured" (nothing to hold), "fails", "died", "late" (its time was over) or "not here"; and
        what the part has told, with ``exit`` and ``last lines`` unless it ended well.
    """
    if missing := part.missing(tiny=tiny):
        return {"state": "not here", "missing": missing}
    limit, began = 2 * TINY if tiny else part.seconds, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        told, log = Path(folder) / "told.json", Path(folder) / "log.txt"
        with log.open("w") as output:
            process = subprocess.Popen(
                command(name, told, limit, tiny=tiny),
                cwd=ROOT,
                env=environment(tiny=tiny),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        found: dict[str, Any] = json.loads(told.read_text()) if told.exists() else {}
        lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
    state = _state(code, found.get("checks", {}))
    ended = {"exit": code, "last lines": lines} if state in ("died", "late") else {}
    return {"state": state, "seconds": round(time.monotonic() - began, 1), **ended, **found}


def command(name: str, told: Path, limit: float, *, tiny: bool) -> list[str]:
    """Starts a part, which writes what it finds to ``told``."""
    one = [sys.executable, "-m", "benchmarks.gpu.one", name, "--told", str(told), "--seconds", str(limit)]
    return [*one, "--tiny"] if tiny else one


def _state(code: int | None, checks: dict[str, dict[str, Any]]) -> str:
    if code is None:
        return "late"
    if code != 0:
        return "died"
    if not checks:
        return "measured"
    return "holds" if all(check["holds"] for check in checks.values()) else "fails"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of the part's own process group: also ranks that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment(*, tiny: bool) -> dict[str, str]:
    """Of a part: one rank by itself, results to the bit, nothing from the network."""
    ours = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    ours |= {"GLOO_SOCKET_IFNAME": "lo", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HF_HUB_OFFLINE": "1"}
    ours |= {"DS_ACCELERATOR": "cpu" if tiny else "cuda", "TOKENIZERS_PARALLELISM": "false"}
    ours["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if tiny:
        ours |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return ours


def _has_gpu() -> bool:
    import torch

    return torch.cuda.device_count() > 0  # which does not take a device for this process


if __name__ == "__main__":
    raise SystemExit(main())
