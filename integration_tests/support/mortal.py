"""launch/finetune.py with a death built in: at the n-th passage of a named moment a rank sends itself SIGKILL.

    MORTAL_MOMENT=draw MORTAL_COUNT=3 MORTAL_RANK=1 MORTAL_MARKER=/tmp/died \\
        torchrun --nproc-per-node 2 --max-restarts 3 -m integration_tests.support.mortal --config … --resume auto

It dies once: never where the marker lies, a file that it leaves, nor after torchrun has restarted the ranks. Moments
are passages through functions of the package, which are wrapped from outside before the program takes them by their
names. MORTAL_SIGNAL is another signal than SIGKILL, which it may live through. With MORTAL_COUNTS, a folder, each rank
that lives to the end writes how often it has passed each moment.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from grass_dist.backends.base import HookedBackend
from grass_dist.backends.ddp import DdpSharding
from grass_dist.checkpoint import disk, files, saving
from grass_dist.checkpoint.dcp import TensorReader
from grass_dist.checkpoint.pieces import Piece
from grass_dist.finetune import run_torch
from grass_dist.finetune.loop import Loop
from grass_dist.finetune.run_folder import MODEL, RunFolder
from grass_dist.finetune.tasks.causal_lm import CausalLm
from grass_dist.job import world
from grass_dist.method import controller as engine
from grass_dist.ranks import Ranks
from grass_dist.record import writers
from grass_dist.states.moving import IntervalStates
from grass_dist.states.transfer import TransferEngine
from grass_dist.states.unit_optimizer import UnitOptimizer
from integration_tests.support.program import ROOT
from integration_tests.support.ranks import SERVER, free_port

RANKS = 2
MODEL_IS_WRITTEN = "the end: the model is written and has no name yet"
START, NOTICES, ELASTIC = 240, 40, 400
"""Seconds that are given to a start, to the other rank after a death, and to torchrun with its restarts."""


class Fate:
    """Counts the passages of this rank, and ends it at one of them if it is told so."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.passages: Counter[str] = Counter()
        self._marker = Path(environment.get("MORTAL_MARKER", "/nowhere"))
        mine = environment.get("MORTAL_RANK") == environment["RANK"]
        first = int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0 and not self._marker.exists()
        self._moment = environment["MORTAL_MOMENT"] if mine and first else None
        self._count = int(environment.get("MORTAL_COUNT", 0))
        self._signal = int(environment.get("MORTAL_SIGNAL", signal.SIGKILL))

    def now(self, moment: str) -> bool:
        """Counts a passage; whether it is the one to die at."""
        self.passages[moment] += 1
        return moment == self._moment and self.passages[moment] == self._count

    def passes(self, moment: str) -> None:
        if self.now(moment):
            self.die()

    def die(self) -> None:
        self._marker.write_text(f"{self._moment}\n")
        os.kill(os.getpid(), self._signal)

    def die_in(self, stream: Any, content: bytes) -> None:
        """Writes no more than the first half."""
        stream.write(bytes(content)[: len(content) // 2])
        stream.flush()
        self.die()

    def before(self, moment: str, owner: Any, name: str, when: Any = None, *, after: bool = False) -> None:
        """Makes each call of ``owner.name`` a passage, or those of which ``when`` says so."""
        whole = getattr(owner, name)

        @functools.wraps(whole)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            passes = when is None or when(*args, **kwargs)
            if passes and not after:
                self.passes(moment)
            result = whole(*args, **kwargs)
            if passes and after:
                self.passes(moment)
            return result

        setattr(owner, name, wrapped)

    after = functools.partialmethod(before, after=True)


def install(fate: Fate) -> None:
    """Wraps what the moments are passages of."""
    _in_steps(fate)
    _in_saves(fate)
    _in_commits(fate)
    _around_the_steps(fate)
    _at_the_end(fate)
    fate.before("resume: while it is verified", files, "verify")
    fate.after("resume: half loaded", TensorReader, "read_all")


def _in_steps(fate: Fate) -> None:
    fate.before("probe", HookedBackend, "_on_hook", lambda backend, *_: backend._probing)
    fate.before("backward", HookedBackend, "_on_hook", lambda backend, *_: not backend._probing)
    fate.after("update", UnitOptimizer, "step")
    fate.before("publish", DdpSharding, "publish")
    fate.before("draw", engine, "draw_layers")
    fate.before("agree: before the gather", Ranks, "gather_bytes")
    fate.after("agree: after the gather", Ranks, "gather_bytes")
    fate.before("switch", engine.GrassController, "_set_trainable", lambda grass: grass.step > 0)
    fate.after("eviction", TransferEngine, "to_host")
    fate.after("arrival", TransferEngine, "to_device")
    fate.after("prefetch", IntervalStates, "expect", lambda states, _, steps: steps <= states._prefetch_steps)


def _in_saves(fate: Fate) -> None:
    fate.after("save: snapshot", Piece, "to_write")
    fate.after("save: the folder is made", saving, "_begin")
    fate.before("save: digest", files, "digest")
    create_stream = FileSystem.create_stream

    @contextlib.contextmanager
    def mortal_stream(self: FileSystem, path: Any, mode: str) -> Iterator[Any]:
        with create_stream(self, path, mode) as stream:
            if "w" in mode and fate.now("save: a tensor file half written"):
                half = functools.partial(fate.die_in, stream)
                yield SimpleNamespace(write=half, tell=stream.tell, flush=stream.flush)
            else:
                yield stream

    FileSystem.create_stream = mortal_stream


def _in_commits(fate: Fate) -> None:
    fate.before("save: before the manifest", files, "commit")
    write_json = files.write_json

    def half(file: Path, value: Any) -> None:
        if file.name == files.MANIFEST and fate.now("save: the manifest half written"):
            with file.open("wb") as stream:
                fate.die_in(stream, json.dumps(value).encode())
        write_json(file, value)

    files.write_json = half
    fate.after("save: between manifest and rename", files, "write_json", lambda file, _: file.name == files.MANIFEST)
    fate.after("save: after the rename, before pruning", files, "commit")

    def remove(path: Path, **options: Any) -> None:
        if path.name.endswith(".removing") and fate.now("save: in pruning"):
            next(file for file in path.rglob("*") if file.is_file()).unlink()
            fate.die()
        shutil.rmtree(path, **options)

    disk.shutil = SimpleNamespace(rmtree=remove)


def _around_the_steps(fate: Fate) -> None:
    fate.after("the start: the model is loaded", run_torch, "load_model")
    fate.after("the start: the folder is made", RunFolder, "begin")
    fate.before("the start: before the first step", Loop, "train")
    fate.before("between steps", Loop, "_evaluate")
    fate.after("evaluation", CausalLm, "measure")
    write = writers.JsonLines.write

    def half_a_line(self: Any, event: str, step: int, values: Mapping[str, Any]) -> None:
        if event == "step" and fate.now("metrics line half written"):
            fate.die_in(self._file, json.dumps({"event": event, "step": step, **values}).encode())
        write(self, event, step, values)

    writers.JsonLines.write = half_a_line


def _at_the_end(fate: Fate) -> None:
    fate.before("the end: before the weights are gathered", run_torch, "gather_torch")
    sync_tree = disk.sync_tree

    def half_a_model(folder: Path) -> None:
        if folder.name == f".{MODEL}.writing" and fate.now("the end: the model half written"):
            os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)
            fate.die()
        sync_tree(folder)

    disk.sync_tree = half_a_model
    fate.before(MODEL_IS_WRITTEN, disk, "put_in_place")
    report = SimpleNamespace(build_report=lambda folder: folder / "report.html")
    sys.modules["grass_dist.report"] = report  # type: ignore[assignment]  # its plots take longer than the steps
    fate.before("the end: the report", report, "build_report")


def run() -> int:
    """The program, on this rank; its exit code."""
    fate = Fate(os.environ)
    install(fate)
    world.ANSWERS_WITHIN = 2.0  # who lives here answers at once
    try:
        runpy.run_path(str(ROOT / "launch" / "finetune.py"), run_name="__main__")
    except SystemExit as left:
        if folder := os.environ.get("MORTAL_COUNTS"):
            (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(fate.passages))
        return left.code if isinstance(left.code, int) else 1
    raise AssertionError("the program ends by sys.exit")


@dataclass(frozen=True)
class Ended:
    """How one rank ended; ``code`` is None if it had to be killed."""

    code: int | None
    out: str
    err: str


def start(arguments: list[str], environment: Mapping[str, str], out: Path) -> list[Ended]:
    """The program on all ranks, by the fork server; none of them is there afterwards."""
    out.mkdir(parents=True)
    given = (free_port(), arguments, dict(environment), out)
    processes = [SERVER.Process(target=_rank, args=(rank, *given), daemon=True) for rank in range(RANKS)]
    for process in processes:
        process.start()
    alive, deadline = dict(enumerate(processes)), time.monotonic() + START
    try:
        while alive and time.monotonic() < deadline:
            wait([process.sentinel for process in alive.values()], deadline - time.monotonic())
            alive = {rank: process for rank, process in alive.items() if process.exitcode is None}
            if any(process.exitcode for process in processes):
                deadline = min(deadline, time.monotonic() + NOTICES)
    finally:
        for process in processes:
            if process.exitcode is None:
                kill(process.pid)
            process.join(10)
    read = [[(out / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(RANKS)]
    return [Ended(None if rank in alive else processes[rank].exitcode, *read[rank]) for rank in range(RANKS)]


def _rank(rank: int, port: int, arguments: list[str], environment: dict[str, str], out: Path) -> None:
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(out / f"{rank}.{name}", os.O_CREAT | os.O_WRONLY), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), **environment)
    sys.argv[1:] = arguments
    code = run()
    sys.stdout.flush()
    os._exit(code)  # as program.py: without the fork server's teardown


def start_elastic(arguments: list[str], environment: Mapping[str, str], out: Path) -> tuple[int | None, int]:
    """The program under torchrun, which starts its ranks again by itself: its exit code, None if it had to be killed,
    and the number of processes that it has left behind."""
    token, code = f"{os.getpid()}-{time.monotonic_ns()}", None
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--max-restarts", "3"]
    command += ["--master-port", str(free_port()), "-m", "integration_tests.support.mortal", *arguments]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "MORTAL_TOKEN": token}
    own = {**os.environ, **own, **environment}
    with (out / "torchrun.log").open("w") as log:
        launcher = subprocess.Popen(command, cwd=ROOT, env=own, stdout=log, stderr=log, start_new_session=True)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = launcher.wait(ELASTIC)
        finally:
            if launcher.poll() is None:
                kill(launcher.pid)
                launcher.wait(10)
            left = [kill(pid) for pid in _of_token(token)]  # its ranks are in groups of their own
    return code, len(left)


def _of_token(token: str) -> Iterator[int]:
    """Processes that run, of those that were started with ``token`` in their environment."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"MORTAL_TOKEN={token}".encode() in (entry / "environ").read_bytes():
                yield int(entry.name)


def kill(pid: int) -> None:
    """One that was started here, and its group."""
    for how in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            how(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(run())
