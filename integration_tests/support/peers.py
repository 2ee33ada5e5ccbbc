"""Ranks of which one is lost in the middle of a step, and how the others end."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from grass_dist.errors import GrassError
from grass_dist.job import world as worlds
from grass_dist.job.peers import lost_peer
from grass_dist.job.world import World
from integration_tests.support.hosts import Host
from integration_tests.support.ranks import SERVER, free_port

GO = "go"


@dataclass(frozen=True)
class Scene:
    """What happens to which rank in step 2."""

    size: int
    victim: int = -1
    blow: int | None = None
    """Signal that the victim sends itself; None: it goes on, but never joins the reduction."""
    timeout: float = 5
    """Of a collective, seconds."""
    answers_within: float = 3
    patient: bool = False
    """They reduce where nothing has a timeout."""
    held: bool = False
    """All wait before the reduction until the folder holds a file `GO`."""
    wakes_after: float = 0
    """Seconds after which a victim that is stopped goes on."""
    next_victim: int = -1
    """Rank that is killed in a third step."""


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    code: int | None
    """None if it had to be killed."""
    err: str
    """All that it wrote to stderr, libraries included."""
    seconds: float
    """From the moment before the reduction of step 2."""

    @property
    def said(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def play(scene: Scene, folder: Path, within: float) -> list[Ended]:
    """Starts the ranks and waits until all but a stopped victim have ended; by rank.

    Args:
        within: seconds after which those that have not ended are killed.
    """
    port, waited_for = free_port(), [r for r in range(scene.size) if r != scene.victim or scene.blow == signal.SIGKILL]
    processes = [
        SERVER.Process(target=_rank, args=(rank, "127.0.0.1", port, scene, folder), daemon=True)
        for rank in range(scene.size)
    ]
    for process in processes:
        process.start()
    try:
        ends = _times_of_end(lambda rank: processes[rank].exitcode, waited_for, within)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()  # a stopped one too
        for process in processes:
            process.join(10)
    return _ended(folder, codes, ends)


def play_apart(
    scene: Scene, folder: Path, hosts: list[Host], meanwhile: Callable[[], None], within: float
) -> list[Ended]:
    """As `play`, with equally many ranks on each host.

    Args:
        meanwhile: called when all ranks are `held` before the reduction; it has to let them go.
    """
    address = [hosts[0].address, "29400", json.dumps(asdict(scene)), str(folder)]
    command = [sys.executable, "-m", "integration_tests.support.peers", "rank"]
    each = scene.size // len(hosts)
    ranks = [hosts[rank // each].popen([*command, str(rank), *address]) for rank in range(scene.size)]
    try:
        deadline = time.monotonic() + within
        while not all((folder / f"{rank}.time").exists() for rank in range(scene.size)):
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks), "the ranks did not start"
            time.sleep(0.05)
        meanwhile()
        ends = _times_of_end(lambda rank: ranks[rank].poll(), range(scene.size), within)
        return _ended(folder, [rank.poll() for rank in ranks], ends)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _times_of_end(code: Callable[[int], int | None], ranks: Iterable[int], within: float) -> dict[int, float]:
    """When each rank ended; those that did not in ``within`` seconds are not there."""
    ends: dict[int, float] = {}
    deadline, left = time.monotonic() + within, set(ranks)
    while left and time.monotonic() < deadline:
        gone = {rank for rank in left if code(rank) is not None}
        ends.update(dict.fromkeys(gone, time.monotonic()))
        left -= gone
        time.sleep(0.02)
    return ends


def _ended(folder: Path, codes: list[int | None], ends: dict[int, float]) -> list[Ended]:
    now = time.monotonic()
    return [
        Ended(code, (folder / f"{rank}.err").read_text(), ends.get(rank, now) - _hit_at(folder, rank))
        for rank, code in enumerate(codes)
    ]


def _hit_at(folder: Path, rank: int) -> float:
    file = folder / f"{rank}.time"
    return float(file.read_text()) if file.exists() else 0.0


def _rank(rank: int, address: str, port: int, scene: Scene, folder: Path) -> None:
    for number in (1, 2):
        os.dup2(os.open(folder / f"{rank}.{'out' if number == 1 else 'err'}", os.O_CREAT | os.O_WRONLY), number)
    sys.stderr = os.fdopen(2, "w")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(scene.size))
    worlds.ANSWERS_WITHIN = scene.answers_within
    world = World.join(datetime.timedelta(seconds=scene.timeout))
    then = "the run can go on with --resume auto"

    def give_up(lost: GrassError) -> None:
        print(f"error: {lost}", file=sys.stderr)
        world.abandon(1)

    world.peers.guard(give_up, then)
    try:
        steps(world, scene, folder)
        sum_in_two_threads(world)
        world.leave()
    except Exception as error:
        lost = lost_peer(world.peers, error, then)
        if lost is None:
            raise
        give_up(lost)


def steps(world: World, scene: Scene, folder: Path) -> None:
    gradient = torch.ones(100_000)
    for step in (1, 2) if scene.next_victim < 0 else (1, 2, 3):
        with world.during(f"step {step}"):
            with world.during(f"reading the data of step {step}"):
                if step == 2:
                    (folder / f"{world.rank}.time").write_text(str(time.monotonic()))
                    if world.rank == scene.victim:
                        if scene.wakes_after:
                            wake = f"sleep {scene.wakes_after}; kill -CONT {os.getpid()}"
                            subprocess.Popen(["sh", "-c", wake])
                        _fall(scene.blow)
                    while scene.held and not (folder / GO).exists():
                        time.sleep(0.02)
                if step == 3 and world.rank == scene.next_victim:
                    _fall(signal.SIGKILL)
            with world.during(f"the gradient reduction of step {step}"):
                dist.all_reduce(gradient, group=world.patient if scene.patient else None)
    assert (gradient == scene.size**2).all()


def sum_in_two_threads(world: World, times: int = 50) -> None:
    """The main thread over all ranks, and a second one with the group that is for it, in any order on each rank."""
    sums = [torch.zeros(()), torch.zeros(())]

    def add(total: torch.Tensor, group: dist.ProcessGroup | None) -> None:
        for _ in range(times):
            one = torch.ones(())
            dist.all_reduce(one, group=group)
            total += one

    thread = threading.Thread(target=add, args=(sums[0], world.background))
    thread.start()
    add(sums[1], None)
    thread.join()
    assert [total.item() for total in sums] == [times * world.size] * 2


def _fall(blow: int | None) -> None:
    if blow is None:
        threading.Event().wait()
    else:
        os.kill(os.getpid(), blow)


def restarted(folder: Path) -> None:
    """A program for torchrun: at its first start rank 1 dies; at the second all is well."""
    world = World.join(datetime.timedelta(seconds=20))
    total = torch.ones(())
    dist.all_reduce(total)
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    (folder / f"joined.{start}.{world.rank}").write_text(f"{total.item():g}")
    if start == 0 and world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    # At the first start this waits for the dead: it fails, or is ended by torchrun.
    world.together(lambda: None, start=start)
    (folder / f"done.{start}.{world.rank}").write_text(repr(world.peers.hosts))
    world.leave()


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        _rank(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), Scene(**json.loads(sys.argv[5])), Path(sys.argv[6]))
    else:
        restarted(Path(sys.argv[1]))
