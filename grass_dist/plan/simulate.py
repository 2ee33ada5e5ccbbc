"""Memory of a training step by running it on fake tensors: the model, its wrapper, our backend, our optimizers.

No weight and no GPU is needed, and a world of any size is one process. `FakeTensorMode` carries shapes in the place of
numbers, a fake process group takes every collective for done, and a tracker adds up what is alive. What is simulated is
an optimizer step of one micro-batch; the agreement of the ranks and the draw, which need numbers, are left out.

Private here, and checked on torch 2.13.0: the trackers of `track`, `FakeTensorMode` and torch's fake process group.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.backends.base import HookedBackend
from grass_dist.backends.ddp import DdpSharding
from grass_dist.backends.fsdp2 import Fsdp2Backend
from grass_dist.backends.single import SingleBackend
from grass_dist.config import GrassConfig
from grass_dist.errors import GrassError
from grass_dist.finetune.steps import summed_loss
from grass_dist.model.discovery import LayerMap, Unit, find_layers
from grass_dist.model.foreign import build
from grass_dist.model.sharding import Sharding
from grass_dist.model.units import always_active_roles
from grass_dist.plan.job import Job, Method
from grass_dist.plan.memory import Memory, states_of
from grass_dist.plan.shape import ModelShape
from grass_dist.ranks import world
from grass_dist.states.unit_optimizer import UnitOptimizer

SIMULATED = ("single", "fsdp2", "hsdp", "ddp")
"""Backends of which a step can be simulated; DeepSpeed's engine needs real tensors."""
_ATTENTION = "grass_plan"
_BLOCK = 512
"""Bytes that an allocation is rounded up to, on CUDA and by the trackers."""

_PART_OF_KIND = {
    **dict.fromkeys(["Sharded Param", "Parameter"], "weights"),
    **dict.fromkeys(["Sharded Grad", "Gradient"], "gradients"),
    **dict.fromkeys(["Activation", "Buffer", "Inputs"], "activations"),
    **dict.fromkeys(["Unsharded Param", "Unsharded Grad", "All Gather", "Reduce Scatter"], "buffers"),
    **dict.fromkeys(["Temp", "OptState", "Optstate", "Other"], "buffers"),
}
"""Names that the trackers of `track` give, and the part of `Memory` that each belongs to."""


def can_simulate(job: Job, method: Method) -> bool:
    """Whether `simulate` knows how: not DeepSpeed, not LoRA, one micro-batch a step, stock state sizes."""
    return job.backend in SIMULATED and method.name != "lora" and job.accumulation == 1 and job.state_bytes is None


def simulate(shape: ModelShape, job: Job, method: Method) -> Memory:
    """The peak of a training step on rank 0, with the worst draw of the layers.

    Raises:
        GrassError: this model cannot run on fake tensors, or a process group is there already.
    """
    if not can_simulate(job, method):
        raise GrassError(f"{method.label} under {job.backend} cannot be simulated; use --fast.")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise GrassError("A process group is running; the planner simulates in a process of its own.")
    try:
        with _fake_world(job.gpus), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # UnitOptimizer compares them
            peak, states = _peak_of_a_step(shape, job, method)
    except GrassError:
        raise
    except Exception as error:  # whatever a model does that fake tensors cannot
        reason = " ".join(str(error).split())[:200]
        raise GrassError(f"{shape.name} cannot run on fake tensors ({type(error).__name__}: {reason}).") from error
    parts = dict.fromkeys(_PART_OF_KIND.values(), 0.0)
    for kind, nbytes in peak.items():
        parts[_PART_OF_KIND[kind]] += nbytes
    # The tracker takes the states' memory for activations, or for the optimizer's own once that has stepped.
    early = min(states, parts["activations"])
    resting = parts["weights"] if job.backend == "ddp" else 0.0  # stock DDP's buckets, which C++ allocates
    return Memory(
        weights=parts["weights"],
        gradients=parts["gradients"],
        states=states_of(shape, job, method)[0],
        activations=parts["activations"] - early,
        buffers=parts["buffers"] - (states - early) + resting,
        moment="simulated",
        simulated=True,
    )


def track(model: nn.Module, sharded: bool) -> tuple[Any, Callable[[], dict[str, int]]]:
    """A context that follows the memory of tensors, and what gives the kinds of its peak so far, in bytes.

    Private: `torch.distributed._tools` has no public counterpart. Checked on torch 2.13.0, and by `tests/test_plan.py`,
    which fails when a release changes it. For a model of FSDP2 it is `FSDPMemTracker`; for a plain one `MemTracker`,
    which must see every parameter trainable once: so a forward without gradients comes first.
    """
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker: Any = FSDPMemTracker(model) if sharded else MemTracker()  # type: ignore[arg-type]

    def peak() -> dict[str, int]:
        snapshot = tracker.get_tracker_snapshot("peak")
        kinds = next(iter(snapshot.values()))
        return {str(getattr(kind, "value", kind)): n for kind, n in kinds.items() if kind != "Total"}

    return tracker, peak


@contextlib.contextmanager
def _fake_world(size: int) -> Iterator[None]:
    """A world in which this process is rank 0 and collectives do nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _peak_of_a_step(shape: ModelShape, job: Job, method: Method) -> tuple[dict[str, int], int]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mesh = _mesh(job)
    dtype = getattr(torch, job.dtype)
    config = _without_mask(shape.config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(config, dtype, "cpu").train()
        if job.checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})  # type: ignore[operator]
        backend = _wrapped(model, job, mesh)
        layers = find_layers(model)
        units = _training(layers, method)
        ids = torch.zeros(job.micro_batch, job.seq_len, dtype=torch.long)
        batch = {"input_ids": ids, "labels": ids}
        tracker, peak = track(model, mesh is not None)
        with tracker:
            backend.sharding.divide_states(units)
            optimizers, states = _optimizers(units, backend.sharding)
            if mesh is None:
                with torch.no_grad():
                    model(input_ids=ids[:, :1], use_cache=False)
                tracker.reset_mod_stats()
            backend.attach(layers.layers, layers.roles, lambda *_: None, lambda _: None)
            backend.set_trainable(units, probing=False, measuring=False)
            for name, param in layers.other:
                del name
                param.requires_grad_(False)
            summed_loss(model, batch).backward()
            with torch.no_grad():
                for optimizer in optimizers:
                    optimizer.step([_GROUP])
        return peak(), states


_ADAMW: dict[str, Any] = {"lr": 1e-5, "foreach": True}
_GROUP: dict[str, Any] = {"params": [], **torch.optim.AdamW([nn.Parameter(torch.zeros(1))], **_ADAMW).defaults}


def _optimizers(units: Sequence[Unit], sharding: Sharding) -> tuple[list[UnitOptimizer], int]:
    """Our optimizers of what trains, each with memory for its state, and the bytes of that as the tracker counts."""
    optimizers, states = [], 0
    for unit in units:
        optimizer = UnitOptimizer(unit, [0] * len(unit.params), torch.optim.AdamW, _ADAMW, sharding)
        optimizer.fields([_GROUP])
        optimizer.state.lay_out()
        flat = torch.empty(optimizer.state.layout.device_bytes, dtype=torch.uint8)
        optimizer.state.bind(optimizer.state.layout.device_views(flat), resident=True)
        optimizers.append(optimizer)
        states += -(-flat.nbytes // _BLOCK) * _BLOCK
    return optimizers, states


def _training(layers: LayerMap, method: Method) -> list[Unit]:
    """The units of the worst draw: the topmost layers, and the lowest in the place of one where it decides how far the
    backward goes. In the order of the updates."""
    config = GrassConfig(active_layers=method.active_layers, always_active=method.roles)  # type: ignore[arg-type]
    roles = always_active_roles(layers, config)
    top = list(layers.layers[len(layers.layers) - method.active_layers :])
    if "embeddings" not in {unit.name for unit in roles}:
        top[0] = layers.layers[0]
    return [*reversed(top), *roles]


def _mesh(job: Job) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    if job.backend == "fsdp2":
        return init_device_mesh("cpu", (job.gpus,), mesh_dim_names=("dp_shard",))
    if job.backend == "hsdp":
        return init_device_mesh("cpu", (job.replicate, job.shards), mesh_dim_names=("dp_replicate", "dp_shard"))
    return None


def _wrapped(model: nn.Module, job: Job, mesh: Any) -> HookedBackend:
    """The model as `finetune.run_torch.wrap` wraps it, and the backend that GrassOptimizer would take.

    DDP's own reducer needs real tensors: of DDP only the division of the states is simulated.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if mesh is None:
        return SingleBackend(model, 1, DdpSharding(world()) if job.backend == "ddp" else None)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if job.weight_bytes < 4 else None)
    for layer in model.get_submodule(find_layers(model).stack).children():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return Fsdp2Backend(model, 1)


def _without_mask(config: Any) -> Any:
    """The configuration with attention as sdpa runs it on full sequences: causal, with no mask in memory.

    transformers looks into the mask to leave it out, which it cannot do with fake tensors.
    """
    import copy

    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    config = copy.deepcopy(config)
    config._attn_implementation = _ATTENTION
    config.get_text_config()._attn_implementation = _ATTENTION
    return config
