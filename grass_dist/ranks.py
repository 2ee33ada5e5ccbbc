"""Ranks, their collectives, and what they compare before any work: a mistake on one ends all with one sentence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from grass_dist.errors import GrassError, RanksDisagree, shorten

T = TypeVar("T")

log = logging.getLogger("grass_dist")

SAME_START = "start all ranks with the same configuration, model and versions"


class Ranks:
    """The processes that must agree, and the collectives by which they do.

    Args:
        group: None is a process alone.
        device: of this rank's model, which need not be the current device; None where no model is known.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
        self.group, self.device = group, device

    @property
    def world_size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of ``tensor`` over the group, by one all-reduce, on the tensor's own device."""
        if self.group is None:
            return tensor
        carried = tensor.to(self._wire_device())
        dist.all_reduce(carried, group=self.group)
        return carried.to(tensor.device)

    def gather_bytes(self, payload: bytes) -> list[bytes]:
        """``payload`` of every rank, in rank order; of the same length on all of them."""
        if self.group is None:
            return [payload]
        mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(self._wire_device())
        theirs = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(theirs, mine, group=self.group)
        return [bytes(row) for row in torch.stack(theirs).tolist()]

    def gather_objects(self, item: T) -> list[T]:
        """``item`` of every rank, in rank order."""
        if self.group is None:
            return [item]
        items: list[Any] = [None] * self.world_size
        wire = self._wire_device()  # torch puts the bytes of objects on the current device
        with torch.cuda.device(wire) if wire.type == "cuda" else nullcontext():
            dist.all_gather_object(items, item, group=self.group)
        return items

    def _wire_device(self) -> torch.device:
        """The device of the small tensors of these collectives: under NCCL the GPU that this rank's model is on."""
        if "nccl" not in dist.get_backend(self.group):
            return torch.device("cpu")
        on_gpu = self.device is not None and self.device.type == "cuda"
        return self.device if on_gpu else torch.device("cuda", torch.cuda.current_device())  # type: ignore[return-value]


def world() -> Ranks:
    """All processes of the job."""
    return Ranks(dist.group.WORLD if dist.is_initialized() else None)


def say(ranks: Ranks, sentence: str) -> None:
    """Warns the user, once for all ranks; seen without any set-up of logging."""
    if ranks.rank == 0:
        log.warning(sentence)


def tell(ranks: Ranks, sentence: str) -> None:
    """Informs the user, once for all ranks: at INFO, and seen without any set-up of logging.

    Logging shows no INFO by itself. So where its set-up would drop the sentence, it is written to stderr, and never
    twice. Who sets the level of the logger "grass_dist" above INFO does not see it.
    """
    if ranks.rank != 0:
        return
    if log.isEnabledFor(logging.INFO) and log.hasHandlers():
        log.info(sentence)
    elif log.level <= logging.INFO and log.manager.disable < logging.INFO and not log.disabled:
        console = logging.StreamHandler()  # to sys.stderr as it is now; it reports its own errors
        console.handle(log.makeRecord(log.name, logging.INFO, __name__, 0, sentence, (), None))


def note(ranks: Ranks, sentence: str) -> None:
    """Logs at INFO, once for all ranks; seen by those who have set up logging for it."""
    if ranks.rank == 0:
        log.info(sentence)


def together(
    ranks: Ranks,
    work: Callable[[], T],
    must_agree: Mapping[str, Any] | Callable[[T], Mapping[str, Any]] | None = None,
    *,
    raise_as: type[GrassError] | None = None,
    others: type[GrassError] = GrassError,
    fix: str = SAME_START,
) -> T:
    """Does ``work`` on every rank. If it fails on one, every rank raises, and none goes on alone.

    Over the wire: one all-gather of what went wrong and of the values that must agree, up to a few kB from each rank.

    Args:
        must_agree: values that have to be equal on all ranks, by the names that an error shows; or a function that
            gives them for the result of ``work``.
        raise_as: every rank raises an error of this class, with the sentence of the first rank that failed. Without
            it a rank that failed raises its own error (an `OSError` as a `GrassError`), and the others name that rank.
        others: class of the error of those others.
        fix: what to do where values differ, for the sentence.

    Returns:
        The result of ``work`` on this rank.

    Raises:
        GrassError: ``work`` failed on a rank.
        RanksDisagree: names the first value that differs, and what two ranks have.
    """
    result: Any = None
    problem: Exception | None = None
    shown: dict[str, str] = {}
    try:
        result = work()
        values = must_agree(result) if callable(must_agree) else must_agree or {}
        shown = {name: repr(value) for name, value in values.items()}
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        problem = error
        if isinstance(error, OSError) and raise_as is None:
            problem = GrassError(f"{describe_error(error)}.")
            problem.__cause__ = error
    told = None
    if problem is not None:
        alone = raise_as is not None and (isinstance(problem, raise_as) or ranks.world_size == 1)
        told = describe_error(problem) if alone else f"rank {ranks.rank}: {describe_error(problem)}"
    reports = ranks.gather_objects((told, shown))
    if problem is not None and raise_as is None:
        if isinstance(problem, GrassError):
            problem.on_every_rank = True
        raise problem
    for text, _ in reports:
        if text:
            failure = (raise_as or others)(text)
            failure.on_every_rank = True
            raise failure from problem
    raise_if_ranks_differ([values for _, values in reports], fix)
    return result


def describe_error(error: BaseException) -> str:
    """What went wrong, in one line without a traceback; of an `OSError` without a full stop."""
    if isinstance(error, GrassError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the file system'}: {error.strerror}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def raise_if_ranks_differ(shown: Sequence[Mapping[str, str]], fix: str = SAME_START) -> None:
    """Compares what the ranks have shown, {name: value as text} in rank order.

    Raises:
        RanksDisagree: on every rank alike.
    """
    first = shown[0]
    for rank, values in enumerate(shown):
        for name, value in values.items():
            if value != first.get(name):
                here, there = shorten(value, 120), shorten(str(first.get(name)), 120)
                raise RanksDisagree(f"{name} is {here} on rank {rank} and {there} on rank 0; {fix}.")
