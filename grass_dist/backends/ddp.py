"""DistributedDataParallel: the wrapper stays, its reducer rests, and the trainable layers are reduced here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grass_dist.backends.base import HookedBackend, device_of
from grass_dist.errors import UnsupportedModel
from grass_dist.method.interfaces import Arrived, GradientSink
from grass_dist.method.measurement import sum_of_squares
from grass_dist.model.discovery import Unit
from grass_dist.model.sharding import Sharding
from grass_dist.ranks import Ranks


class _Bucket:
    """The gradients of one unit (and dtype), averaged over the ranks by one all-reduce."""

    def __init__(self, unit: Unit, slots: Sequence[int], number: int) -> None:
        self.unit, self.number = unit, number
        self.params = {slot: unit.params[slot][1] for slot in slots}
        self.numel = sum(p.numel() for p in self.params.values())
        self.flat: torch.Tensor | None = None
        self.missing = set(slots)
        self.work: dist.Work | None = None

    def put(self, slot: int, grad: torch.Tensor | None, world_size: int) -> None:
        """Copies ``grad / world_size`` in (zeros for None) and makes the parameter's ``.grad`` a view of it."""
        param = self.params[slot]
        assert self.work is None, "a bucket that is being reduced takes no gradient"
        if self.flat is None:
            self.flat = torch.empty(self.numel, dtype=param.dtype, device=param.device)
        start = sum(p.numel() for s, p in self.params.items() if s < slot)
        view = self.flat.narrow(0, start, param.numel()).view(param.shape)
        if grad is None:
            view.zero_()
        elif grad.dtype == view.dtype:
            torch.mul(grad, 1 / world_size, out=view)
        else:
            view.copy_(grad / world_size)
        param.grad = view
        self.missing.discard(slot)


def chunk(numel: int, ranks: int) -> int:
    """Entries of a part, when ``numel`` are divided among ``ranks``: the last parts may be shorter, or empty."""
    return -(-numel // ranks)


def part_of(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """The part of ``rank``, flat; shares the memory of a contiguous ``tensor``."""
    size = chunk(tensor.numel(), ranks)
    start = min(rank * size, tensor.numel())
    return tensor.reshape(-1)[start : start + size]


def pack(params: Sequence[torch.Tensor], rank: int, ranks: int) -> torch.Tensor:
    """The parts of ``rank``, one after the other, each padded to a `chunk`, so that all ranks send as much."""
    pieces = []
    for param in params:
        part = part_of(param.detach(), rank, ranks)
        pieces += [part, part.new_zeros(chunk(param.numel(), ranks) - part.numel())]
    return torch.cat(pieces)


def unpack(params: Sequence[torch.Tensor], packed: torch.Tensor, ranks: int) -> None:
    """Copies what `pack` made on all ranks, ``packed`` in rank order, into ``params``."""
    rows, start = packed.view(ranks, -1), 0
    for param in params:
        flat, size = param.detach().view(-1), chunk(param.numel(), ranks)
        full = flat.numel() // size if size else 0
        flat[: full * size].view(full, size).copy_(rows[:full, start : start + size])
        if rest := flat.numel() - full * size:
            flat[full * size :].copy_(rows[full, start : start + rest])
        start += size


def by_dtype(unit: Unit) -> Iterator[list[int]]:
    """Slots of the parameters of each dtype of ``unit``, in their order."""
    for dtype in dict.fromkeys(p.dtype for _, p in unit.params):
        yield [slot for slot, (_, p) in enumerate(unit.params) if p.dtype == dtype]


class _Gather:
    """The updated parts of parameters of one dtype on their way to all ranks, by one all-gather."""

    def __init__(self, params: Sequence[nn.Parameter], ranks: Ranks) -> None:
        self.params, self.ranks = list(params), ranks.world_size
        self.mine = pack(self.params, ranks.rank, self.ranks)
        self.packed = self.mine.new_empty(self.ranks * self.mine.numel())
        self.work = dist.all_gather_into_tensor(self.packed, self.mine, group=ranks.group, async_op=True)

    def finish(self) -> None:
        assert self.work is not None
        self.work.wait()
        unpack(self.params, self.packed, self.ranks)


class DdpSharding(Sharding):
    """Every rank has the whole model, and from `divide_states` on one of N equal parts of the states.

    Each rank then updates its part of every flattened parameter and keeps the state of that; `publish` brings the
    weights together. Over the wire, for each step of training: one all-gather a trainable unit (and dtype) of its
    weights' bytes, a parameter padded to a multiple of N entries.
    """

    def divide_states(self, units: Sequence[Unit]) -> None:
        if self.ranks.world_size == 1:
            return
        if odd := [name for unit in units for name, p in unit.params if not p.is_contiguous()]:
            raise UnsupportedModel(
                f"{len(odd)} parameters are not contiguous in memory ({odd[0]}, ...), so their states cannot be "
                "divided among the ranks; make them contiguous, or pass GrassOptimizer shard_states=False."
            )
        self.part = (self.ranks.rank, self.ranks.world_size)

    def state_shard(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.part[1] == 1 else part_of(tensor, *self.part)

    def state_start_of(self, param: nn.Parameter) -> int:
        part, parts = self.part
        return min(part * chunk(param.numel(), parts), param.numel())

    def publish(self, units: Sequence[Unit]) -> None:
        """Gathers what the ranks have updated. Two units' weights are on their way, and in memory twice, at a time."""
        if self.part[1] == 1:
            return
        waiting: deque[_Gather] = deque()
        for unit in units:  # in the same order on all ranks
            for slots in by_dtype(unit):
                if len(waiting) == 2:
                    waiting.popleft().finish()
                waiting.append(_Gather([unit.params[slot][1] for slot in slots], self.ranks))
        for gather in waiting:
            gather.finish()


class DdpBackend(HookedBackend):
    """DDP whose trainable set may change between any two steps.

    DDP's own reducer is fixed to the parameters of its construction and would wait for the frozen ones for ever, or
    search the graph for them at every step (``find_unused_parameters``). So while DDP's forward runs it is told that
    this micro-batch does not synchronise, which leaves its reducer at rest, and the hooks here do its work for the
    trainable layers alone:

    1. A parameter's gradient is ready: it is copied into its layer's flat bucket, divided by the world size.
    2. A layer's bucket is full, and those of the layers above have been sent: one asynchronous all-reduce, under the
       backward of the layers below. The order is that of the layers, so it is the same on all ranks.
    3. The last bucket has been sent: all are waited for. ``param.grad`` are views of the buckets.

    Over the wire, for each synchronising micro-batch: an all-reduce of the trainable parameters' bytes. ``no_sync()``
    is honoured. A parameter that took no part in a forward gets a zero gradient.
    """

    name = "ddp"

    @staticmethod
    def knows(model: nn.Module) -> bool:
        return isinstance(model, DistributedDataParallel)

    def __init__(self, model: nn.Module, accumulation_steps: int) -> None:
        assert isinstance(model, DistributedDataParallel)
        super().__init__(model, accumulation_steps, DdpSharding(Ranks(model.process_group, device_of(model))))
        if model.static_graph:
            raise UnsupportedModel(
                "DistributedDataParallel(static_graph=True) expects every step to train the same parameters; "
                "leave static_graph out."
            )
        self._sync = True
        self._handles += [
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._after_forward, always_call=True),
        ]
        self._all_buckets: list[_Bucket] = []
        self._order: list[_Bucket] = []
        self._sent = 0

    def attach(self, layers: Sequence[Unit], roles: Sequence[Unit], sink: GradientSink, arrived: Arrived) -> None:
        super().attach(layers, roles, sink, arrived)
        tail = [u for u in roles if u.name != "embeddings"]
        head = [u for u in roles if u.name == "embeddings"]
        for unit in [*reversed(tail), *reversed(layers), *head]:  # the order in which the backward finishes them
            self._all_buckets += [_Bucket(unit, slots, number) for number, slots in enumerate(by_dtype(unit))]
        self._bucket_of = {(b.unit.name, slot): b for b in self._all_buckets for slot in b.params}

    def set_trainable(self, units: Sequence[Unit], *, probing: bool, measuring: bool) -> None:
        super().set_trainable(units, probing=probing, measuring=measuring)
        on = {unit.name for unit in units}
        self._order = [b for b in self._all_buckets if b.unit.name in on]

    def finish_gradients(self) -> None:
        super().finish_gradients()
        held = any(p.grad is not None for bucket in self._order for p in bucket.params.values())
        if self._begun() or (held and not self._sync):  # the last backward waits for a gradient, or was no_sync
            self._complete()
        self._sync = True  # all is reduced: clipping and the step both come here

    def _begun(self) -> bool:
        """Whether a backward left buckets that wait for a parameter without a gradient."""
        return self._sent > 0 or any(bucket.flat is not None for bucket in self._order)

    def _complete(self) -> None:
        for bucket in self._order[self._sent :]:
            for slot in sorted(bucket.missing):
                bucket.put(slot, bucket.params[slot].grad, self.ranks.world_size)
        self._send_full_buckets()

    def _before_forward(self, ddp: nn.Module, _: object) -> None:
        self._user_sync = ddp.require_backward_grad_sync
        if torch.is_grad_enabled():
            if self._begun():  # before this micro-batch adds to gradients that are being reduced
                self._complete()
            self._sync = bool(self._user_sync)
        ddp.require_backward_grad_sync = False  # type: ignore[assignment]

    def _after_forward(self, ddp: nn.Module, *_: object) -> None:
        ddp.require_backward_grad_sync = self._user_sync

    def _reduce(self, unit: Unit, slot: int, param: nn.Parameter, grad: torch.Tensor) -> None:
        if not (self._sync or self._probing):
            return
        self._bucket_of[unit.name, slot].put(slot, grad, self.ranks.world_size)
        self._send_full_buckets()

    def _send_full_buckets(self) -> None:
        while self._sent < len(self._order) and not self._order[self._sent].missing:
            bucket = self._order[self._sent]
            assert bucket.flat is not None
            bucket.work = dist.all_reduce(bucket.flat, group=self.ranks.group, async_op=True)
            self.bytes_reduced += bucket.flat.nbytes
            self._sent += 1
            # A probe, and an update in the backward, hold two layers' gradients: this one's and the next one's.
            if (self._probing or self._on_final is not None) and self._sent > 1:
                self._deliver(self._order[self._sent - 2])
        if self._sent == len(self._order):
            for bucket in self._order:
                self._deliver(bucket)
            self._sent = 0

    def _deliver(self, bucket: _Bucket) -> None:
        if bucket.work is None or bucket.flat is None:
            return
        bucket.work.wait()
        if self._measuring and bucket.unit.index is not None:
            # Every rank has the whole average, and adds 1/N of its sum: so every rank's measurements are the same, and
            # those that rank 0 saves (as Trainer does) are enough to resume from.
            self._sink(bucket.unit.index, bucket.number, sum_of_squares(bucket.flat) / self.ranks.world_size)
        bucket.work = bucket.flat = None
        bucket.missing = set(bucket.params)
        if self._probing:
            for param in bucket.params.values():
                param.grad = None
        self._is_final(bucket.unit, bucket.params)
