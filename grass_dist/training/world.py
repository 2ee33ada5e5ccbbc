"""The ranks of a fine-tune: who they are, and how they fail together."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from grass_dist.agreement import raise_if_ranks_differ
from grass_dist.errors import GrassError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """This process among all, as the launcher (torchrun, deepspeed) has told it by environment variables."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup
    """All ranks again, for waiting where one of them works alone (saving, answering): the timeout is a day."""

    @classmethod
    def join(cls, timeout: datetime.timedelta) -> World:
        """Joins the process group: NCCL on GPUs, gloo without. A process without a launcher is a world of one."""
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                raise GrassError(
                    f"rank {rank} is number {local_rank} on its host, which has {torch.cuda.device_count()} GPUs; "
                    "start one rank for each GPU at most."
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        # transformers imports DeepSpeed where that is installed, which else guesses the accelerator and says so.
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        os.environ.setdefault("LOCAL_RANK", str(local_rank))  # where DeepSpeed looks for it, whoever started us
        # Objects and small sums travel by gloo on CPU memory, gradients by NCCL.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
        return cls(rank, local_rank, size, device, cast(dist.ProcessGroup, patient))

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that speaks and writes files."""
        return self.rank == 0

    def together(self, work: Callable[[], T], **must_agree: Any) -> T:
        """Does ``work`` on every rank; if it fails on one, every rank raises, before any goes on.

        Args:
            must_agree: values that have to be equal on all ranks, by the names that an error shows.

        Raises:
            GrassError: this rank's error, or the first other rank's, named. An `OSError` becomes one; any other
                error is raised as it is on its own rank.
        """
        problem: Exception | None = None
        result = None
        try:
            result = work()
        except OSError as error:
            problem = GrassError(f"{error.filename or 'input or output'}: {error.strerror or error}.")
        except Exception as error:
            problem = error
        reports: list[Any] = [None] * self.size
        shown = {name: repr(value) for name, value in must_agree.items()}
        text = f"{'' if isinstance(problem, GrassError) else type(problem).__name__ + ': '}{problem}"
        dist.all_gather_object(reports, (text if problem else None, shown), group=self.patient)
        if problem is not None:
            if isinstance(problem, GrassError):
                problem.on_every_rank = True
            raise problem
        raise_if_ranks_differ(reports)
        return result  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], T]) -> T:
        """As `together`, but the first rank of each host does ``work`` before the others: it may fill a cache."""
        first = self.together(lambda: work() if self.local_rank == 0 else None)
        other = self.together(lambda: work() if self.local_rank != 0 else None)
        return first if self.local_rank == 0 else other  # type: ignore[return-value]

    def sum(self, *values: float) -> list[float]:
        """Sums of host numbers over all ranks."""
        carried = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(carried)
        return carried.tolist()

    def leave(self) -> None:
        """Waits for the others, then ends the process group, so that no rank aborts another's teardown."""
        dist.barrier(group=self.patient)
        dist.destroy_process_group()
