"""Gathers what one rank can say about itself and its host, without the others."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch
from torch.cuda import nccl

from grass_dist.doctor.facts import Disk, Facts
from grass_dist.doctor.network import Chosen, address_of_name, address_of_route, choose_address
from grass_dist.job.interfaces import find_interfaces
from grass_dist.job.launchers import ProcessPlace
from grass_dist.job.seats import own_seat
from grass_dist.states.plan import free_host_memory
from grass_dist.version import __version__

CHUNK = 4 << 20
_CAP_IPC_LOCK = 14
NONE = "none"
"""Version of a package that is not installed."""


def choose_own_address(place: ProcessPlace) -> Chosen:
    """Chooses the address by which the other ranks reach this one."""
    toward = place.address or "rank 0"
    return choose_address(
        os.environ,
        find_interfaces(),
        by_name=address_of_name(),
        by_route=address_of_route(toward) if place.address else "127.0.0.1",
        toward=toward,
    )


def own_facts(place: ProcessPlace, chosen: Chosen, port: int) -> Facts:
    """Returns the facts of this rank.

    Args:
        port: the one on which it listens; 0 if it does not.
    """
    device = own_device(place)
    name, nbytes = "CPU", 0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, nbytes = properties.name, properties.total_memory
    return Facts(
        rank=place.rank,
        seat=own_seat(place.local_rank, device),
        launcher=place.launcher,
        versions=find_versions(),
        device=name,
        device_bytes=nbytes,
        unused_gpu=not torch.cuda.is_available() and Path("/proc/driver/nvidia/version").exists(),
        cores=len(os.sched_getaffinity(0)),
        host_cores=os.cpu_count() or 1,
        omp_threads=torch.get_num_threads(),
        interfaces=find_interfaces(),
        interface=chosen.interface,
        address=chosen.address,
        port=port,
        chosen_by=chosen.chosen_by,
        interface_problem=chosen.problem,
        name_problem=chosen.name_problem,
        available_bytes=free_host_memory(),
        memlock_bytes=_memlock_bytes(),
        infiniband=any(Path("/sys/class/infiniband").glob("*")),
    )


def own_device(place: ProcessPlace) -> torch.device:
    """Returns the device that `World.join` takes; for a rank without its own GPU the last, which `findings` refuses."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    return torch.device("cuda", 0 if count == 1 else min(place.local_rank, count - 1))


def find_versions() -> dict[str, str]:
    """Returns the versions of the packages, by the names that a sentence shows."""
    return {
        "grass-dist": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or NONE,
        "NCCL": ".".join(map(str, nccl.version())) if torch.cuda.is_available() else NONE,
        "deepspeed": _version("deepspeed"),
        "mpi4py": _version("mpi4py"),
        "MPI": _mpi_version(),
    }


def try_disk(host: str, folder: Path, nbytes: int, seconds: float) -> Disk:
    """Writes a temporary file in ``folder`` and reads it. It has no name, so it is gone whatever happens.

    Args:
        nbytes: the most that is written; less where ``seconds`` are over before.
    """
    chunk = os.urandom(CHUNK)  # some file systems compress
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            began, written = time.perf_counter(), 0
            while written < nbytes and time.perf_counter() - began < seconds:
                written += file.write(chunk[: nbytes - written])
            os.fsync(file.fileno())
            write = written / (time.perf_counter() - began)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            began = time.perf_counter()
            read = 0
            while time.perf_counter() - began < seconds and (part := file.read(CHUNK)):
                read += len(part)
            return Disk(host, str(folder), written, write, read / (time.perf_counter() - began), free)
    except OSError as error:
        return Disk(host, str(folder), problem=error.strerror or str(error))


def _memlock_bytes() -> int | None:
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    exempt = int(status.get("CapEff", "0"), 16) >> _CAP_IPC_LOCK & 1
    return None if exempt or soft == resource.RLIM_INFINITY else soft


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NONE


def _mpi_version() -> str:
    """Returns the version of the library that mpi4py is bound to, e.g. "Open MPI v5.0.11", without entering MPI."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # not installed, or no library of MPI beside it
        return NONE
    return MPI.Get_library_version().strip("\0").split(",")[0].split("\n")[0].strip()
