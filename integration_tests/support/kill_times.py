"""Fine-tunes under torchrun's agent that are killed at random times: each goes on to the bit as one left in peace.

    python -m integration_tests.kills --kills 200 [--seed 0]       # or: make soak

A run is started, and after a time drawn uniformly over that of a whole run something of it is killed by SIGKILL: the
agent, one rank, or all ranks. Then it goes on, by the agent's own restart or, without an agent, by another start, and
that is the next victim, until it ends before its time has come. Then it must have the weights, checkpoints and record
of an undisturbed run of its setting, and left nothing behind. Settings take turns: dcp's format and DeepSpeed's.

Agent and ranks are forked from this process, which has imported all that they need: so a run of 40 steps takes seconds,
most of which are steps and saves.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from integration_tests.support.killed_runs import STREAM, Runs, Setting, bits, differences
from integration_tests.support.mortal import NOTICES, RANKS, START, kill, run
from integration_tests.support.program import AUTO
from integration_tests.support.ranks import free_port

STEPS = 40
KINDS = ("agent", "rank", "all ranks")
TIMEOUT = 12
"""Seconds, `train.timeout_seconds`: ranks in a collective wait as long for an agent that is dead."""
MOST = 12
"""Kills of one run."""
FORK = get_context("fork")
PR_SET_PDEATHSIG = 1


def zero(stage: int, dtype: str, every: int, mode: str, accumulation: int, *more: str) -> Setting:
    own = (f"parallel.config=zero{stage}.json", *more)
    return Setting("deepspeed", dtype, every, True, mode, accumulation, own)


SETTINGS = (
    Setting("fsdp2", "float32", 4, True, "interval", 2),
    zero(2, "bfloat16", 4, "interval", 1),
    Setting("ddp", "bfloat16", 3, True, "stream", 1, STREAM),
    zero(3, "float32", 5, "interval", 2),
    Setting("fsdp2", "bfloat16", 5, False, "stream", 1, STREAM),
    zero(1, "float32", 3, "stream", 1, *STREAM),
    zero(2, "float32", 4, "interval", 2, "train.checkpoint.format=dcp"),
)


@dataclass
class Told:
    """What has become of the kills."""

    kills: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    """Kills of runs that ended as the undisturbed one did."""
    wrong: int = 0
    """Runs that did not."""

    def __str__(self) -> str:
        kinds = ", ".join(f"{self.kills[kind]} of {'the ' if kind == 'agent' else ''}{kind}" for kind in KINDS)
        return f"{self.kills.total()} kills ({kinds}), {self.resumed} resumed to the bit"


class Agent:
    """torchrun's agent with its ranks, in processes of their own."""

    def __init__(self, arguments: list[str], out: Path) -> None:
        out.mkdir(parents=True)
        self.out = out
        self._process = FORK.Process(target=_agent, args=(arguments, out))
        self._process.start()
        self.began = time.monotonic()
        self._seen: set[int] = set()

    @property
    def code(self) -> int | None:
        return self._process.exitcode

    def ends(self, seconds: float) -> bool:
        """Waits for its end."""
        self._process.join(seconds)
        return self.code is not None

    def ranks(self) -> list[int]:
        """Process ids of its ranks of now."""
        pid = self._process.pid
        with contextlib.suppress(OSError):
            found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            self._seen.update(found)
            return [child for child in found if _runs(child)]
        return []

    def strike(self, kind: str, rng: random.Random) -> bool:
        """Kills one of `KINDS`; False if there was nothing of it, as between two starts of the ranks."""
        ranks = self.ranks()
        if self.code is not None or not ranks:
            return False
        struck = {"agent": [self._process.pid], "rank": [rng.choice(ranks)], "all ranks": ranks}[kind]
        for pid in struck:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return True

    def left(self) -> list[int]:
        """Once the agent has ended: ranks that do not end by themselves. None of them is there afterwards."""
        self._process.join(NOTICES)
        deadline = time.monotonic() + NOTICES
        while (alive := [pid for pid in self._seen if _runs(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)  # it writes where it stands
        if alive:
            time.sleep(1)
        for pid in alive:
            kill(pid)
        return alive

    def end(self) -> None:
        """Nothing of it is there afterwards."""
        self.ranks()
        for pid in (self._process.pid, *self._seen):
            if pid is not None and _runs(pid):
                kill(pid)
        self._process.join(10)


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _agent(arguments: list[str], out: Path) -> None:
    os.setsid()
    _speak(out / "agent.log")
    own = os.getpid()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=RANKS,
        run_id="none",
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        rdzv_configs={"rank": 0, "timeout": START},
        max_restarts=1000,
        start_method="fork",
    )
    elastic_launch(config, _rank)(arguments, out, own)


def _rank(arguments: list[str], out: Path, agent: int) -> None:
    _with_the_agent_dies(0)  # torch has functions die, and not programs
    os.setsid()
    _speak(out / f"{os.environ['RANK']}.log")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # they are the agent's
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.register(signal.SIGUSR2)
    torch.set_num_threads(1)
    sys.argv[1:] = arguments
    code = run()
    sys.stdout.flush()
    _with_the_agent_dies(signal.SIGKILL)  # a function waits for the agent in the end, and a program does not
    if code != 0 or os.getppid() != agent:
        os._exit(code)


def _with_the_agent_dies(number: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _speak(file: Path) -> None:
    to = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(to, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)


class TimedRuns(Runs):
    """Its undisturbed runs are made by an agent, too, and timed."""

    def __init__(self, folder: Path, steps: int = STEPS) -> None:
        super().__init__(folder, steps)
        self._seconds: dict[Setting, float] = {}
        for stage in (1, 2, 3):
            own = {**AUTO, "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
            (folder / f"zero{stage}.json").write_text(json.dumps(own))

    def arguments(self, setting: Setting, name: str) -> list[str]:
        whole = super().arguments(setting, name)
        return [f"train.timeout_seconds={TIMEOUT}" if "timeout_seconds" in given else given for given in whole]

    def undisturbed(self, setting: Setting) -> Path:
        if setting not in self._undisturbed:
            name = f"undisturbed-{len(self._undisturbed)}"
            with self.agent(setting, name, 0) as agent:
                assert agent.ends(START) and agent.code == 0, f"{setting} did not end well: see {agent.out}"
            self._seconds[setting] = time.monotonic() - agent.began
            self._undisturbed[setting] = self.run_folder(name)
        return self._undisturbed[setting]

    def seconds(self, setting: Setting) -> float:
        """How long an undisturbed run takes from its start to its end."""
        self.undisturbed(setting)
        return self._seconds[setting]

    @contextlib.contextmanager
    def agent(self, setting: Setting, name: str, number: int) -> Iterator[Agent]:
        agent = Agent(self.arguments(setting, name), self.folder / f"{name}.out" / str(number))
        try:
            yield agent
        finally:
            agent.end()


def course(runs: TimedRuns, setting: Setting, name: str, rng: random.Random, most: int) -> tuple[list[str], list[str]]:
    """A run that is killed until it ends before its time has come, ``most`` times at most: (kinds, what is wrong)."""
    wanted, whole = runs.undisturbed(setting), runs.seconds(setting)
    kinds: list[str] = []
    found: list[str] = []
    for number in range(most + 1):
        with runs.agent(setting, name, number) as agent:
            while True:
                kind, after = rng.choice(KINDS), rng.random() * whole
                if len(kinds) < most:
                    agent.ends(after)
                else:
                    agent.ends(START + whole)
                while agent.code is None and len(kinds) < most and not agent.strike(kind, rng):
                    agent.ends(0.02)
                if agent.code is not None or len(kinds) == most:
                    break
                kinds.append(kind)
                if kind == "agent":
                    break
            if left := agent.left() if kinds[-1:] == ["agent"] or agent.code is not None else ["the agent"]:
                found.append(f"{left} had to be killed, see {agent.out}")
        if agent.code == 0:
            break
        if agent.code != -signal.SIGKILL:
            found.append(f"the agent ended with {agent.code}, see {agent.out}")
            break
    return kinds, found + differences(runs.run_folder(name), wanted) + odd_files(runs.run_folder(name), wanted)


def odd_files(ours: Path, theirs: Path) -> list[str]:
    """In what the tensors of DeepSpeed's own files differ."""
    found = []
    for file in sorted((theirs / "checkpoints").glob("step-*/**/*.pt")):
        own = ours / file.relative_to(theirs)
        if not own.exists():
            found.append(f"there is no {own}")
        elif odd := _odd(*(tensors_in(torch.load(at, weights_only=False)) for at in (own, file))):
            found.append(f"{own} differs: {odd}")
    return found


def tensors_in(value: Any, at: str = "") -> dict[str, torch.Tensor]:
    if torch.is_tensor(value):
        return {at: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: tensor for key, own in pairs for name, tensor in tensors_in(own, f"{at}/{key}").items()}


def _odd(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str:
    odd = ours.keys() ^ theirs.keys() or [name for name in theirs if bits(ours[name]) != bits(theirs[name])]
    return f"{len(odd)} tensors, {min(odd)} for one" if odd else ""


def soak(folder: Path, kills: int, seed: int, first: int = 0) -> Told:
    """Courses until there were ``kills``; says what became of each."""
    runs, told, began, number = TimedRuns(folder), Told(), time.monotonic(), first
    while told.kills.total() < kills:
        setting, started = SETTINGS[number % len(SETTINGS)], time.monotonic()
        rng = random.Random(f"{seed}/{number}")
        kinds, found = course(runs, setting, f"course-{number}", rng, min(MOST, kills - told.kills.total()))
        told.kills.update(kinds)
        told.resumed += 0 if found else len(kinds)
        told.wrong += bool(found)
        seconds = time.monotonic() - started
        said = f"killed {', '.join(kinds)}: {'; '.join(found) or 'the same'}"
        print(f"{number}: {setting}, {said}; {seconds:.1f} s", flush=True)
        number += 1
    each = (time.monotonic() - began) / max(1, told.kills.total())
    print(f"seed {seed}: {told}; {told.wrong} runs with something wrong; {each:.1f} s a kill")
    return told
