"""Peak memory of a GPU and pinned memory of a host, by a closed form over shapes.

A step has moments at which memory can peak; the closed form adds up what is there at each of them and takes the largest
sum. So the parts belong to one moment and add up. Layers are taken as large as the largest, and the draw of the layers
as the worst: those at the top, whose gradients are there while most activations still are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from grass_dist.plan.activations import Activations, activations_of
from grass_dist.plan.job import SLOTS, Job, Method, lora_elements, trained_roles
from grass_dist.plan.shape import ModelShape, Shapes, numel

FRAGMENTATION_SHARE = 0.08
"""Of what is allocated and freed in a step (gradients, activations, buffers), lost between blocks of the allocator."""
RUNTIME_BYTES = 0.8e9
"""CUDA context, kernels, cuBLAS workspace and NCCL's channels: what a process takes before it allocates anything."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on a GPU at the moment of the peak."""

    weights: float
    gradients: float
    states: float
    activations: float
    buffers: float
    """Of communication (gathered layers, buckets) and of the update."""
    moment: str
    """When the peak is."""
    simulated: bool = False

    @property
    def model_states(self) -> float:
        return self.weights + self.gradients + self.states

    @property
    def allocated(self) -> float:
        """What ``torch.cuda.max_memory_allocated`` counts."""
        return self.model_states + self.activations + self.buffers

    @property
    def allowance(self) -> float:
        return FRAGMENTATION_SHARE * (self.gradients + self.activations + self.buffers)

    @property
    def runtime(self) -> float:
        return RUNTIME_BYTES

    @property
    def total(self) -> float:
        """What the GPU must have."""
        return self.allocated + self.allowance + self.runtime


PARTS = tuple(f.name for f in fields(Memory) if f.type == "float")


def weights_of(shape: ModelShape, job: Job) -> float:
    """Bytes of the weights that rest on a rank."""
    everything = (*shape.layers, *shape.roles.values(), shape.other)
    return job.weight_bytes * sum(_held(shapes, job) for shapes in everything) + _persistent(shape, job)


def states_of(shape: ModelShape, job: Job, method: Method) -> tuple[float, float]:
    """Bytes of optimizer states on a rank: on the device at most, and in host memory (a buffer for each layer)."""
    size = job.bytes_of_state
    each = [size * _state_elements(layer, job) for layer in shape.layers]
    longest, roles = max(each), sum(size * n for n in _role_state_elements(shape, job, method))
    total, gamma = shape.num_layers, method.active_layers
    if method.name == "lora":
        return size * total * -(-lora_elements(shape) // job.state_shards), 0.0
    if method.name == "full":
        return sum(each) + roles, 0.0
    if method.name == "lisa":
        return gamma * longest + roles, 0.0
    if job.offload == "none":
        return sum(each) + roles, 0.0
    slots = min(SLOTS, gamma) if job.offload == "stream" else min(gamma + 1, total)
    return slots * longest + roles, sum(each)


def gradients_of(shape: ModelShape, job: Job, method: Method) -> float:
    """Bytes of reduced gradients on a rank at the end of a backward."""
    layer, roles = _gradient_elements(shape, job, method)
    return job.weight_bytes * (method.active_layers * layer + roles)


def host_bytes(shape: ModelShape, job: Job, method: Method) -> float:
    """Pinned memory of a host: the states of all layers of its ranks, and the sums of a probe with accumulation."""
    states = states_of(shape, job, method)[1]
    probes = method.name == "grass" and job.accumulation > 1
    divided = job.gpus if job.backend.startswith("zero") else job.shards
    sums = 4 * shape.layers_numel / divided if probes else 0.0
    return job.ranks_per_host * (states + sums)


def zero_settings(shape: ModelShape, job: Job) -> dict[str, int | bool]:
    """The ``zero_optimization`` block that the plan counts with and writes: buckets as long as a layer."""
    stage, layer = int(job.backend[-1]), max(shape.layer_numel, 10**6)
    common: dict[str, int | bool] = {"stage": stage, "overlap_comm": True, "reduce_bucket_size": layer}
    if stage < 3:
        return {**common, "allgather_bucket_size": layer}
    return {
        **common,
        "stage3_prefetch_bucket_size": layer,
        "stage3_param_persistence_threshold": 10 * shape.hidden,
        "stage3_max_live_parameters": 2 * layer + max(map(numel, shape.roles.values()), default=0),
        "stage3_max_reuse_distance": layer,
    }


def memory_of(shape: ModelShape, job: Job, method: Method) -> Memory:
    """The peak on a rank, by the closed form."""
    acts = activations_of(shape, job)
    counts = _Counts(shape, job, method, acts)
    weights, states = weights_of(shape, job), states_of(shape, job, method)[0]
    moments = [
        replace(part, weights=weights, states=states)
        for part in (counts.loss(), counts.reducing(1), counts.reducing(method.active_layers), counts.recomputing())
    ]
    moments += [replace(part, weights=weights, states=states) for part in (counts.backward_end(), counts.update())]
    if job.backend.startswith("zero"):
        masters = 4 * counts.trained / job.gpus
        moments.append(Memory(weights, 0.0, states, 0.0, masters, "switch to other layers"))
    return max(moments, key=lambda moment: moment.allocated)


class _Counts:
    """What there is at each moment, weights and states left out."""

    def __init__(self, shape: ModelShape, job: Job, method: Method, acts: Activations) -> None:
        self.shape, self.job, self.method, self.acts = shape, job, method, acts
        w, total, gamma = job.weight_bytes, shape.num_layers, method.active_layers
        self.layer = shape.layer_numel
        self.roles = trained_roles(shape, method)
        self.layer_trained = lora_elements(shape) if method.name == "lora" else self.layer
        self.trained = gamma * self.layer_trained + sum(self.roles.values())
        head = self.roles.get("embeddings" if shape.tied else "lm_head", 0)
        self.head_grad = w * head
        of_each = _gradient_elements(shape, job, method, in_backward=True)
        self.reduced_layer, self.reduced_roles = (w * n for n in of_each)
        if job.checkpointing:
            self.layers = total * acts.kept_layer
        else:
            self.layers = gamma * acts.trained_layer + (total - gamma) * acts.frozen_layer
        self.gathered_root = w * sum(map(numel, shape.roles.values())) if job.backend in ("fsdp2", "hsdp") else 0
        self.held = self._accumulated()

    def _accumulated(self) -> float:
        """Gradients that are there during all of a backward: of micro-batches before the last, or ZeRO-3's buffer."""
        if self.job.accumulation == 1 and self.job.backend != "zero3":
            return 0.0
        if self.job.backend in ("fsdp2", "hsdp"):
            return self.job.reduce_bytes * self.trained  # unsharded, in the dtype of the reduction
        return self.reduced_layer * self.method.active_layers + self.reduced_roles

    def loss(self) -> Memory:
        """The loss has been taken; the backward begins."""
        acts = self.layers + self.acts.head + self.acts.loss
        return Memory(0, self.held, 0, acts, self.gathered_root + self._buckets(), "loss")

    def reducing(self, done: int) -> Memory:
        """The gradients of trained layer number ``done`` from the top are being reduced."""
        w, r, shards = self.job.weight_bytes, self.job.reduce_bytes, self.job.shards
        acts = self.layers + self.acts.flow
        acts -= done * (self.acts.kept_layer if self.job.checkpointing else self.acts.trained_layer)
        buffers = self.gathered_root + self.head_grad + self._buckets()
        if self.job.backend in ("fsdp2", "hsdp"):
            buffers += 2 * w * self.layer + (w + r * (1 + 1 / shards)) * self.layer_trained
        elif self.job.backend in ("zero3", "ddp", "single"):
            buffers += w * self.layer_trained if self.job.backend == "zero3" else w * self._largest()
        gradients = max(self.held, done * self.reduced_layer)
        return Memory(0, gradients, 0, acts, buffers, "backward")

    def recomputing(self) -> Memory:
        """The backward is within a layer, all of whose activations are there; FSDP2 reduces those of the one above."""
        again = self.acts.trained_layer if self.job.checkpointing else 0.0
        buffers = self.gathered_root + self.head_grad + self._buckets()
        acts, gradients = self.layers + again + self.acts.flow, self.held
        if self.job.backend in ("fsdp2", "hsdp"):
            buffers += 2 * self.job.weight_bytes * self.layer
            if self.method.active_layers > 1:
                buffers += self.job.reduce_bytes * self.layer_trained
                acts -= self.acts.kept_layer if self.job.checkpointing else self.acts.trained_layer
                gradients = max(gradients, self.reduced_layer)
        return Memory(0, gradients, 0, acts, buffers, "recomputation" if again else "backward")

    def backward_end(self) -> Memory:
        """The roles' gradients are being reduced, which FSDP2 does last, together."""
        w, r, roles = self.job.weight_bytes, self.job.reduce_bytes, sum(self.roles.values())
        gradients = self.method.active_layers * self.reduced_layer + self.reduced_roles
        buffers = self.gathered_root + self._buckets()
        if self.job.backend in ("fsdp2", "hsdp"):
            gradients -= self.reduced_roles
            buffers += (w + r * (1 + 1 / self.job.shards)) * roles
        elif self.job.backend in ("ddp", "single"):
            buffers += w * self._largest()
        return Memory(0, gradients, 0, 0, buffers, "end of the backward")

    def update(self) -> Memory:
        """The unit with most entries is updated: gradients in fp32, and what AdamW computes on the way."""
        job, shape = self.job, self.shape
        units = [-(-self.layer_trained // job.state_shards), *_role_state_elements(shape, job, self.method)]
        buffers = job.update_bytes * max(units) + self._resting_buckets()
        gradients = gradients_of(shape, job, self.method)
        if job.backend == "ddp":
            whole = max(self.layer_trained, *self.roles.values(), 0)
            buffers = max(buffers, 2 * job.weight_bytes * whole * (1 + 1 / job.gpus) + self._resting_buckets())
        return Memory(0, gradients, 0, 0, buffers, "update")

    def _largest(self) -> int:
        """Elements of the largest parameter that trains."""
        named = [shapes for name, shapes in self.shape.roles.items() if name in self.roles]
        shapes = [s for group in (*self.shape.layers, *named) for s in group]
        return self.layer_trained if self.method.name == "lora" else max(map(math.prod, shapes))

    def _resting_buckets(self) -> float:
        """What a wrapper allocates once: stock DDP's buckets, which GRASS and stock DDP never free."""
        if self.job.backend != "ddp":
            return 0.0
        trains = self.trained if self.method.name == "lora" else self.shape.numel
        return self.job.weight_bytes * trains

    def _buckets(self) -> float:
        if not self.job.backend.startswith("zero"):
            return self._resting_buckets()
        settings, w = zero_settings(self.shape, self.job), self.job.weight_bytes
        bucket = w * min(settings["reduce_bucket_size"], self.trained)
        if self.job.backend != "zero3":
            return 2 * bucket  # one fills while the other is on its way
        return bucket + w * min(settings["stage3_max_live_parameters"], self.shape.numel)


def _held(shapes: Shapes, job: Job) -> int:
    """Elements of a unit's weights on the rank that has most: FSDP2 cuts rows, ZeRO-3 flattened parameters."""
    if job.backend in ("fsdp2", "hsdp"):
        return sum(-(-s[0] // job.shards) * math.prod(s[1:]) for s in shapes)
    return sum(-(-math.prod(s) // job.shards) for s in shapes)


def _state_elements(shapes: Shapes, job: Job) -> int:
    if job.backend in ("fsdp2", "hsdp"):
        return _held(shapes, job)
    return sum(-(-math.prod(s) // job.state_shards) for s in shapes)


def _role_state_elements(shape: ModelShape, job: Job, method: Method) -> list[int]:
    return [_state_elements(shape.roles[name], job) for name in trained_roles(shape, method)]


def _gradient_elements(
    shape: ModelShape, job: Job, method: Method, *, in_backward: bool = False
) -> tuple[float, float]:
    """Elements of gradients on a rank, of one layer and of all roles that train.

    Args:
        in_backward: before the backward has ended: ZeRO-1 reduces after it, and has whole ones until then.
    """
    roles = [shape.roles[name] for name in trained_roles(shape, method)]
    divided = job.backend == "zero2" or (job.backend == "zero1" and not in_backward)
    if method.name == "lora":
        return -(-lora_elements(shape) // (job.gpus if divided else job.shards)), 0.0
    if divided:
        per_rank = zip(*(_overlapping(role, job.gpus) for role in roles), strict=True)
        layer = max(max(_overlapping(layer, job.gpus)) for layer in shape.layers)
        return layer, max(map(sum, per_rank), default=0)
    return max(_held(layer, job) for layer in shape.layers), sum(_held(role, job) for role in roles)


def _overlapping(shapes: Shapes, ranks: int) -> list[int]:
    """Elements of the gradients that each rank holds of a unit under ZeRO-1 and 2: its partition is one of equal runs.

    Of a parameter that is cut, DeepSpeed keeps the whole gradient, of which the partition has a view.
    """
    run, held, start = -(-numel(shapes) // ranks), [0] * ranks, 0
    for shape in shapes:
        end = start + math.prod(shape)
        for rank in range(start // run, -(-end // run)):
            held[rank] += end - start
        start = end
    return held


def _persistent(shape: ModelShape, job: Job) -> float:
    """Bytes of the small parameters that ZeRO-3 leaves gathered."""
    if job.backend != "zero3":
        return 0.0
    limit = zero_settings(shape, job)["stage3_param_persistence_threshold"]
    everything = (s for group in (*shape.layers, *shape.roles.values()) for s in group)
    return job.weight_bytes * sum(n for s in everything if (n := math.prod(s)) < limit)
