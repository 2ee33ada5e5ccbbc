"""Joins the ranks of a fine-tune, and makes them fail together."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

from grass_dist.errors import GrassError
from grass_dist.job.launchers import ProcessPlace, find_place, let_gloo_find_this_host, meet_by_mpi
from grass_dist.job.peers import ANSWERS_WITHIN, Peers, of_collective
from grass_dist.job.seats import Seat, own_seat, problem_of
from grass_dist.ranks import Ranks, together

T = TypeVar("T")
_STDERR = 2
"""Its number: an object that replaces sys.stderr may have none."""
_GRACE = 10.0
"""Seconds after a timeout before a process that hangs is ended."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among all, as the launcher (torchrun, deepspeed, mpirun, srun) has told it."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup
    """Group of all ranks that waits where one of them works alone (saving, answering): its timeout is a day.

    It notices a killed peer at once. `Peers.guard` notices one that is stopped or cut off.
    """
    background: dist.ProcessGroup = field(default_factory=lambda: cast(dist.ProcessGroup, dist.group.WORLD))
    """gloo group of all ranks for the one thread beside the main one that has collectives of its own."""
    store: dist.Store = field(default_factory=dist.HashStore)
    """Store of this start of the ranks alone, without what an earlier start has left in the launcher's store."""
    peers: Peers = field(default_factory=Peers)

    @classmethod
    def join(cls, timeout: datetime.timedelta) -> World:
        """Joins the process group: NCCL on GPUs, gloo without. A process without a launcher is a world of one.

        The environment holds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT afterwards.

        Args:
            timeout: limit of joining, and of every collective outside `patient`.

        Raises:
            GrassError: launchers contradict each other, there are more ranks than GPUs, or a rank does not come; each
                rank speaks for itself. On every rank, if two ranks share a device.
        """
        place = find_place(os.environ) or ProcessPlace("nobody", 0, 0, 1)
        if place.size > 1 and not place.knows_address:
            place = meet_by_mpi(place)
        rank, size, local_rank = place.rank, place.size, place.local_rank
        device = _take_device(place)
        # Where torch and DeepSpeed look for it; DeepSpeed takes the device of that number.
        shown = place if device.index is None else replace(place, local_rank=device.index)
        os.environ.update(shown.variables())
        let_gloo_find_this_host(os.environ)
        # transformers imports DeepSpeed where that is installed, which else guesses the accelerator and says so.
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        # Objects and small sums travel by gloo on CPU memory, gradients by NCCL.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if not place.knows_address:
            store: dist.Store = dist.HashStore()
            dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
            groups = _gloo_groups(timeout)
            return cls(rank, local_rank, size, device, *groups, store, Peers(hosts=[socket.gethostname()]))
        try:
            store, line = _meet(place, timeout)
            with _destroyed_on_error():
                groups, seats = _enter(backend, timeout, store, place, device)
        except RuntimeError as error:
            if not of_collective(error):
                raise
            if "EADDRINUSE" in str(error):
                raise GrassError(
                    f"rank {rank} cannot wait for the others at {place.address}:{place.port} (address already in use): "
                    "another program listens there; end it, or set MASTER_PORT to a port that is free on that host, "
                    f"the same for all {size} ranks."
                ) from error
            raise GrassError(
                f"rank {rank} and the others did not all join at {place.address}:{place.port} within "
                f"{timeout.total_seconds():g} s ({first_line(error)}); start all {size} ranks, on hosts that reach "
                "that address."
            ) from error
        peers = _acquaint(rank, [seat.host for seat in seats], line, timeout)
        return cls(rank, local_rank, size, device, *groups, store, peers)

    @property
    def is_main(self) -> bool:
        """Says whether this is the rank that speaks and writes files."""
        return self.rank == 0

    def together(self, work: Callable[[], T], **must_agree: Any) -> T:
        """Does ``work`` on every rank; if it fails on one, every rank raises, before any goes on.

        The others wait for the slowest up to a day, because some work takes one rank long: the first download of a
        model (`in_turn`), an answer, a save. See `patient` for a peer that is lost meanwhile.

        Args:
            must_agree: values that have to be equal on all ranks, by the names that an error shows.

        Raises:
            GrassError: this rank's error, or that of the first other rank, which is named. An `OSError` becomes one;
                any other error is raised as it is on its own rank.
        """
        return together(Ranks(self.patient), work, must_agree)

    def in_turn(self, work: Callable[[], T]) -> T:
        """Does ``work`` as `together`, but first on the first rank of each host, which may fill a cache."""
        first = self.together(lambda: work() if self.local_rank == 0 else None)
        other = self.together(lambda: work() if self.local_rank != 0 else None)
        return first if self.local_rank == 0 else other  # type: ignore[return-value]

    def sum(self, *values: float) -> list[float]:
        """Sums numbers over all ranks, and returns them in host memory."""
        carried = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(carried)
        return carried.tolist()

    def during(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Says what is being done, for the sentence of a lost peer: "the backward of step 12". It may be nested."""
        return self.peers.during(what)

    def leave(self) -> None:
        """Waits for the others, then ends the process group, so that no rank aborts another's teardown."""
        dist.barrier(group=self.patient)
        self.close()

    def close(self) -> None:
        """Ends the process group without waiting, after an error that every rank has."""
        self.peers.stop()
        dist.destroy_process_group()

    @staticmethod
    def abandon(code: int) -> NoReturn:
        """Ends the process at once, without any teardown, which may hang where a peer is lost."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed, or a pipe that nobody reads
                stream.flush()
        os._exit(code)


@contextlib.contextmanager
def _destroyed_on_error() -> Iterator[None]:
    """Ends the process group that an error leaves behind, since who catches the error has no World to close.

    The frames of the error hold the groups' threads. One of these may still hold a tensor, for which it needs the
    interpreter's lock, and an interpreter that ends meanwhile aborts the process.
    """
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        if dist.is_initialized():
            dist.destroy_process_group()
        raise


def _take_device(place: ProcessPlace) -> torch.device:
    """Takes a GPU for this rank alone where there are any.

    Raises:
        GrassError: there are more ranks than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A rank that sees one GPU has been given it by its launcher (srun --gpus-per-task), or shares it: `problem_of`.
    index = 0 if (count := torch.cuda.device_count()) == 1 else place.local_rank
    if index >= count:
        raise GrassError(
            f"rank {place.rank} is number {index} on its host, which has {count} GPUs; "
            "start one rank for each GPU at most."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _meet(place: ProcessPlace, timeout: datetime.timedelta) -> tuple[dist.Store, dist.Store]:
    """Connects twice to the store that the launcher or rank 0 keeps, for this start alone.

    After a restart of the ranks torchrun's store is the same as before, and full of the addresses of dead ranks.
    """
    assert place.address is not None and place.port is not None
    with _bounded(timeout):
        store = next(iter(dist.rendezvous("env://", timeout=timeout)))[0]
        # Now, while it answers.
        line = dist.TCPStore(place.address, place.port, is_master=False, timeout=timeout, wait_for_workers=False)
    if not _launcher_keeps_store():
        return store, line
    start = _agree_on_start(dist.PrefixStore("starts", store), place.rank, place.size, timeout)
    return dist.PrefixStore(start, store), dist.PrefixStore(start, line)


@contextlib.contextmanager
def _bounded(timeout: datetime.timedelta) -> Iterator[None]:
    """Ends the process if the block takes far longer than ``timeout``, and says on stderr where it stands.

    A connection to a process that hangs holds the interpreter's lock beyond any timeout of torch's.
    """
    faulthandler.dump_traceback_later(2 * timeout.total_seconds() + _GRACE, exit=True, file=_STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _launcher_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _agree_on_start(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> str:
    """Agrees on a name for this start of the ranks, which no earlier start had.

    Rank 0 makes it and answers every rank that asks. TORCHELASTIC_RESTART_COUNT would not do: where a node has joined
    or left, the other nodes' launchers restart without counting it.

    Raises:
        GrassError: on rank 0, a rank did not ask in time.
        dist.DistStoreError: on the others, rank 0 did not answer in time.
    """
    mine = uuid.uuid4().hex
    if rank != 0:
        store.set(f"asks/{rank}", mine)
        start = store.get(f"answer/{mine}").decode()
        store.set(f"{start}/{rank}", "1")
        return start
    missing, deadline = set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise GrassError(f"rank {min(missing)} of {size} did not join within {timeout.total_seconds():g} s.")
        for other in sorted(missing):
            if store.check([f"asks/{other}"]):  # maybe in an earlier start: then it asks again
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", mine)
            if store.check([f"{mine}/{other}"]):
                missing.remove(other)
        time.sleep(0.01)
    return mine


def _enter(
    backend: str, timeout: datetime.timedelta, store: dist.Store, place: ProcessPlace, device: torch.device
) -> tuple[tuple[dist.ProcessGroup, dist.ProcessGroup], list[Seat]]:
    """Initialises the process group, makes `_gloo_groups`, and exchanges where the ranks sit.

    Raises:
        GrassError: on every rank, if two ranks sit in one seat.
    """
    dist.init_process_group(backend, timeout=timeout, store=store, rank=place.rank, world_size=place.size)
    groups = _gloo_groups(timeout)
    seats = Ranks(groups[1]).gather_objects(own_seat(place.local_rank, device))
    if said := problem_of(seats):
        wrong = GrassError(said)
        wrong.on_every_rank = True
        raise wrong
    return groups, seats


def _gloo_groups(timeout: datetime.timedelta) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Makes two groups of all ranks, `World.patient` and `World.background`."""
    patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    background = dist.new_group(backend="gloo", timeout=timeout)
    return cast(dist.ProcessGroup, patient), cast(dist.ProcessGroup, background)


def _acquaint(rank: int, hosts: list[str], line: dist.Store, timeout: datetime.timedelta) -> Peers:
    """Makes what this rank knows of the others."""
    by_launcher = _launcher_keeps_store()
    keeper = f"the launcher on {os.environ['MASTER_ADDR']}" if by_launcher else f"rank 0 (on host {hosts[0]})"
    return Peers(
        rank,
        hosts,
        dist.PrefixStore("peers", line),
        keeper=keeper,
        keeps=rank == 0 and not by_launcher,
        launched=by_launcher,
        answers_within=min(ANSWERS_WITHIN, timeout.total_seconds()),
        lost_after=timeout.total_seconds(),
    )


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says, cut to 200 characters."""
    return str(error).strip().split("\n")[0][:200]
