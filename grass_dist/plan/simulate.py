"""Measures the memory of a training step by running it on fake tensors.

The model, its wrapper, our backend and our optimizers run. No weight and no GPU is needed, and a world of any size is
one process. `FakeTensorMode` carries shapes instead of numbers, a fake process group takes every collective for done,
and a tracker adds up what is alive. What is simulated is an optimizer step of one micro-batch; the agreement of the
ranks and the draw, which need numbers, are left out.

The trackers of `track`, `FakeTensorMode` and torch's fake process group are private. They are checked on torch 2.13.0.
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
from grass_dist.backends.wrapping import shard, shard_mesh
from grass_dist.config import GrassConfig
from grass_dist.errors import GrassError
from grass_dist.model.always import always_active_roles
from grass_dist.model.chunked_loss import chunk_loss
from grass_dist.model.discovery import LayerMap, Unit, find_layers
from grass_dist.model.loss import summed_loss
from grass_dist.model.sharding import Sharding
from grass_dist.plan.architecture import make
from grass_dist.plan.memory import Memory, states_of
from grass_dist.plan.runs import GROUP, Method, PlannedRun, grass_config, optimizer_of
from grass_dist.plan.shape import ModelShape
from grass_dist.ranks import world
from grass_dist.states.unit_optimizer import UnitOptimizer

SIMULATED = ("single", "fsdp2", "hsdp", "ddp")
"""Backends of which a step can be simulated; DeepSpeed's engine needs real tensors."""
_ATTENTION = "grass_plan"
_BLOCK = 512
"""CUDA and the trackers round the bytes of an allocation up to a multiple of this."""

_PART_OF_KIND = {
    **dict.fromkeys(["Sharded Param", "Parameter"], "weights"),
    **dict.fromkeys(["Sharded Grad", "Gradient"], "gradients"),
    **dict.fromkeys(["Activation", "Buffer", "Inputs"], "activations"),
    **dict.fromkeys(["Unsharded Param", "Unsharded Grad", "All Gather", "Reduce Scatter"], "buffers"),
    **dict.fromkeys(["Temp", "OptState", "Optstate", "Other"], "buffers"),
}
"""Part of `Memory` that each name of the trackers of `track` belongs to."""


def can_simulate(run: PlannedRun, method: Method) -> bool:
    """Says whether `simulate` can: without DeepSpeed, LoRA and weights on the host, with one micro-batch a step and
    stock state sizes.
    """
    stock = method.name != "lora" and run.accumulation == 1 and run.state_bytes is None
    return run.backend in SIMULATED and stock and not run.rests(method)


def simulate(shape: ModelShape, run: PlannedRun, method: Method) -> Memory:
    """Finds the peak of a training step on rank 0, with the worst draw of the layers.

    Raises:
        GrassError: this model cannot run on fake tensors, or a process group is there already.
    """
    if not can_simulate(run, method):
        raise GrassError(f"{method.label} under {run.backend} cannot be simulated; use --fast.")
    if shape.pairs is not None:
        raise GrassError(f"{shape.name}: a folding trunk cannot run on fake tensors, into which it would look.")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise GrassError("A process group is running; the planner simulates in a process of its own.")
    try:
        with _fake_world(run.gpus), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # UnitOptimizer compares them
            peak, states = _peak_of_a_step(shape, run, method)
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
    resting = parts["weights"] if run.backend == "ddp" else 0.0  # stock DDP's buckets, which C++ allocates
    return Memory(
        weights=parts["weights"],
        gradients=parts["gradients"],
        states=states_of(shape, run, method)[0],
        activations=parts["activations"] - early,
        buffers=parts["buffers"] - (states - early) + resting,
        moment="simulated",
        simulated=True,
    )


def track(model: nn.Module, sharded: bool) -> tuple[Any, Callable[[], dict[str, int]]]:
    """Returns a context that follows the memory of tensors, and a function that gives the bytes of its peak by kind.

    `torch.distributed._tools` is private and has no public counterpart. It is checked on torch 2.13.0, and by
    `tests/test_plan.py`, which fails when a release changes it. For a model of FSDP2 it is `FSDPMemTracker`; for a
    plain one `MemTracker`, which must see every parameter trainable once, so a forward without gradients comes first.
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
    """Makes a world in which this process is rank 0 and collectives do nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _peak_of_a_step(shape: ModelShape, run: PlannedRun, method: Method) -> tuple[dict[str, int], int]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mesh = shard_mesh("cpu", run.gpus, run.replicate) if run.backend in ("fsdp2", "hsdp") else None
    dtype = getattr(torch, run.dtype)
    config = _without_mask(shape.config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make(config, dtype, "cpu").train()
        if run.checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})  # type: ignore[operator]
            if (release := getattr(model, "disable_input_require_grads", None)) is not None:
                release()
        if run.logits == "chunked":
            chunk_loss(model)
        backend = _wrapped(model, run, mesh)
        layers = find_layers(model)
        units = _training(model, layers, run, method)
        ids = torch.zeros(run.micro_batch, run.seq_len, dtype=torch.long)
        both = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
        batch = {"input_ids": ids, "labels": ids, **both}
        tracker, peak = track(model, mesh is not None)
        with tracker:
            backend.sharding.divide_states(units)
            optimizers, states = _optimizers(units, backend.sharding)
            if mesh is None:
                with torch.no_grad():
                    _loss(model, run, {name: tensor[:, :2] for name, tensor in batch.items()})
                tracker.reset_mod_stats()
            roles = always_active_roles(model, layers, GrassConfig())
            backend.attach(layers.layers, roles, lambda *_: None, lambda _: None)
            backend.set_trainable(units, probing=False, measuring=False)
            _loss(model, run, batch).backward()
            with torch.no_grad():
                for optimizer in optimizers:
                    optimizer.step([GROUP])
        return peak(), states


def _loss(model: nn.Module, run: PlannedRun, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if run.logits == "chunked":
        return model(**batch, num_items_in_batch=1, use_cache=False).loss
    return summed_loss(model, batch)


def _optimizers(units: Sequence[Unit], sharding: Sharding) -> tuple[list[UnitOptimizer], int]:
    """Makes our optimizers of what trains, with memory for their states, and counts its bytes as the tracker does."""
    optimizers, states = [], 0
    for unit in units:
        optimizer = optimizer_of(unit, sharding)
        optimizer.fields([GROUP])
        optimizer.state.lay_out()
        flat = torch.empty(optimizer.state.layout.device_bytes, dtype=torch.uint8)
        optimizer.state.bind(optimizer.state.layout.device_views(flat), resident=True)
        optimizers.append(optimizer)
        states += -(-flat.nbytes // _BLOCK) * _BLOCK
    return optimizers, states


def _training(model: nn.Module, layers: LayerMap, run: PlannedRun, method: Method) -> list[Unit]:
    """Returns the units of the worst draw, in the order of the updates.

    They are the topmost layers, one of them replaced by the lowest where that decides how far the backward goes.
    """
    roles = always_active_roles(model, layers, grass_config(run, method))
    top = list(layers.layers[len(layers.layers) - method.active_layers :])
    if "embeddings" not in {unit.name for unit in roles}:
        top[0] = layers.layers[0]
    return [*reversed(top), *roles]


def _wrapped(model: nn.Module, run: PlannedRun, mesh: Any) -> HookedBackend:
    """Wraps the model as the training program does, and gives the backend that GrassOptimizer would take.

    DDP's own reducer needs real tensors: of DDP only the division of the states is simulated.
    """
    if mesh is None:
        return SingleBackend(model, 1, DdpSharding(world()) if run.backend == "ddp" else None)
    shard(model, [unit.name for unit in find_layers(model).layers], mesh)
    return Fsdp2Backend(model, 1)


def _without_mask(config: Any) -> Any:
    """Returns the configuration with attention as sdpa runs it on full sequences: causal, with no mask in memory.

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
