"""The backend of a ZeRO optimizer: the probe's reductions are here, the training's are DeepSpeed's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from grass_dist.backends.host_sums import HostSums
from grass_dist.backends.zero.groups import Group, groups_of, numel_of, zero_shard
from grass_dist.backends.zero.narrow import NarrowZero
from grass_dist.errors import GrassError
from grass_dist.method.interfaces import Arrived, GradientHooks, GradientSink
from grass_dist.method.measurement import norms
from grass_dist.model.discovery import Unit
from grass_dist.model.experts import give_idle_experts_zeros
from grass_dist.model.sharding import Sharding
from grass_dist.model.units import GradientHook
from grass_dist.ranks import together

_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # its name from torch 2.13 on


class _Bucket:
    """The gradients of one layer, in one flat buffer that is reduce-scattered in the probe."""

    def __init__(self, unit: Unit, world_size: int) -> None:
        self.unit = unit
        self.starts, numel = [], 0
        for _, param in unit.params:
            self.starts.append(numel)
            numel += numel_of(param)
        self.padded = -(-numel // world_size) * world_size
        self.missing = set(range(len(unit.params)))
        self.flat: torch.Tensor | None = None
        self.shard: torch.Tensor | None = None
        self.work: dist.Work | None = None

    def put(self, slot: int, grad: torch.Tensor, averaged_over: float) -> None:
        if self.flat is None:
            self.flat = torch.zeros(self.padded, dtype=torch.float32, device=grad.device)
        view = self.flat.narrow(0, self.starts[slot], grad.numel())
        view.copy_(grad.reshape(-1)).mul_(1 / averaged_over)
        self.missing.discard(slot)

    def send(self, group: dist.ProcessGroup | None, world_size: int, device: torch.device) -> int:
        """Begins the reduce-scatter; gives the bytes that this rank puts into it."""
        flat = self.flat = self.flat if self.flat is not None else torch.zeros(self.padded, device=device)
        if world_size == 1:
            self.shard = flat
            return 0
        self.shard = torch.empty(self.padded // world_size, dtype=flat.dtype, device=flat.device)
        self.work = _reduce_scatter(self.shard, flat, group=group, async_op=True)
        return flat.nbytes

    def take(self) -> torch.Tensor:
        """This rank's shard of the average, after waiting for it; starts again."""
        if self.work is not None:
            self.work.wait()
        assert self.shard is not None
        shard = self.shard
        self.flat = self.shard = self.work = None
        self.missing = set(range(len(self.unit.params)))
        return shard


class ZeroSharding(Sharding):
    """ZeRO-3 cuts each flattened parameter into equal shards; stages 1 and 2 leave it whole on every rank.

    Partitions of states are not a parameter's but a group's: `groups.extents` says where they lie.
    """

    def counts(self, param: nn.Parameter) -> bool:
        return hasattr(param, "ds_tensor") or self.ranks.rank == 0

    def shard_of(self, param: nn.Parameter) -> torch.Tensor:
        if not hasattr(param, "ds_tensor"):
            return param.detach()
        shard = zero_shard(param)
        return shard.detach()[: max(0, min(shard.numel(), numel_of(param) - self.ranks.rank * shard.numel()))]

    def start_of(self, param: nn.Parameter) -> int:
        return min(self.ranks.rank * zero_shard(param).numel(), numel_of(param)) if hasattr(param, "ds_tensor") else 0

    def replicates(self, param: nn.Parameter) -> bool:
        return not hasattr(param, "ds_tensor")


class ZeroBackend(GradientHooks):
    """The way of a gradient under ZeRO.

    In training DeepSpeed's hooks take it, reduce it and keep this rank's part; `gradients_ready` reads them before
    they are clipped. In a probe DeepSpeed trains nothing, and the hooks here take a layer's gradient as soon as it is
    whole: one reduce-scatter of 4 bytes an element for each micro-batch, under the backward of the layer below; then
    its sum of squares, and it is freed. With gradient accumulation the shards are summed in host memory, 4/N bytes an
    element. Under dynamic loss scaling one all-reduce of 8 bytes a probe step says whether a gradient overflowed.

    Args:
        model: the module that the engine wraps.
        zero: nothing of DeepSpeed's is constructed yet.
        sharding: over the data-parallel ranks.
        accumulation_steps: micro-batches of a step.
        stage: ZeRO stage, 1 to 3.
        wire_bytes: of an element of a parameter's gradient when DeepSpeed reduces it.
        sequence_ranks: that hold parts of one sequence (Ulysses); DeepSpeed sums gradients over them.
    """

    name = "deepspeed"

    def __init__(
        self,
        model: nn.Module,
        zero: NarrowZero,
        sharding: ZeroSharding,
        accumulation_steps: int,
        stage: int,
        wire_bytes: Callable[[nn.Parameter], int],
        sequence_ranks: int = 1,
    ) -> None:
        self._model, self.zero, self.sharding = model, zero, sharding
        self.accumulation_steps, self.stage, self._wire_bytes = accumulation_steps, stage, wire_bytes
        self._sequence_ranks = sequence_ranks
        self._probing = self._measuring = False
        self._on: set[str] | None = None
        self._sums: HostSums | None = None
        self._ends_step: bool | None = None
        self._arrived_bytes = 0

    def attach(self, layers: Sequence[Unit], roles: Sequence[Unit], sink: GradientSink, arrived: Arrived) -> None:
        self._layers, self._units = list(layers), [*layers, *roles]
        self._sink, self._arrived = sink, arrived
        self._index = {unit.name: unit.index for unit in self._units}
        self._buckets = {unit.name: _Bucket(unit, self.ranks.world_size) for unit in layers}
        self._order = [self._buckets[unit.name] for unit in reversed(layers)]  # in which the backward finishes them
        self._device = layers[0].params[0][1].device
        self._sent = self._micro_batch = 0
        self._squares: list[torch.Tensor] = []
        self._hooks = [
            param.register_post_accumulate_grad_hook(GradientHook(self._on_gradient, unit.name, slot))
            for unit in self._units
            for slot, (_, param) in enumerate(unit.params)
        ]
        if self.stage < 3:  # which gathers them as one, and knows of each
            self._hooks += give_idle_experts_zeros(self._model, layers)

    def before_read(self) -> None:
        """Ends what DeepSpeed prefetches past the end of an evaluation: `GatheredParameters` refuses it."""
        if self.stage == 3:
            self.zero.empty_partition_cache()

    def detach(self) -> None:
        """Takes the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def set_trainable(self, units: Sequence[Unit], *, probing: bool, measuring: bool) -> None:
        on = {unit.name for unit in units}
        for unit in self._units:
            for _, param in unit.params:
                param.requires_grad_(unit.name in on)
                param.grad = None
        self._on = on
        self._probing, self._measuring = probing, measuring
        if probing:
            self.zero.rest(self._stand_in())
            if self._sums is not None:
                self._sums.clear()
            elif self.accumulation_steps > 1 or self._ends_step is False:
                self._make_sums()
        else:
            self._sums = None
            self.zero.narrow(groups_of(units, self.zero.param_groups))

    def accumulate(self, ends_step: bool | None) -> bool | None:
        """Tells, before a backward, whether its gradients end a step; None lets the micro-batches be counted again.

        All ranks call it alike. Returns what was told before.

        Raises:
            GrassError: a rank lacks the host memory for the sums of a probe.
        """
        before, self._ends_step = self._ends_step, ends_step
        if ends_step is False and self._probing and self._sums is None:
            together(self.ranks, self._make_sums)
        return before

    def _make_sums(self) -> None:
        shapes = {name: torch.Size([b.padded // self.ranks.world_size]) for name, b in self._buckets.items()}
        self._sums = HostSums(shapes, self._device)

    def finish_gradients(self) -> None:
        """DeepSpeed has made them final at the accumulation boundary."""

    def verify(self) -> None:
        """Raises if the model's trainable parameters are not those that were set here."""
        if self._on is None:  # before the first draw
            return
        for unit in self._units:
            for name, param in unit.params:
                if param.requires_grad != (unit.name in self._on):
                    raise GrassError(
                        f"requires_grad of {name} was set to {param.requires_grad} after initialize; grass_dist "
                        "freezes and unfreezes the layers itself: leave requires_grad alone, or freeze parameters for "
                        "good before initialize."
                    )

    # --- training

    def gradients_ready(self) -> None:
        """Reads DeepSpeed's averaged gradients in a step, before they are clipped."""
        self.verify()
        once, measured = 0, list[tuple[Group, torch.Tensor]]()
        for i, group in enumerate(self.zero.groups):
            once += sum(map(self._bytes_of, group.params))
            if self._measuring and group.unit.index is not None:
                measured += [(group, part) for part in self.zero.partition_grads_of(i)]
        of: dict[tuple[int, int], list[torch.Tensor]] = {}
        for (group, _), norm in zip(measured, norms([part for _, part in measured]), strict=True):
            assert group.unit.index is not None
            of.setdefault((group.unit.index, group.slot), []).append(norm)
        for place, parts in of.items():
            self._sink(*place, torch.linalg.vector_norm(torch.stack(parts)) / float(self.zero.loss_scale))
        arrived, self._arrived_bytes = self._arrived_bytes, 0
        if self.ranks.world_size > 1:  # ZeRO-1 reduces once a step, the others each micro-batch
            self.bytes_reduced += arrived if self.stage >= 2 else once

    def _bytes_of(self, param: nn.Parameter) -> int:
        return numel_of(param) * self._wire_bytes(param)

    # --- probe

    def _on_gradient(self, name: str, slot: int, param: nn.Parameter) -> None:
        if param.grad is None and self._probing:  # its output had no part in the loss
            return
        self._arrived(self._index[name])
        if not self._probing:
            self._arrived_bytes += self._bytes_of(param)
            return
        grad, param.grad = param.grad, None
        assert grad is not None
        bucket = self._buckets[name]
        if slot not in bucket.missing:  # the next micro-batch, after one in which some parameters took no part
            self._send_rest()
        bucket.put(slot, grad, self.ranks.world_size / self._sequence_ranks)
        self._send(lambda bucket: not bucket.missing)

    def _send(self, ready: Callable[[_Bucket], bool]) -> None:
        while self._sent < len(self._order) and ready(self._order[self._sent]):
            self.bytes_reduced += self._order[self._sent].send(self.ranks.group, self.ranks.world_size, self._device)
            self._sent += 1
            if self._sent > 1:  # two layers' gradients are held: this one's and the next one's
                self._deliver(self._order[self._sent - 2])
        if self._sent == len(self._order):
            self._deliver(self._order[-1])
            self._sent = 0
            self._micro_batch += 1

    def _send_rest(self) -> None:
        if self._sent or any(bucket.flat is not None for bucket in self._order):
            self._send(lambda _: True)

    def _deliver(self, bucket: _Bucket) -> None:
        shard, unit = bucket.take(), bucket.unit
        if self._sums is not None:
            counted = self._micro_batch == self.accumulation_steps - 1
            last = counted if self._ends_step is None else self._ends_step
            whole = self._sums.add(unit.name, shard, last=last)
            if whole is None:
                return
            shard = whole
        self._report(unit, shard)

    def _report(self, unit: Unit, shard: torch.Tensor) -> None:
        assert unit.index is not None
        norm = norms([shard])[0] / float(self.zero.loss_scale)
        self._squares.append(norm.square())
        if self._measuring:
            self._sink(unit.index, 0, norm)

    def rest_step(self) -> bool:
        """Ends a step in which nothing trains. Returns whether a gradient overflowed on some rank."""
        self._send_rest()
        if self._sums is not None:
            for name in self._sums.pending():
                self._report(self._buckets[name].unit, self._sums.take(name))
        self._micro_batch = 0
        squares, self._squares = self._squares, []
        if not (self.zero.dynamic_loss_scale and squares):
            return False
        return not torch.isfinite(self.ranks.sum_over_ranks(torch.stack(squares).sum())).item()

    def _stand_in(self) -> Group:
        smallest = min(self._layers[0].params, key=lambda item: numel_of(item[1]))
        [group] = groups_of([Unit("stand-in", None, (smallest,))], self.zero.param_groups)
        return group
