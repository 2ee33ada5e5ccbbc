"""Runs the doctor in one process or on all ranks of a launcher: it finds, measures and tells, and it always ends.

Nothing waits without a time limit. Exchanges and collectives have their own; a timer that ends the process watches each
step that has none; and the system's alarm ends the process if all of these fail.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from grass_dist.doctor.collectives import measure_all, measure_hosts, measure_links
from grass_dist.doctor.copies import measure_copies
from grass_dist.doctor.facts import Disk, Facts, Reach, Report
from grass_dist.doctor.findings import judge, judge_meeting
from grass_dist.doctor.gather import choose_own_address, own_device, own_facts, try_disk
from grass_dist.doctor.meeting import GRACE, Meeting
from grass_dist.doctor.network import TokenServer, bound_addresses, reach, reason
from grass_dist.doctor.schema import report_json
from grass_dist.doctor.tables import show
from grass_dist.errors import GrassError
from grass_dist.job.launchers import ProcessPlace, find_place, meet_by_mpi
from grass_dist.job.peers import lost_peer
from grass_dist.job.world import World
from grass_dist.ranks import Ranks

T = TypeVar("T")

DISK_BYTES = 64 << 20
DISK_SECONDS = 5.0
ROLL_SECONDS = 30.0
"""Time in which rank 0 finds out who is lost, and tells."""


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """The options of the command, which are the same on all ranks."""

    json_file: Path | None = None
    folder: Path = Path()
    interface: str | None = None
    """Network interface for gloo and NCCL; None leaves it to the environment."""
    nbytes: int = 16_000_000
    """Size of the largest message that is measured."""
    timeout: float = 60.0
    """Time limit of the meeting and of every collective, in seconds."""


def diagnose(options: DoctorOptions) -> int:
    """Runs on every rank; rank 0 prints, and writes the JSON file.

    Returns:
        The exit status, the same on all ranks: 1 if something would break or cripple a run.

    Raises:
        GrassError: the launcher's variables contradict each other, or this rank cannot meet the others; rich is not
            installed.
    """
    if find_spec("rich") is None:  # now, while no rank waits for another
        raise GrassError("The doctor's tables need rich; run pip install 'grass-dist[train]'.")
    if options.interface is not None:
        os.environ.update(GLOO_SOCKET_IFNAME=options.interface, NCCL_SOCKET_IFNAME=options.interface)
    signal.alarm(int(16 * (options.timeout + ROLL_SECONDS)))  # ends the process also where torch's code hangs
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)  # so does Ctrl-C: a teardown would wait for the others
    try:
        place = find_place(os.environ) or ProcessPlace("nobody", 0, 0, 1)
        if place.size == 1:
            return _alone(place, options)
        if not place.knows_address:
            place = meet_by_mpi(place)
        os.environ.update(place.variables())  # MPI can be entered once; `World.join` finds them
        try:
            return _together(place, options)
        except GrassError as error:
            raise GrassError(f"rank {place.rank} (on host {socket.gethostname()}): {error}") from None
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.alarm(0)


def _alone(place: ProcessPlace, options: DoctorOptions) -> int:
    report = Report(1, options.timeout)
    facts = own_facts(place, choose_own_address(place), 0)
    # Without others it is no matter how they would reach this one.
    report.ranks = [replace(facts, interface_problem="", name_problem="")]
    device = own_device(place)
    with _limited("the copies", options.timeout):
        report.copies = [measure_copies(0, device, turn=0, turns=1, ranks_here=1, barrier=lambda: None)]
    with _limited(f"writing in {options.folder}", options.timeout):
        report.disks = [_try_disk(facts.host, options)]
    return _tell(report, options)


def _together(place: ProcessPlace, options: DoctorOptions) -> int:
    report = Report(place.size, options.timeout, f"{place.address}:{place.port}")
    with _limited("meeting the others", 4 * options.timeout + ROLL_SECONDS):
        meeting = _meet(place, options, report)
    world = None
    if not any(finding.stops for finding in judge_meeting(report)):
        world = _measure(report, options)
    code = None
    if place.rank == 0:
        code = _tell(report, options)
    wait = options.timeout + ROLL_SECONDS
    try:
        # The store's own limit does not hold where the link to it is cut.
        with _limited("waiting for rank 0", wait + GRACE, report.failed):
            code = meeting.end(code, wait)
    except GrassError as error:
        if not report.failed:
            raise
        _say_own(f"{report.failed} And {error}")
        code = 1
    if report.failed:
        World.abandon(code)  # ending a process group in which a rank is lost may hang
    if world is not None:
        with _limited("the end of the doctor", options.timeout):
            world.leave()
    return code


def _meet(place: ProcessPlace, options: DoctorOptions, report: Report) -> Meeting:
    """Puts into ``report`` what all ranks are, and which host reaches which."""
    chosen = choose_own_address(place)
    try:
        meeting = Meeting(place, options.timeout)
    except GrassError as error:
        raise GrassError(f"{chosen.problem}; and {error}" if chosen.problem else str(error)) from None
    token, port = os.urandom(16), 0
    try:
        port = TokenServer(chosen.address, token).port
    except OSError as error:
        said = f"{chosen.interface or chosen.chosen_by} ({chosen.address}) cannot be listened on: {reason(error, 0)}"
        chosen = replace(chosen, problem=chosen.problem or said)
    facts = own_facts(place, chosen, port)
    if place.port is not None:
        facts = replace(facts, store_bound=bound_addresses(place.port))
    came = meeting.exchange("facts", {"facts": asdict(facts), "token": token.hex()})
    report.ranks = [Facts.from_json(one["facts"]) for one in came if one is not None]
    tokens = {rank: bytes.fromhex(one["token"]) for rank, one in enumerate(came) if one is not None}
    tried = meeting.exchange("reach", [asdict(one) for one in _try_others(report, place.rank, tokens)])
    report.ranks = [facts for facts in report.ranks if tried[facts.rank] is not None]
    here = {facts.rank for facts in report.ranks}
    report.reach = [Reach(**one) for its in tried for one in its or () if one["rank"] in here and one["to"] in here]
    return meeting


def _try_others(report: Report, rank: int, tokens: dict[int, bytes]) -> list[Reach]:
    """The first rank of each host tries those of all other hosts, and every rank on another host tries rank 0."""
    firsts = [ranks[0] for ranks in report.hosts.values()]
    mine = report.host_of(rank)
    targets = [facts for facts in firsts if report.host_of(facts.rank) != mine]
    if rank not in {facts.rank for facts in firsts}:
        targets = [facts for facts in targets if facts.rank == 0]
    with ThreadPoolExecutor(64) as pool:
        return list(pool.map(lambda to: reach(rank, to.rank, to.address, to.port, tokens[to.rank]), targets))


def _measure(report: Report, options: DoctorOptions) -> World | None:
    """Puts into ``report`` what is measured, up to a step that fails, and the sentence about it."""
    try:
        with _limited("joining the process group", 4 * options.timeout + ROLL_SECONDS):
            world = World.join(datetime.timedelta(seconds=options.timeout))
    except GrassError as error:
        report.failed = str(error)
        return None
    hosts = {host: [facts.rank for facts in ranks] for host, ranks in report.hosts.items()}
    mine = report.host_of(world.rank)
    here = hosts[mine]

    def step(what: str, work: Callable[[], list[T]]) -> list[T]:
        with _limited(what, 2 * options.timeout + ROLL_SECONDS), world.during(what):
            return [one for its in Ranks(world.background).gather_objects(work()) for one in its]

    def copies() -> list[Any]:
        turns = max(len(ranks) for ranks in hosts.values())
        turn = here.index(world.rank)
        barrier = partial(dist.barrier, group=world.background)
        return [measure_copies(world.rank, world.device, turn=turn, turns=turns, ranks_here=len(here), barrier=barrier)]

    def disks() -> list[Disk]:
        return [_try_disk(mine, options)] if world.rank == here[0] else []

    try:
        everywhere = step("the collectives over all ranks", lambda: measure_all(world, options.nbytes))
        report.collectives = everywhere[: len(everywhere) // world.size]
        within = step("the collectives within each host", lambda: [measure_hosts(world, hosts, options.nbytes)])
        report.collectives += [one for ranks in hosts.values() for one in within[ranks[0]]]
        firsts = [(host, ranks[0]) for host, ranks in hosts.items()]
        links = step("the links between hosts", lambda: measure_links(world, firsts, options.nbytes))
        report.links = sorted(links, key=lambda link: (link.sender, link.receiver))
        report.copies = step("the copies", copies)
        report.disks = step(f"writing in {options.folder}", disks)
    except Exception as error:
        if (lost := lost_peer(world.peers, error)) is None:
            _say_own(str(error) if isinstance(error, GrassError) else traceback.format_exc())
            World.abandon(1)  # at once: the others notice it, where a teardown would wait for them
        report.failed = str(lost)
        return None
    return world


def _try_disk(host: str, options: DoctorOptions) -> Disk:
    return try_disk(host, options.folder.resolve(), DISK_BYTES, DISK_SECONDS)


def _tell(report: Report, options: DoctorOptions) -> int:
    findings = judge(report)
    show(report, findings)
    code = int(any(finding.is_error for finding in findings))
    if options.json_file is not None:
        try:
            options.json_file.write_text(json.dumps(report_json(report, findings), indent=1, allow_nan=False) + "\n")
        except OSError as error:
            print(f"error: --json {options.json_file}: {error.strerror}.", file=sys.stderr, flush=True)
            return 1
    return code


@contextlib.contextmanager
def _limited(what: str, seconds: float, cause: str = "") -> Iterator[None]:
    """Ends the process if the block takes longer than that: it may hang where nothing in torch would notice.

    Args:
        cause: a sentence that says more.
    """

    def end() -> None:
        said = f"{what} did not end within {seconds:g} s."
        _say_own(f"{cause} And {said}" if cause else said)
        World.abandon(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say_own(text: str) -> None:
    """Prints what this rank alone may know."""
    where = f"rank {os.environ.get('RANK', '0')} (on host {socket.gethostname()})"
    print(f"error: {where}: {text}", file=sys.stderr, flush=True)
