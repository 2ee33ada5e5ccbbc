"""DistributedDataParallel: the wrapper stays, its reducer rests, and the trainable layers are reduced here."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from grass_dist.backends.base import TWICE, HookedBackend, device_of
from grass_dist.backends.dtensors import DTensorSharding, dtensor_of
from grass_dist.errors import ConfigError, GrassError, UnsupportedModel
from grass_dist.method.interfaces import Arrived, GradientSink
from grass_dist.method.measurement import norms
from grass_dist.model.compiled import is_compiled
from grass_dist.model.discovery import Unit
from grass_dist.model.units import shown_names
from grass_dist.ranks import Ranks, say


class _Bucket:
    """The gradients of one unit (and dtype), averaged over the ranks by one all-reduce.

    After the gradients there is one element for each parameter: the number of ranks that have used it.
    """

    def __init__(self, unit: Unit, slots: Sequence[int], number: int, device: torch.device | None) -> None:
        self.device = device  # where gradients are; None: where the parameters are
        self.unit, self.number = unit, number
        self.params = {slot: unit.params[slot][1] for slot in slots}
        self.numel = sum(p.numel() for p in self.params.values())
        self.flat: torch.Tensor | None = None
        self.missing = set(slots)
        self.unused: dict[int, torch.Tensor | None] = {}  # gradients of parameters that this rank has not used
        self.work: dist.Work | None = None

    def put(self, slot: int, grad: torch.Tensor | None, world_size: int, *, used: bool) -> None:
        """Copies ``grad / world_size`` in (zeros for None) and makes the parameter's ``.grad`` a view of it."""
        param = self.params[slot]
        assert self.work is None, "a bucket that is being reduced takes no gradient"
        if self.flat is None:
            self.flat = torch.empty(
                self.numel + len(self.params), dtype=param.dtype, device=self.device or param.device
            )
            self.flat[self.numel :].fill_(1)
        if not used:
            self.unused[slot] = param.grad
            self.flat[self.numel + list(self.params).index(slot)] = 0
        start = sum(p.numel() for s, p in self.params.items() if s < slot)
        view = self.flat.narrow(0, start, param.numel()).view(param.shape)
        if grad is None:
            view.zero_()
        elif grad.dtype == view.dtype:
            torch.mul(grad, 1 / world_size, out=view)
        else:
            view.copy_(grad / world_size)
        if param.device == view.device:  # in a probe, weights that have no gradient may rest in host memory
            param.grad = view
        self.missing.discard(slot)

    def take(self) -> torch.Tensor:
        """The averages, flat, when they are there; a parameter that no rank has used gets back the ``.grad`` that it
        had. The host waits for the device if this rank has not used a parameter. Starts again.
        """
        assert self.work is not None and self.flat is not None
        self.work.wait()
        flat, counts = self.flat.split([self.numel, len(self.params)])
        if self.unused:
            for slot, count in zip(self.params, counts.tolist(), strict=True):
                if not count:
                    self.params[slot].grad = self.unused[slot]
        self.work = self.flat = None
        self.missing = set(self.params)
        self.unused.clear()
        return flat


def chunk(shape: torch.Size, ranks: int) -> int:
    """Rows of a part, when a tensor is divided among ``ranks``: the last parts may be shorter, or empty."""
    return -(-shape[0] // ranks)


def part_of(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """The rows of ``rank``, as ``Shard(0)`` of a DTensor has them; all of a 0-dim ``tensor``. Shares its memory."""
    if tensor.ndim == 0:
        return tensor
    size = chunk(tensor.shape, ranks)
    start = min(rank * size, tensor.shape[0])
    return tensor[start : start + size]


def pack(params: Sequence[torch.Tensor], rank: int, ranks: int) -> torch.Tensor:
    """The parts of ``rank``, one after the other, each padded to a `chunk`, so that all ranks send as much.

    A 0-dim parameter is left out: every rank updates the whole of it.
    """
    pieces = [params[0].new_empty(0)]
    for param in params:
        if param.ndim:
            part = part_of(param.detach(), rank, ranks)
            lacking = (chunk(param.shape, ranks) - part.shape[0]) * param.shape[1:].numel()
            pieces += [part.reshape(-1), part.new_zeros(lacking)]
    return torch.cat(pieces)


def unpack(params: Sequence[torch.Tensor], packed: torch.Tensor, ranks: int) -> None:
    """Copies what `pack` made on all ranks, ``packed`` in rank order, into ``params``."""
    rows, start = packed.view(ranks, -1), 0
    for param in params:
        if not param.ndim:
            continue
        flat, size = param.detach().view(-1), chunk(param.shape, ranks) * param.shape[1:].numel()
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


class DdpSharding(DTensorSharding):
    """Every rank has the whole model, and from `divide_states` on one of N parts of the states.

    Each rank then updates its rows of every parameter and keeps the state of these; `publish` brings the weights
    together. Over the wire, for each step of training: one all-gather a trainable unit (and dtype) of its weights'
    bytes, a parameter padded to a multiple of N rows.
    """

    part = (0, 1)
    """(i, n): `state_shard` gives part i of n."""

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
        if param.ndim == 0:
            return 0
        part, parts = self.part
        return min(part * chunk(param.shape, parts), param.shape[0]) * param.shape[1:].numel()

    def keeps_whole_state(self, param: nn.Parameter) -> bool:
        return self.part[1] == 1 or param.ndim == 0

    def as_dtensor(self, param: nn.Parameter, part: torch.Tensor) -> torch.Tensor:
        if self.keeps_whole_state(param):
            return part
        return dtensor_of(part, self._mesh, [Shard(0)], param)

    @cached_property
    def _mesh(self) -> DeviceMesh:
        assert self.ranks.group is not None
        return DeviceMesh.from_group(self.ranks.group, (self.ranks.device or torch.device("cpu")).type)

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


def refuse_join(
    divide_by_initial_world_size: bool = True, enable: bool = True, throw_on_early_termination: bool = False
) -> contextlib.AbstractContextManager[None]:
    """What `DistributedDataParallel.join` is while it trains by GRASS.

    Raises:
        GrassError: it is enabled.
    """
    return refuse_join_hook() if enable else contextlib.nullcontext()


def refuse_join_hook(**_: Any) -> NoReturn:
    """What `DistributedDataParallel.join_hook` is meanwhile, which `Join` calls on every rank before any work.

    Raises:
        GrassError: always.
    """
    raise GrassError(
        "DistributedDataParallel.join() does not work with GrassOptimizer: a rank without batches would take part in "
        "no draw and no update. Give all ranks as many batches: DataLoader(drop_last=True) with a DistributedSampler, "
        "for example."
    )


def _refuse_divided(ddp: DistributedDataParallel) -> None:
    """
    Raises:
        UnsupportedModel: tensor parallelism divides the model, so its parameters are other ones in each forward.
    """
    mesh: DeviceMesh | None = getattr(ddp, "device_mesh", None)
    part = mesh is not None and mesh.size() < dist.get_world_size()
    if part or any(isinstance(p, DTensor) for p in ddp.parameters()):
        raise UnsupportedModel(
            "DistributedDataParallel is around a model that parallelize_module divides, or on a part of the ranks by "
            "its device_mesh, and importances would be those of a part of each layer: shard the model by fully_shard "
            "over the mesh dimension of the data, after parallelize_module."
        )


def comm_hooks(ddp: nn.Module) -> list[str]:
    """Names of the hooks that were registered by ``register_comm_hook`` so far.

    Not documented: the attribute ``_comm_hooks``. Checked on torch 2.13; `tests/test_private_interfaces.py`
    fails when it changes.
    """
    return [getattr(hook, "__qualname__", str(hook)) for hook, _ in vars(ddp).get("_comm_hooks", ())]


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

    Over the wire, for each synchronising micro-batch: an all-reduce of the trainable parameters' bytes, and of one
    element for each of these parameters. ``no_sync()`` is honoured. A parameter that took no part in a forward counts
    as one of zero gradient if another rank has used it; its ``.grad`` stays as it was if none has, as under DDP with
    ``find_unused_parameters=True``. Gradients are averaged also if the module inside of DDP is called by itself.
    """

    name = "ddp"
    measures_alike = True

    @staticmethod
    def knows(model: nn.Module) -> bool:
        return isinstance(model, DistributedDataParallel)

    def __init__(self, model: nn.Module, accumulation_steps: int) -> None:
        assert isinstance(model, DistributedDataParallel)
        super().__init__(model, accumulation_steps, DdpSharding(Ranks(model.process_group, device_of(model))))
        _refuse_divided(model)
        if model.static_graph:
            raise UnsupportedModel(
                "DistributedDataParallel(static_graph=True) expects every step to train the same parameters; "
                "leave static_graph out."
            )
        self._sync = True
        self._kept: set[tuple[str, int]] = set()  # parameters with gradients under no_sync(), not yet reduced
        self._handles += [
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._after_forward, always_call=True),
        ]
        model.join, model.join_hook = refuse_join, refuse_join_hook  # type: ignore[method-assign]
        if not is_compiled(model.module):
            self._handles.append(model.module.register_forward_pre_hook(self._before_inner_forward))
        self._within = self._told = False
        self._all_buckets: list[_Bucket] = []
        self._order: list[_Bucket] = []
        self._sent = 0

    def check_others(self, names: Sequence[str]) -> None:
        """
        Raises:
            ConfigError: there are any: DDP's reducer is at rest, and the hooks here reduce what GRASS trains.
        """
        if names and self.ranks.world_size > 1:
            raise ConfigError(
                "params",
                shown_names(names),
                "these parameters of the model have requires_grad and are in no group, and under "
                "DistributedDataParallel nothing would average their gradients over the ranks",
                "pass them too, or freeze them, or train them in a module with a DistributedDataParallel of its own",
            )

    def detach(self) -> None:
        super().detach()
        for name in ("join", "join_hook"):
            vars(self.model).pop(name, None)

    def attach(self, layers: Sequence[Unit], roles: Sequence[Unit], sink: GradientSink, arrived: Arrived) -> None:
        super().attach(layers, roles, sink, arrived)
        late = ("embeddings", "others")  # the others may be anywhere, and what is not used holds up what follows
        tail, head = ([u for u in roles if (u.name in late) is is_late] for is_late in (False, True))
        for unit in [*reversed(tail), *reversed(layers), *head]:  # the order in which the backward finishes them
            for number, slots in enumerate(by_dtype(unit)):
                self._all_buckets.append(_Bucket(unit, slots, number, self.sharding.weights_come_to))
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
                used = (bucket.unit.name, slot) in self._kept
                bucket.put(slot, bucket.params[slot].grad, self.ranks.world_size, used=used)
        self._send_full_buckets()

    def restart(self) -> None:
        if self._begun():  # the other ranks may wait for these reductions
            self._complete()
        self._kept.clear()
        super().restart()

    def _before_forward(self, ddp: nn.Module, _: object) -> None:
        if self._of_a_copy:
            return
        assert isinstance(ddp, DistributedDataParallel)
        self._user_sync = ddp.require_backward_grad_sync
        self._begin_micro_batch(self._user_sync, communicates=ddp.will_sync_module_buffers())
        ddp.require_backward_grad_sync = False
        self._within = True

    def _after_forward(self, ddp: nn.Module, *_: object) -> None:
        if self._of_a_copy:
            return
        assert isinstance(ddp, DistributedDataParallel)
        ddp.require_backward_grad_sync = self._user_sync
        # As DDP sets it, by which its next forward broadcasts the buffers; it has just taken this one for no_sync().
        ddp.require_forward_param_sync = self._user_sync and torch.is_grad_enabled()
        self._within = False

    def _before_inner_forward(self, *_: object) -> None:
        if not (self._of_a_copy or self._within):  # the module is called past DDP
            self._begin_micro_batch(bool(self.model.require_backward_grad_sync))

    def _begin_micro_batch(self, sync: bool, *, communicates: bool = False) -> None:
        trains = torch.is_grad_enabled()
        if trains and not self._told and (hooks := comm_hooks(self.model)):
            self._told = True
            say(
                self.ranks,
                f"The communication hook {hooks[0]} of DistributedDataParallel is not called: GRASS reduces the "
                "gradients of the layers that train itself, in their own dtype.",
            )
        # Before this micro-batch adds to gradients that are being reduced, or DDP broadcasts buffers.
        if self._begun() and (trains or communicates):
            self._complete()
        if trains:
            self._sync = sync

    def _reduce(self, unit: Unit, slot: int, param: nn.Parameter, grad: torch.Tensor) -> None:
        if not (self._sync or self._probing):
            self._kept.add((unit.name, slot))
            return
        bucket = self._bucket_of[unit.name, slot]
        if slot not in bucket.missing:
            raise GrassError(
                f"{unit.params[slot][0]} got a second gradient while the first one waited to be reduced: call the "
                f"DistributedDataParallel module, or the one inside of it, and no module within that one. {TWICE}"
            )
        bucket.put(slot, grad, self.ranks.world_size, used=True)
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
            self._kept.clear()

    def _deliver(self, bucket: _Bucket) -> None:
        if bucket.work is None:
            return
        flat = bucket.take()
        measured = self._measuring and bucket.unit.index is not None
        norm = norms([flat])[0] if measured or self._probing else None
        if measured and norm is not None and bucket.unit.index is not None:
            # Every rank has the whole average (`measures_alike`): so every rank's measurements are the same, and those
            # that rank 0 saves (as Trainer does) are enough to resume from.
            self._sink(bucket.unit.index, bucket.number, norm)
        if self._probing and norm is not None:
            for param in bucket.params.values():
                param.grad = None
            self._mark.show(norm)
        self._is_final(bucket.unit, bucket.params)
