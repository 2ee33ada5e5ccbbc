"""Fine-tuning under FSDP2, HSDP or DDP, or in one process: `GrassOptimizer` over a wrapped model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from grass_dist.backends.wrapping import shard, shard_mesh
from grass_dist.checkpoint.pieces import Holdings
from grass_dist.config import GrassConfig
from grass_dist.events import Observer
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.export import gather_torch, save_pretrained
from grass_dist.finetune.lanes import Lanes
from grass_dist.finetune.optimizers import optimizer_of
from grass_dist.finetune.parallel import Loss, Stepped, Tell, Told
from grass_dist.finetune.setup import accumulation_steps, check_ranks, load_model, parameter_groups
from grass_dist.finetune.tasks.base import Batch, Task
from grass_dist.job.world import World
from grass_dist.model.compiled import compile_layers
from grass_dist.model.discovery import LayerMap
from grass_dist.optimizer import GrassOptimizer


class Torch:
    """The `Parallelism` of torch's own wrappers."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self._config, self._world = config, world
        self.name = config.parallel.backend
        check_ranks(config, world)

    def load(self, task: Task | None = None) -> nn.Module:
        return load_model(self._config, self._world.device, task)

    def answer(self, task: Task, model: nn.Module, prompt: str) -> str:
        return task.answer(model, prompt, self._world.device)

    def start(self, model: nn.Module, layers: LayerMap, observers: Sequence[Observer]) -> TorchRun:
        if self._config.model.compile:
            compile_layers(model, [layer.name for layer in layers.layers])
        model = wrap(model, self._config, self._world, layers)
        optimizer = GrassOptimizer(
            model,
            *optimizer_of(self._config.train),
            config=_early_updates(self._config),
            params=parameter_groups(model, self._config.train.weight_decay),
            gradient_accumulation_steps=accumulation_steps(self._config, self._world),
            observers=observers,
        )
        return TorchRun(model, optimizer, self._config.train.clip_grad_norm, self._world)


class TorchRun:
    """The `Run` of a `GrassOptimizer`."""

    def __init__(self, model: nn.Module, optimizer: GrassOptimizer, clip: float | None, world: World) -> None:
        self.model, self.optimizer, self.grass = model, optimizer, optimizer.grass
        self._clip, self._world = clip, world
        self.lanes = Lanes(world.device)

    def step(self, batches: Sequence[Batch], scale: torch.Tensor, loss: Loss, tell: Tell) -> Stepped:
        self.lanes.begin()
        total = torch.zeros((), dtype=torch.float64, device=self._world.device)
        for number, batch in enumerate(batches):
            with _reduce_only(self.model, last=number == len(batches) - 1):
                summed = loss(self.model, batch)
                (summed * scale).backward()
            total += summed.detach()
        self.lanes.end("backward")
        trains = self.grass.phase == "train"
        norm = None
        if trains and self._clip is not None:
            norm = self.optimizer.clip_grad_norm_(self._clip)
        told = tell(total, norm)  # before the update, which depends on it
        applied = not trains or self._is_finite(told)
        if applied:
            self.optimizer.step()
        else:
            self.grass.finish_gradients()
            self.grass.skip_step()
        self.optimizer.zero_grad()
        self.lanes.end("update")
        return Stepped(told, applied)

    def _is_finite(self, told: Told) -> bool:
        """Says whether the step may update, by the norm of all gradients or, without it, by the loss of all ranks."""
        if told.norm is not None:
            return math.isfinite(told.norm)
        # With updates in the backward layers have been updated by now.
        return bool(self.grass.config.offload.update_in_backward) or math.isfinite(told.total)

    def holdings(self) -> Holdings:
        return self.optimizer.holdings()

    @property
    def state_bytes(self) -> int:
        return self.optimizer.state_bytes

    @property
    def host_state_bytes(self) -> int:
        return self.optimizer.host_state_bytes

    def save(self, tokenizer: Any, folder: Path) -> None:
        inner = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        save_pretrained(inner, gather_torch(self.model), tokenizer, folder, self._world)

    def close(self) -> None:
        del self.model, self.optimizer, self.grass


def _early_updates(config: RunConfig) -> GrassConfig:
    """Sets updates in the backward for streamed states without clipping, unless the user has decided."""
    offload = config.grass.offload
    if offload.mode != "stream" or config.train.clip_grad_norm or offload.update_in_backward is not None:
        return config.grass
    early = offload.model_copy(update={"update_in_backward": True})
    return config.grass.model_copy(update={"offload": early})


def wrap(model: nn.Module, config: RunConfig, world: World, layers: LayerMap) -> nn.Module:
    """Wraps ``model`` for ``config.parallel`` and moves it, or this rank's shard of it, to the device."""
    backend, replicate = config.parallel.backend, config.parallel.mesh.replicate
    if backend == "single" and config.grass.offload.weights == "host":
        return to_device_without_layers(model, world.device, layers)
    if backend == "single":
        return model.to(world.device)
    if backend == "ddp":
        model = model.to(world.device)
        return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)
    shard(model, [unit.name for unit in layers.layers], shard_mesh(world.device.type, world.size, replicate))
    return model


def to_device_without_layers(model: nn.Module, device: torch.device, layers: LayerMap) -> nn.Module:
    """Moves all to the device but the parameters of the layers, which will rest in host memory."""
    resting = {id(param) for unit in layers.layers for _, param in unit.params}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in resting:
            tensor.data = tensor.data.to(device)
    return model


@contextlib.contextmanager
def _reduce_only(model: nn.Module, *, last: bool):
    """Reduces the gradients with the last micro-batch only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    with contextlib.ExitStack() as stack:
        if isinstance(model, DistributedDataParallel) and not last:
            stack.enter_context(model.no_sync())
        yield
