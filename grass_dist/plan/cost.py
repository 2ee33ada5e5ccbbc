"""Counts what a step costs: FLOPs, bytes on PCIe and on the wire, and seconds by lane with what is hidden.

Compute is counted as docs/plan.md says. A parameter takes, for each token, 2 FLOP for the forward, 2 for the gradients
of the activations in layers that a gradient passes through, and 2 for the gradients of the weights that train.
Attention, the output head, and the second forward of activation checkpointing come on top. Collectives go in rings, as
in `report.wire`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from grass_dist.method.flops import Work, step_flops
from grass_dist.plan.memory import WEIGHT_SLOTS, slots_of, states_of
from grass_dist.plan.pairs import BINS
from grass_dist.plan.runs import Method, PlannedRun, adapters_in, head_trains, lora_elements, trained_roles, traversed
from grass_dist.plan.shape import ModelShape, elements_in
from grass_dist.plan.speeds import Speeds
from grass_dist.report.wire import Sent, sent

LANES = ("compute", "update", "network", "network_hidden", "pcie", "pcie_hidden")
"""Parts of a `StepTime`."""
UPDATE_BYTES = 30
"""Bytes of GPU memory that AdamW reads and writes for each entry: master and moments both ways, gradient, weight."""


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that one step moves."""

    pcie: float
    """Bytes that a GPU copies each way, on average over a sampling interval."""
    within: float
    """Bytes that all ranks together send to ranks of their own host."""
    across: float
    """Bytes that all ranks together send to other hosts."""
    weights: float = 0.0
    """Bytes of weights that a GPU copies from host memory."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step, by lane. A lane's hidden part runs beside the compute."""

    compute: float
    update: float
    network: float
    network_hidden: float
    pcie: float
    pcie_hidden: float
    tokens: float
    """Tokens of all ranks."""

    @property
    def total(self) -> float:
        exposed = (self.network - self.network_hidden) + (self.pcie - self.pcie_hidden)
        return self.compute + self.update + exposed

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.total


def flops(shape: ModelShape, run: PlannedRun, method: Method) -> tuple[float, float]:
    """FLOP of one micro-batch on a rank: those of the forward, and those of the backward."""
    layers, f, tokens = shape.num_layers, traversed(shape, method), run.tokens
    matrices, attention, head, frozen = _multiplied(shape, run)
    adapters = tokens * (lora_elements(shape) * layers if method.name == "lora" else adapters_in(shape, method))
    share = 0.0 if method.name == "lora" else method.active_layers / layers
    return step_flops(
        Work(matrices + adapters, attention),
        Work(f * (matrices + adapters), f * attention),
        share * matrices + adapters,
        head=head,
        head_trains=head_trains(shape, method),
        frozen=frozen,
        recomputed=run.checkpointing,
    )


def _multiplied(shape: ModelShape, run: PlannedRun) -> tuple[float, float, float, float]:
    """Multiply-adds of the forward of a micro-batch: matrices of layers, attention, output head, what is frozen."""
    tokens, length, layers = run.tokens, run.seq_len, shape.num_layers
    if (pairs := shape.pairs) is None:
        # A causal query meets half of the keys on average; products with keys and with values.
        attention = length * shape.heads * shape.head_dim * layers * (1 if shape.causal else 2)
        return shape.layers_matrices * tokens, attention * tokens, shape.vocab * shape.hidden * tokens, 0.0
    wide = [s for s in shape.layers[0] if len(s) == 2 and pairs.single in s]  # they multiply the state of a residue
    of_single = sum(map(math.prod, wide))
    matrices, pairwise = pairs.multiplied(length, of_single, shape.layers_matrices // layers - of_single)
    attention = pairwise + 2 * length**2 * pairs.single
    frozen = elements_in(tuple(s for s in shape.frozen if len(s) == 2))
    each = run.micro_batch * layers
    return matrices * each, attention * each, BINS * pairs.pair * length * tokens, frozen * tokens


@dataclass(frozen=True, slots=True)
class _Wire:
    """Bytes that a rank puts into the collectives of one micro-batch, and into those at the end of the step."""

    gather_forward: float
    gather_backward: float
    reduce_layers: float
    """Bytes reduced while the backward runs."""
    reduce_last: float
    """Bytes left to reduce when the backward has ended."""
    gather_end: float
    """Updated weights that are gathered."""


def _wire(shape: ModelShape, run: PlannedRun, method: Method) -> _Wire:
    w, r = run.weight_bytes, run.reduce_bytes
    roles, f = trained_roles(shape, method), traversed(shape, method)
    layer = lora_elements(shape) if method.name == "lora" else shape.layer_numel
    layers = method.active_layers * layer
    inside = adapters_in(shape, method)
    tail = sum(roles.values()) - inside if run.backend in ("fsdp2", "hsdp") else roles.get("embeddings", 0)
    tail += inside if run.backend == "ddp" else 0  # one bucket of all adapters, the lowest layer's too
    early = layers + sum(roles.values()) - tail
    if run.backend in ("fsdp2", "hsdp", "zero3"):
        gather = w * (shape.layers_numel + inside) * f
        return _Wire(w * shape.numel, gather, r * early, r * tail, 0)
    return _Wire(0, 0, w * early, w * tail, w * (layers + sum(roles.values())))


def step_bytes(shape: ModelShape, run: PlannedRun, method: Method) -> StepBytes:
    """Bytes on PCIe and on the wire in a step."""
    weights = sum(_weight_bytes(shape, run, method))
    if run.gpus == 1:
        return StepBytes(_pcie_bytes(shape, run, method), 0.0, 0.0, weights)
    wire, m = _wire(shape, run, method), run.accumulation
    reduces = m if run.backend in ("zero2", "zero3") else 1
    reduced = reduces * (wire.reduce_layers + wire.reduce_last)
    gathered = m * (wire.gather_forward + wire.gather_backward) + wire.gather_end
    whole = run.backend in ("ddp", "zero1", "zero2")
    of_reduced, of_gathered = _sent_of_one(run.gpus, run.gpus_per_host, run.replicate, whole)
    within = reduced * of_reduced.within + gathered * of_gathered.within
    across = reduced * of_reduced.across + gathered * of_gathered.across
    return StepBytes(_pcie_bytes(shape, run, method), within, across, weights)


@lru_cache(maxsize=64)
def _sent_of_one(gpus: int, per_host: int, replicate: int, whole: bool) -> tuple[Sent, Sent]:
    """Counts what goes over all links for one byte that each rank reduces, and for one that it gathers."""
    hosts = np.arange(gpus) // per_host
    of_reduced = sent(1, hosts, replicate=replicate, whole=whole)
    return of_reduced, sent(0, hosts, replicate=replicate, whole=whole, gathered=1)


def _pcie_bytes(shape: ModelShape, run: PlannedRun, method: Method) -> float:
    """Bytes of states that move each way: all active ones in each step, or those that change at a switch."""
    if method.name != "grass" or run.offload == "none":
        return 0.0
    layer = states_of(shape, run, method)[1] / shape.num_layers
    gamma, total = method.active_layers, shape.num_layers
    if run.offload == "stream" and gamma > slots_of(shape, run, method):
        return gamma * layer
    return layer * gamma * (1 - gamma / total) / run.sampling_interval


def _weight_bytes(shape: ModelShape, run: PlannedRun, method: Method) -> tuple[float, float]:
    """Bytes of weights that a GPU copies from host memory in a step, for forwards and for backwards.

    The last layers of a forward are still in their slots when the backward begins. At a switch the layers that train
    from then on come once; that is counted with the forwards.
    """
    if not run.rests(method):
        return 0.0, 0.0
    w, total, gamma, f = run.weight_bytes, shape.num_layers, method.active_layers, traversed(shape, method)
    if run.backend == "zero3":  # the shard of each parameter, whenever it is gathered
        m = run.accumulation
        return m * w * shape.numel / run.shards, m * w * f * shape.layers_numel / run.shards
    layer = w * shape.layer_numel
    changed = gamma * (1 - gamma / total) / run.sampling_interval
    forward, backward = total - gamma, max(0.0, f * total - gamma - min(WEIGHT_SLOTS, total - gamma))
    return layer * (run.accumulation * forward + changed), layer * run.accumulation * backward


def step_time(shape: ModelShape, run: PlannedRun, method: Method, speeds: Speeds) -> StepTime:
    """Estimates the seconds of a step.

    Gathers run beside the compute, except the first layer's. Reductions run beside the backward, except those of the
    roles that the backward ends with. Updated weights (DDP, ZeRO-1 and 2) are gathered with nothing beside them. States
    move beside forward and backward; under "stream" those for which there is no slot move between the updates. Weights
    from host memory come beside the layer before, the first layer of a forward with nothing beside it.
    """
    reach, m = speeds.flop_per_s * speeds.flop_share, run.accumulation
    forward, backward = (flop / reach for flop in flops(shape, run, method))
    elements = states_of(shape, run, method)[0] / run.bytes_of_state
    if method.name == "grass":
        roles = sum(trained_roles(shape, method).values())
        elements = (method.active_layers * shape.layer_numel + roles) / run.state_shards
    update = UPDATE_BYTES * elements / speeds.device_bytes_per_s
    network, hidden = _network(shape, run, method, speeds, forward, backward)
    pcie, pcie_hidden = _pcie(shape, run, method, speeds, m * (forward + backward))
    came, came_hidden = _weights_time(shape, run, method, speeds, m * forward, m * backward)
    pcie, pcie_hidden = pcie + came, min(pcie_hidden + came_hidden, m * (forward + backward))
    tokens = run.gpus * m * run.tokens
    return StepTime(m * (forward + backward), update, network, hidden, pcie, pcie_hidden, tokens)


def _network(
    shape: ModelShape, run: PlannedRun, method: Method, speeds: Speeds, forward: float, backward: float
) -> tuple[float, float]:
    """Estimates the seconds of communication in a step, and how many of them the compute hides."""
    if run.gpus == 1:
        return 0.0, 0.0
    wire, layers, m = _wire(shape, run, method), shape.num_layers, run.accumulation
    in_forward = _ring(wire.gather_forward, layers + 1, 1, run, speeds)
    in_backward = _ring(wire.gather_backward, layers, 1, run, speeds)
    every = run.backend in ("zero2", "zero3")
    reduce = _reduce(wire.reduce_layers, method.active_layers, run, speeds)
    last = _reduce(wire.reduce_last, 1, run, speeds)
    end = _ring(wire.gather_end, method.active_layers + 1, 1, run, speeds)
    first = in_forward / (layers + 1)
    total = hidden = 0.0
    for reduces, times in ((True, m if every else 1), (False, 0 if every else m - 1)):
        beside = in_backward + (reduce if reduces else 0.0)
        total += times * (in_forward + beside + (last if reduces else 0.0))
        hidden += times * (min(in_forward - first, forward) + min(beside, backward))
    return total + end, hidden


def _reduce(nbytes: float, calls: int, run: PlannedRun, speeds: Speeds) -> float:
    """Estimates the seconds to reduce ``nbytes`` of each rank."""
    whole = run.backend in ("ddp", "zero1", "zero2")
    seconds = _ring(nbytes, calls, 2 if whole else 1, run, speeds)
    if run.backend == "hsdp":
        # Each rank of a shard group sums its shard with its replicas; the rings of a host share its network.
        ranks = run.replicate
        crossing = speeds.across_bytes_per_s / run.ranks_per_host if run.num_hosts > 1 else speeds.within_bytes_per_s
        hop = speeds.across_latency_s if run.num_hosts > 1 else speeds.within_latency_s
        bandwidth = min(crossing, speeds.within_bytes_per_s)
        seconds += 2 * (ranks - 1) * (nbytes / run.shards / ranks / bandwidth + calls * hop)
    return seconds


def _ring(nbytes: float, calls: int, passes: int, run: PlannedRun, speeds: Speeds) -> float:
    """Estimates the seconds of ``calls`` collectives that carry ``nbytes``, in rings over a shard group.

    A shard group has all ranks, except under hsdp.
    """
    ranks = run.gpus // run.replicate
    if ranks == 1 or nbytes == 0:
        return 0.0
    hosts = -(-ranks // run.gpus_per_host)
    crossing = hosts if hosts > 1 else 0
    bandwidth = min(speeds.within_bytes_per_s, speeds.across_bytes_per_s) if crossing else speeds.within_bytes_per_s
    latency = crossing * speeds.across_latency_s + max(0, ranks - 1 - crossing) * speeds.within_latency_s
    return passes * (nbytes * (ranks - 1) / ranks / bandwidth + calls * latency)


def _pcie(shape: ModelShape, run: PlannedRun, method: Method, speeds: Speeds, compute: float) -> tuple[float, float]:
    """Estimates the seconds that copies run in a step (both ways at once), and how many of them the compute hides."""
    each = _pcie_bytes(shape, run, method) / speeds.pcie_bytes_per_s
    if not each:
        return 0.0, 0.0
    gamma, slots = method.active_layers, slots_of(shape, run, method)
    if run.offload == "stream" and gamma > slots:
        early = each * slots / gamma
        # Without a slot that is free a state waits for another's way out: in and out come one after the other.
        return early + 2 * (each - early), min(early, compute)
    # At a switch they run beside the two steps around it.
    return each, min(each, 2 * compute / run.sampling_interval)


def _weights_time(
    shape: ModelShape, run: PlannedRun, method: Method, speeds: Speeds, forward: float, backward: float
) -> tuple[float, float]:
    """Estimates the seconds in which weights come from host memory in a step, and how many of them are hidden."""
    ways = [nbytes / speeds.pcie_bytes_per_s for nbytes in _weight_bytes(shape, run, method)]
    first = ways[0] / shape.num_layers
    return sum(ways), min(ways[0] - first, forward) + min(ways[1], backward)
