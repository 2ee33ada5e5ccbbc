"""Starts a function on N gloo ranks and gives back what each returned."""

from __future__ import annotations

import datetime
import io
import os
import queue as queues
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

import grass_dist

SERVER = mp.get_context("forkserver")
# Imported once in the fork server: a rank then starts in a fraction of a second instead of importing torch anew.
SERVER.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.fsdp",
        "integration_tests.support.model",
        "grass_dist.finetune.data.loading",
        "grass_dist.finetune.setup",
    ]
)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Runs ``function(rank, world_size, *args)`` in a process each, with a gloo process group; results by rank.

    A rank that raises makes this raise `RankFailed` with its traceback; one that is not done in ``timeout`` seconds is
    killed with all others and named.
    """
    port = free_port()
    results: Any = SERVER.Queue()
    processes = [
        SERVER.Process(target=_rank, args=(rank, world_size, port, function, args, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    given: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(given) < world_size:
            try:
                rank, ok, value = results.get(timeout=max(0.01, min(1.0, deadline - time.monotonic())))
            except queues.Empty:
                missing = sorted(set(range(world_size)) - set(given))
                dead = [r for r in missing if processes[r].exitcode not in (None, 0)]
                if dead:
                    raise RankFailed(f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}") from None
                if time.monotonic() > deadline:
                    raise RankFailed(f"ranks {missing} were not done after {timeout} s") from None
                continue
            if not ok:
                raise RankFailed(f"rank {rank}:\n{value}")
            given[rank] = torch.load(io.BytesIO(value), weights_only=False)
        for process in processes:
            process.join(20)
            assert process.exitcode == 0, f"exit code {process.exitcode} in the teardown"
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return [given[rank] for rank in range(world_size)]


def refused(make: Callable[[], Any]) -> str:
    """The sentence with which ``make`` is refused, with the class of the error before it."""
    try:
        make()
    except grass_dist.GrassError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


class RankFailed(AssertionError):
    pass


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple, results: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
    )
    try:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=180))
        value = function(rank, world_size, *args)
        dist.barrier()
        dist.destroy_process_group()
        buffer = io.BytesIO()
        torch.save(value, buffer)  # bytes: a tensor would come through shared memory, which ends with this process
        results.put((rank, True, buffer.getvalue()))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
