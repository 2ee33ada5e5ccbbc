"""Finds which rank of how many this process is, whether torchrun, deepspeed, MPI or SLURM has started it."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

from grass_dist.errors import GrassError, shorten
from grass_dist.job.interfaces import find_interfaces

PORTS = range(20_000, 30_000)
"""Ports of SLURM steps. The numbers of the step and its job choose one, since the tasks cannot tell each other a free
one."""

_BETWEEN_STEPS = 7919
"""Distance between the ports of two steps of one job, so that the next job's first step takes another port than both.
It has no divisor in common with the number of ports."""


@dataclass(frozen=True, slots=True)
class ProcessPlace:
    """The place of a process in its world."""

    launcher: str
    """Its name in a sentence, e.g. "torchrun" or "Open MPI"."""
    rank: int
    local_rank: int
    """Its number among the ranks of its host."""
    size: int
    address: str | None = None
    """Address at which rank 0 waits for the others; None until MPI has told it (`meet_by_mpi`)."""
    port: int | None = None

    @property
    def knows_address(self) -> bool:
        return self.address is not None and self.port is not None

    def variables(self) -> dict[str, str]:
        """Returns the environment that torch and DeepSpeed read, as torchrun would have set it."""
        found = {"RANK": self.rank, "LOCAL_RANK": self.local_rank, "WORLD_SIZE": self.size}
        if self.knows_address:
            found |= {"MASTER_ADDR": self.address, "MASTER_PORT": self.port}
        return {name: str(value) for name, value in found.items()}


def find_place(environ: Mapping[str, str]) -> ProcessPlace | None:
    """Returns the place that environment variables of the launcher tell; None for a process that nobody has launched.

    Raises:
        GrassError: a variable is missing or no number, or two launchers contradict each other. Processes that each
            think they are alone would train and write the same run.
    """
    started = _by_variables(environ)
    around = _by_mpi(environ) or _by_slurm(environ)
    if started is None:
        if around is None:
            _check_not_in_batch_script(environ)
        return around
    if around is not None and around.size > 1:
        _check_one_world(started, around, environ)
    return started


def meet_by_mpi(place: ProcessPlace) -> ProcessPlace:
    """Lets MPI tell all ranks rank 0's address and a port that is free there, and count the local ranks.

    MPI is ended again before this returns: a rank that fails later can leave, and `mpirun` ends the others then,
    where a rank inside MPI would wait for them.

    Raises:
        GrassError: mpi4py is not installed, or belongs to another MPI than the launcher.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False  # it is initialized by hand, so that it can be ended
        from mpi4py import MPI
    except ImportError as error:
        raise GrassError(
            f"{place.launcher} started {place.size} processes, which need mpi4py to find each other ({error}); "
            "pip install 'grass-dist[mpi]', or set MASTER_ADDR and MASTER_PORT for all of them."
        ) from None
    MPI.Init()
    try:
        world: Any = MPI.COMM_WORLD
        if world.Get_size() != place.size:
            raise GrassError(
                f"{place.launcher} started {place.size} processes, but mpi4py sees {world.Get_size()}: it is bound to "
                "another MPI; install the one whose mpirun is used."
            )
        local = world.Split_type(MPI.COMM_TYPE_SHARED, key=place.rank).Get_rank()
        address, port = world.bcast((own_address(), free_port()) if place.rank == 0 else None)
    finally:
        MPI.Finalize()
    return replace(place, local_rank=local, address=place.address or address, port=place.port or port)


def own_address() -> str:
    """Returns an address by which others reach this host: that of its name, else the one by which packets leave."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    except OSError:
        found = []
    named = [address for address in found if not address.startswith(("127.", "::1", "fe80:"))]
    # These addresses belong to nobody, and nothing is sent to them.
    ways = ((socket.AF_INET, "203.0.113.1"), (socket.AF_INET6, "2001:db8::1"))
    routed = [address for family, away in ways if (address := _leaves_by(family, away))]
    alone = "127.0.0.1" if _has_ipv4() else "::1"
    # IPv4 comes before IPv6, and then an address of the name before one of the routes.
    return min([*named, *routed], key=lambda address: ":" in address, default=alone)


def _leaves_by(family: int, away: str) -> str | None:
    """Returns the address of this host by which packets leave; None where there is no way."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((away, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _has_ipv4() -> bool:
    return _leaves_by(socket.AF_INET, "127.0.0.1") is not None


def let_gloo_find_this_host(environ: MutableMapping[str, str]) -> None:
    """Names gloo's interface on a host without IPv4 whose name does not resolve, where gloo takes 127.0.0.1 and fails.

    What the user has set stays.
    """
    if environ.get("GLOO_SOCKET_IFNAME") or _has_ipv4():
        return
    try:
        socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        here = own_address()
        named = [name for name, address in find_interfaces().items() if address == here]
        if named:
            environ["GLOO_SOCKET_IFNAME"] = named[0]


def warning_of(environ: Mapping[str, str]) -> str | None:
    """A sentence on a launcher that ends its ranks before they can have saved, if this one does; None otherwise."""
    if "OMPI_COMM_WORLD_RANK" not in environ or "GRASS_DIST_SIGNAL" in environ:
        return None
    return (
        "warning: mpirun kills its ranks a moment after a Ctrl-C, SIGTERM or SIGHUP, before they can have "
        "saved: to end this run with a checkpoint, send mpirun a SIGUSR1, or start it by launch/mpirun.sh, which does"
    )


def free_port() -> int:
    with socket.socket(socket.AF_INET if _has_ipv4() else socket.AF_INET6) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def first_host(nodes: str) -> str:
    """Returns the first name of a SLURM node list: ``rack[0-1]n[03-07,12]-ib0,gpu1`` gives ``rack0n03-ib0``.

    Raises:
        GrassError: the list names no host.
    """
    found = re.match(r"(?:[^\s\[\],]|\[\d[\d,-]*\])+(?=,|$)", nodes)
    if found is None:
        raise GrassError(f"SLURM_STEP_NODELIST={nodes!r} names no host; set MASTER_ADDR to that of the first task.")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", found[0])


def _by_variables(environ: Mapping[str, str]) -> ProcessPlace | None:
    """Reads the place that torchrun, deepspeed and launchers like them tell."""
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return None
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "the launcher"
    rank, size = (_number(environ, name, launcher) for name in ("RANK", "WORLD_SIZE"))
    local = _number(environ, "LOCAL_RANK", launcher) if "LOCAL_RANK" in environ else rank
    if not 0 <= rank < size:
        raise GrassError(f"RANK={rank} is not below WORLD_SIZE={size}; number the processes from 0.")
    if "LOCAL_RANK" not in environ and size > 1:
        raise GrassError(f"RANK={rank} is set without LOCAL_RANK; set it to the process's number on its host.")
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if size > 1 and not (address and port):
        missing = "MASTER_PORT" if address else "MASTER_ADDR"
        raise GrassError(f"RANK={rank} is set without {missing}; set it to rank 0's, the same for all processes.")
    number = _number(environ, "MASTER_PORT", launcher) if port else None
    return ProcessPlace(launcher, rank, local, size, address, number)


_MPI = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}


def _by_mpi(environ: Mapping[str, str]) -> ProcessPlace | None:
    for launcher, (rank, size, local) in _MPI.items():
        if rank in environ and size in environ:
            number = _number(environ, local, launcher) if local in environ else 0
            place = ProcessPlace(launcher, _number(environ, rank, launcher), number, _number(environ, size, launcher))
            if not (environ.get("MASTER_ADDR") and environ.get("MASTER_PORT")):
                return place
            return replace(place, address=environ["MASTER_ADDR"], port=_number(environ, "MASTER_PORT", launcher))
    return None


def _by_slurm(environ: Mapping[str, str]) -> ProcessPlace | None:
    """Reads the place of a task that srun has started."""
    if "SLURM_PROCID" not in environ or "SLURM_STEP_NODELIST" not in environ:
        return None
    rank, local = (_number(environ, name, "srun") for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    size = _number(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS", "srun")
    address = environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"])
    if "MASTER_PORT" in environ:
        port = _number(environ, "MASTER_PORT", "srun")
    else:
        step = next((name for name in ("SLURM_STEP_ID", "SLURM_STEPID") if name in environ), None)
        number = 0 if step is None else _number(environ, step, "srun")  # steps of a job run at one time on one host
        port = PORTS[(_number(environ, "SLURM_JOB_ID", "srun") + _BETWEEN_STEPS * number) % len(PORTS)]
    return ProcessPlace("srun", rank, local, size, address, port)


def _check_not_in_batch_script(environ: Mapping[str, str]) -> None:
    tasks = environ.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in environ and tasks.isdigit() and int(tasks) > 1:
        raise GrassError(
            f"SLURM_NTASKS={tasks}, but this process was started without srun and would train alone; "
            "write srun before the command, or ask for one task."
        )


def _check_one_world(started: ProcessPlace, around: ProcessPlace, environ: Mapping[str, str]) -> None:
    """Checks ``started``, which told its place itself, against the launcher ``around`` whose process it is in."""
    if started.launcher == "torchrun":  # one launcher in each process of the other
        # With restarts a world may have shrunk to one node: --nnodes 1:2.
        if environ.get("GROUP_WORLD_SIZE") == "1" and environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
            raise GrassError(
                f"{around.launcher} started {around.size} processes, and torchrun in each counts one node: they are "
                f"worlds of their own; give torchrun --nnodes {around.size} and the same --rdzv-endpoint."
            )
    elif started.size != around.size or started.rank != around.rank:
        raise GrassError(
            f"RANK={started.rank} and WORLD_SIZE={started.size} are set, but {around.launcher} started this process "
            f"as {around.rank} of {around.size}; unset RANK and WORLD_SIZE."
        )


def _number(environ: Mapping[str, str], name: str, launcher: str) -> int:
    text = environ.get(name)
    if text is None:
        raise GrassError(f"{launcher} has not set {name}; start all processes by one launcher.")
    try:
        number = int(text)
    except ValueError:
        shown = shorten(repr(text), 80)
        raise GrassError(f"{name}={shown} is no number; unset it, or start all processes by one launcher.") from None
    if name == "MASTER_PORT" and not 0 <= number < 2**16:
        raise GrassError(f"MASTER_PORT={number!r:.40} is no port; set it to one from 1 to 65535, for all processes.")
    return number
