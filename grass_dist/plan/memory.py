"""Computes the peak memory of a GPU and the pinned memory of a host, by a closed form over shapes.

A step has moments at which memory can peak. The closed form adds up what there is at each of them and takes the largest
sum, so the parts belong to one moment and add up. Every layer is taken to be as large as the largest, and the draw to
be the worst: the layers at the top, whose gradients exist while most activations still do.

Activations are those that transformers' Llama keeps from the forward for its backward with ``attention="sdpa"``. Per
token, a layer of width h, with q entries of queries, k of keys and of values, and i in the feed-forward, keeps for
weights of w bytes:

    two norms          each an fp32 copy of its input, 4 h, and one number; if trained the normed and the scaled, 2 w h
    attention          queries, keys, values, output: w (2 q + 2 k), and one fp32 number a head
    feed-forward       gate, up and the activated gate: 3 w i; if trained the product that goes down, w i

The output keeps what a norm keeps, and the log-probabilities in fp32. A frozen layer need not keep its inputs, and the
layers below the lowest one that trains keep nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from grass_dist.config import ADAPTERS, OffloadConfig, slot_count
from grass_dist.plan.runs import Method, PlannedRun, adapters_in, grass_config, lora_elements, trained_roles
from grass_dist.plan.shape import ModelShape, Shapes, elements_in
from grass_dist.states.joint_update import MOST_AT_ONCE

FRAGMENTATION_SHARE = 0.08
"""Share of what a step allocates and frees (gradients, activations, buffers) that is lost to fragmentation."""
WEIGHT_SLOTS = OffloadConfig().weight_slots
RUNTIME_BYTES = 0.8e9
"""Bytes that a process takes before it allocates any: CUDA context, kernels, cuBLAS workspace and NCCL's channels."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of the activations of one micro-batch on a rank."""

    trained_layer: float
    frozen_layer: float
    """A frozen layer that a gradient passes through."""
    kept_layer: float
    """Bytes that a layer keeps from forward to backward under activation checkpointing: its input."""
    head: float
    """Bytes of what comes after the layers, without the loss."""
    loss: float
    """Upper bound: log-probabilities and the gradients that the loss makes of them."""
    flow: float
    """Gradients of activations that pass through a layer in the backward."""


def activations_of(shape: ModelShape, run: PlannedRun) -> Activations:
    """Computes the activations by the closed form that the module describes, of a folding trunk by that of `pairs`."""
    if (pairs := shape.pairs) is not None:
        width, length = run.weight_bytes, run.seq_len
        kept = [pairs.kept(length, width, trained=trained) for trained in (True, False)]
        logits, loss = pairs.distogram(length, width)
        head = pairs.structure(length, width) + logits
        around = (pairs.inputs(length, width), head, loss, pairs.flow(length, width))
        return Activations(*(run.micro_batch * nbytes for nbytes in (*kept, *around)))
    w, h, i, tokens = run.weight_bytes, shape.hidden, shape.intermediate, run.tokens
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = w * (2 * queries + 2 * keys) + 4 * shape.heads
    inner = (3 if shape.gated else 2) * w * i
    frozen = 2 * (4 * h + 4) + attention + inner
    trained = frozen + 4 * w * h + (w * i if shape.gated else 0)
    head = 4 * h + 4 + 2 * w * h
    # The loss's backward holds the log-probabilities, their gradient and that of the logits, each in fp32.
    loss = 12 * shape.vocab
    if run.logits == "chunked":  # a chunk's in fp32 twice and in 16 bit twice, and the gradients of all hidden states
        loss = min(h, shape.vocab) * (8 + (2 * w if w < 4 else 0)) + w * h
    flow = w * (2 * h + 2 * i) + 4 * h
    return Activations(*(tokens * nbytes for nbytes in (trained, frozen, w * h, head, loss, flow)))


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on a GPU at the moment of the peak."""

    weights: float
    gradients: float
    states: float
    activations: float
    buffers: float
    """Buffers of communication (gathered layers, buckets) and of the update."""
    moment: str
    """The part of the step in which the peak is."""
    simulated: bool = False

    @property
    def allocated(self) -> float:
        """Returns what ``torch.cuda.max_memory_allocated`` counts."""
        return self.weights + self.gradients + self.states + self.activations + self.buffers

    @property
    def allowance(self) -> float:
        return FRAGMENTATION_SHARE * (self.gradients + self.activations + self.buffers)

    @property
    def runtime(self) -> float:
        return RUNTIME_BYTES

    @property
    def total(self) -> float:
        """Returns what the GPU must have, at least."""
        return self.allocated + self.allowance + self.runtime


PARTS = tuple(f.name for f in fields(Memory) if f.type == "float")


def weights_of(shape: ModelShape, run: PlannedRun, method: Method | None = None) -> float:
    """Bytes of the weights on a rank's device, between the moments at which layers are gathered.

    Args:
        method: None is one by which no weights rest in host memory.
    """
    around = sum(_held(shapes, run) for shapes in (*shape.roles.values(), shape.frozen))
    layers = sum(_held(layer, run) for layer in shape.layers)
    if method is not None and run.rests(method):
        longest = max(_held(layer, run) for layer in shape.layers)
        layers = longest * min(method.active_layers + WEIGHT_SLOTS, shape.num_layers)
        if run.backend == "zero3":  # DeepSpeed takes all weights, and gathers from there
            around = layers = 0
    return run.weight_bytes * (around + layers) + _persistent(shape, run)


def resting_of(shape: ModelShape, run: PlannedRun, method: Method) -> float:
    """Bytes of the weights of a rank that rest in host memory."""
    if not run.rests(method):
        return 0.0
    units = (*shape.layers, *shape.roles.values(), shape.frozen) if run.backend == "zero3" else shape.layers
    return run.weight_bytes * sum(_held(unit, run) for unit in units)


def states_of(shape: ModelShape, run: PlannedRun, method: Method) -> tuple[float, float]:
    """Bytes of optimizer states on a rank: the most on the device, and in host memory (a buffer for each layer)."""
    size = run.bytes_of_state
    each = [size * _state_elements(layer, run) for layer in shape.layers]
    longest, roles = max(each), sum(size * n for n in _role_state_elements(shape, run, method))
    total, gamma = shape.num_layers, method.active_layers
    if method.name == "lora":
        return size * total * -(-lora_elements(shape) // run.state_shards), 0.0
    if method.name == "full":
        return sum(each) + roles, 0.0
    if method.name == "lisa":
        return gamma * longest + roles, 0.0
    if run.offload == "none":
        return sum(each) + roles, 0.0
    return slots_of(shape, run, method) * longest + roles, sum(each)


def slots_of(shape: ModelShape, run: PlannedRun, method: Method) -> int:
    """Number of layers whose states are on the device at a time, where states move."""
    return slot_count(grass_config(run, method), run.offload, shape.num_layers)


def gradients_of(shape: ModelShape, run: PlannedRun, method: Method) -> float:
    """Bytes of reduced gradients on a rank at the end of a backward."""
    layer, roles = _gradient_elements(shape, run, method)
    return run.weight_bytes * (method.active_layers * layer + roles)


def host_bytes(shape: ModelShape, run: PlannedRun, method: Method) -> float:
    """Pinned memory of a host: the states of all layers of its ranks, weights that rest there, and the sums of a probe
    with accumulation.
    """
    states = states_of(shape, run, method)[1]
    probes = method.name == "grass" and run.accumulation > 1
    divided = run.gpus if run.backend.startswith("zero") else run.shards
    sums = 4 * shape.layers_numel / divided if probes else 0.0
    return run.ranks_per_host * (states + sums + resting_of(shape, run, method))


def zero_settings(shape: ModelShape, run: PlannedRun) -> dict[str, int | bool]:
    """Returns the ``zero_optimization`` that the plan counts with and writes, whose buckets are as long as a layer."""
    stage, layer = int(run.backend[-1]), max(shape.layer_numel, 10**6)
    common: dict[str, int | bool] = {"stage": stage, "overlap_comm": True, "reduce_bucket_size": layer}
    around = [elements_in(shapes) for name, shapes in shape.roles.items() if name != ADAPTERS]
    if stage < 3:
        return {**common, "allgather_bucket_size": layer}
    return {
        **common,
        "stage3_prefetch_bucket_size": layer,
        "stage3_param_persistence_threshold": 10 * shape.hidden,
        "stage3_max_live_parameters": 2 * layer + max(around, default=0),
        "stage3_max_reuse_distance": layer,
    }


def memory_of(shape: ModelShape, run: PlannedRun, method: Method) -> Memory:
    """Computes the peak on a rank by the closed form."""
    acts = activations_of(shape, run)
    counts = _Counts(shape, run, method, acts)
    weights, states = weights_of(shape, run, method), states_of(shape, run, method)[0]
    parts = [counts.loss(), counts.reducing(1), counts.reducing(method.active_layers), counts.recomputing()]
    parts += [counts.backward_end(), counts.update()]
    moments = [replace(part, weights=weights, states=states) for part in parts]
    if run.backend.startswith("zero"):
        masters = 4 * counts.trained / run.gpus
        moments.append(Memory(weights, 0.0, states, 0.0, masters, "switch to other layers"))
    return max(moments, key=lambda moment: moment.allocated)


class _Counts:
    """Counts what there is at each moment, without weights and states."""

    def __init__(self, shape: ModelShape, run: PlannedRun, method: Method, acts: Activations) -> None:
        self.shape, self.run, self.method = shape, run, method
        w, total, gamma = run.weight_bytes, shape.num_layers, method.active_layers
        self.inside = adapters_in(shape, method) / total  # adapters of a layer, which are in its group
        self.layer = shape.layer_numel
        self.roles = trained_roles(shape, method)
        self.layer_trained = lora_elements(shape) if method.name == "lora" else self.layer
        self.trained = gamma * self.layer_trained + sum(self.roles.values())
        head = self.roles.get("embeddings" if shape.tied else "lm_head", 0)
        self.head_grad = w * head
        of_each = _gradient_elements(shape, run, method, in_backward=True)
        self.reduced_layer, self.reduced_roles = (w * n for n in of_each)
        self.reduced_adapters = w * _held(shape.roles[ADAPTERS], run) if self.inside else 0
        trained, frozen = acts.trained_layer, acts.frozen_layer
        if self.inside:  # which need the inputs of all matrices, and keep what they have made of them
            matrices = sum(len(s) == 2 for s in max(shape.layers, key=elements_in))
            trained = frozen = trained + w * run.tokens * run.adapters * matrices
        self.acts = replace(acts, trained_layer=trained, frozen_layer=frozen)
        if run.checkpointing:
            self.layers = total * acts.kept_layer
        else:
            self.layers = gamma * trained + (total - gamma) * frozen
        around = sum(elements_in(shapes) for name, shapes in shape.roles.items() if name != ADAPTERS)
        self.gathered_root = w * around if run.backend in ("fsdp2", "hsdp") else 0
        self.layer += self.inside
        self.held = self._accumulated()

    def _accumulated(self) -> float:
        """Bytes of gradients that exist during a whole backward: sums of earlier micro-batches, or ZeRO-3's buffer."""
        if self.run.accumulation == 1 and self.run.backend != "zero3":
            return 0.0
        if self.run.backend in ("fsdp2", "hsdp"):
            return self.run.reduce_bytes * self.trained  # unsharded, in the dtype of the reduction
        return self.reduced_layer * self.method.active_layers + self.reduced_roles

    def loss(self) -> Memory:
        """The loss has been taken; the backward begins."""
        acts = self.layers + self.acts.head + self.acts.loss
        buffers = self.gathered_root + self._buckets()
        if self.run.logits == "chunked":  # which forms the head's gradient by now
            buffers += self.head_grad
        return Memory(0, self.held, 0, acts, buffers, "loss")

    def reducing(self, done: int) -> Memory:
        """The gradients of trained layer number ``done`` from the top are being reduced."""
        w, r, shards = self.run.weight_bytes, self.run.reduce_bytes, self.run.shards
        acts = self.layers + self.acts.flow
        acts -= done * (self.acts.kept_layer if self.run.checkpointing else self.acts.trained_layer)
        buffers = self.gathered_root + self.head_grad + self._buckets()
        if self.run.backend in ("fsdp2", "hsdp"):
            buffers += 2 * w * self.layer + (w + r * (1 + 1 / shards)) * (self.layer_trained + self.inside)
        elif self.run.backend in ("zero3", "ddp", "single"):
            buffers += w * self.layer_trained if self.run.backend == "zero3" else w * self._largest()
        # DDP's bucket has those of all adapters as soon as the first one comes.
        share = 1.0 if self.run.backend == "ddp" else done / self.shape.num_layers
        gradients = max(self.held, done * self.reduced_layer + share * self.reduced_adapters)
        return Memory(0, gradients, 0, acts, buffers, "backward")

    def recomputing(self) -> Memory:
        """The backward is within a layer whose activations all exist; FSDP2 reduces the gradients of the one above."""
        again = self.acts.trained_layer if self.run.checkpointing else 0.0
        buffers = self.gathered_root + self.head_grad + self._buckets()
        acts, gradients = self.layers + again + self.acts.flow, self.held
        if self.run.backend in ("fsdp2", "hsdp"):
            buffers += 2 * self.run.weight_bytes * self.layer
            if self.method.active_layers > 1:
                buffers += self.run.reduce_bytes * self.layer_trained
                acts -= self.acts.kept_layer if self.run.checkpointing else self.acts.trained_layer
                gradients = max(gradients, self.reduced_layer)
        return Memory(0, gradients, 0, acts, buffers, "recomputation" if again else "backward")

    def backward_end(self) -> Memory:
        """The roles' gradients are being reduced. FSDP2 does that last, and all together."""
        w, r = self.run.weight_bytes, self.run.reduce_bytes
        roles = sum(n for name, n in self.roles.items() if name != ADAPTERS)
        gradients = self.method.active_layers * self.reduced_layer + self.reduced_roles
        buffers = self.gathered_root + self._buckets()
        if self.run.backend in ("fsdp2", "hsdp"):
            gradients -= self.reduced_roles - self.reduced_adapters
            buffers += (w + r * (1 + 1 / self.run.shards)) * roles
        elif self.run.backend in ("ddp", "single"):
            buffers += w * self._largest()
        return Memory(0, gradients, 0, 0, buffers, "end of the backward")

    def update(self) -> Memory:
        """Units are updated at once, or the one with most entries, with gradients in fp32 and what AdamW computes."""
        run, shape = self.run, self.shape
        units = [-(-self.layer_trained // run.state_shards), *_role_state_elements(shape, run, self.method)]
        largest = max(units)
        if not run.backend.startswith("zero"):
            largest = max(largest, min(sum(units) + units[0] * (self.method.active_layers - 1), MOST_AT_ONCE))
        buffers = run.update_bytes * largest + self._resting_buckets()
        gradients = gradients_of(shape, run, self.method)
        if run.backend == "ddp":
            whole = max(self.layer_trained, *self.roles.values(), 0)
            buffers = max(buffers, 2 * run.weight_bytes * whole * (1 + 1 / run.gpus) + self._resting_buckets())
        return Memory(0, gradients, 0, 0, buffers, "update")

    def _largest(self) -> int:
        """Elements of the largest parameter that trains."""
        named = [shapes for name, shapes in self.shape.roles.items() if name in self.roles]
        shapes = [s for group in (*self.shape.layers, *named) for s in group]
        return self.layer_trained if self.method.name == "lora" else max(map(math.prod, shapes))

    def _resting_buckets(self) -> float:
        """Bytes that a wrapper allocates once: DDP's buckets, which are never freed, with GRASS or without."""
        if self.run.backend != "ddp":
            return 0.0
        trains = self.trained if self.method.name == "lora" else self.shape.trained_numel
        return self.run.weight_bytes * trains

    def _buckets(self) -> float:
        if not self.run.backend.startswith("zero"):
            return self._resting_buckets()
        settings, w = zero_settings(self.shape, self.run), self.run.weight_bytes
        bucket = w * min(settings["reduce_bucket_size"], self.trained)
        if self.run.backend != "zero3":
            return 2 * bucket  # one fills while the other is on its way
        return bucket + w * min(settings["stage3_max_live_parameters"], self.shape.numel)


def _held(shapes: Shapes, run: PlannedRun) -> int:
    """Elements of a unit's weights on the rank that has most. FSDP2 cuts rows, ZeRO-3 flattened parameters."""
    if run.backend in ("fsdp2", "hsdp"):
        return sum(-(-s[0] // run.shards) * math.prod(s[1:]) for s in shapes)
    return sum(-(-math.prod(s) // run.shards) for s in shapes)


def _state_elements(shapes: Shapes, run: PlannedRun) -> int:
    if run.backend in ("fsdp2", "hsdp"):
        return _held(shapes, run)
    return sum(-(-math.prod(s) // run.state_shards) for s in shapes)


def _role_state_elements(shape: ModelShape, run: PlannedRun, method: Method) -> list[int]:
    return [_state_elements(shape.roles[name], run) for name in trained_roles(shape, method)]


def _gradient_elements(
    shape: ModelShape, run: PlannedRun, method: Method, *, in_backward: bool = False
) -> tuple[float, float]:
    """Elements of gradients on a rank, of one layer and of all roles that train.

    Args:
        in_backward: whether the backward has not ended; ZeRO-1 reduces after it, and has whole ones until then.
    """
    roles = [shape.roles[name] for name in trained_roles(shape, method)]
    divided = run.backend == "zero2" or (run.backend == "zero1" and not in_backward)
    if method.name == "lora":
        return -(-lora_elements(shape) // (run.gpus if divided else run.shards)), 0.0
    if divided:
        per_rank = zip(*(_overlapping(role, run.gpus) for role in roles), strict=True)
        layer = max(max(_overlapping(layer, run.gpus)) for layer in shape.layers)
        return layer, max(map(sum, per_rank), default=0)
    return max(_held(layer, run) for layer in shape.layers), sum(_held(role, run) for role in roles)


def _overlapping(shapes: Shapes, ranks: int) -> list[int]:
    """Elements of a unit's gradients that each rank holds under ZeRO-1 and 2, which partition it into equal runs.

    Where a partition cuts a parameter, DeepSpeed keeps the whole gradient, and the partition has a view of it.
    """
    length, held, start = -(-elements_in(shapes) // ranks), [0] * ranks, 0
    for shape in shapes:
        end = start + math.prod(shape)
        for rank in range(start // length, -(-end // length)):
            held[rank] += end - start
        start = end
    return held


def _persistent(shape: ModelShape, run: PlannedRun) -> float:
    """Bytes of the small parameters that ZeRO-3 leaves gathered."""
    if run.backend != "zero3":
        return 0.0
    limit = zero_settings(shape, run)["stage3_param_persistence_threshold"]
    everything = (s for group in (*shape.layers, *shape.roles.values()) for s in group)
    return run.weight_bytes * sum(n for s in everything if (n := math.prod(s)) < limit)
