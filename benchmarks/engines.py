"""Every method under every wrapper, as one thing that takes steps. What is published is used as it is published."""

from __future__ import annotations

import argparse
import gc
import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import grass_dist
from benchmarks.offload_runs import dtype, load
from grass_dist.job.world import World
from grass_dist.model.discovery import LayerMap, find_layers

BACKENDS = ("fsdp2", "zero2", "zero3", "ddp")
METHODS = {
    "full": "full fine-tuning",
    "host": "full fine-tuning, states on the host",
    "lora": "LoRA r=16",
    "badam": "BAdam",
    "lisa": "LISA",
    "grass": "GRASS",
    "grass-stream": "GRASS, states streamed",
    "grass-layers": "GRASS, layers only",
}
"""Names that a table shows. LISA and GRASS train embeddings, final norm and head at every step, the last none."""
GRASS: dict[str, dict[str, Any]] = {
    "lisa": {"sampler": "uniform"},
    "grass": {"probe_steps": 1},
    "grass-stream": {"probe_steps": 1, "offload": {"mode": "stream"}},
    "grass-layers": {"probe_steps": 1, "always_active": ()},
}
"""Settings in which they differ. The probe is over before anything is timed."""
ADAMW = {"lr": 1e-5}


class Trained:
    """One method on this run's ranks, with a model of its own. Gradients are not clipped."""

    layers: LayerMap

    def __init__(self, method: str, backend: str, args: argparse.Namespace, world: World) -> None:
        self.method, self.backend, self.args, self.world = method, backend, args, world
        self.engine: Any = None
        self.model: nn.Module = load(args, world)
        self.layers = find_layers(self.model)
        self.vocabulary: int = self.model.config.vocab_size  # type: ignore[union-attr,assignment]
        blocks = [self.model.get_submodule(unit.name) for unit in self.layers.layers]
        if method == "lora":
            self.model = with_lora(self.model)
        if backend.startswith("zero"):
            self.engine = self._engine()
            self.grass = self.engine.grass if method in GRASS else None
            return
        if backend == "fsdp2":
            mesh = init_device_mesh(world.device.type, (world.size,))
            for module in (*blocks, self.model):
                fully_shard(module, mesh=mesh)
        else:  # BAdam freezes weights that DDP waits for, unless it looks for those without a gradient
            self.model = DistributedDataParallel(self.model, find_unused_parameters=method == "badam")
        self.optimizer = self._optimizer()
        self.grass = self.optimizer.grass if isinstance(self.optimizer, grass_dist.GrassOptimizer) else None

    @property
    def active(self) -> tuple[int, ...] | None:
        """Layers that the next step trains, of those methods that are ours."""
        return self.grass.active_layers if self.grass is not None else None

    def step(self, ids: torch.Tensor) -> None:
        if self.engine is not None:
            self.engine.backward(self.engine(input_ids=ids, labels=ids, use_cache=False).loss)
            self.engine.step()
        else:
            self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # not the device: copies of states may run on

    def free(self) -> None:
        if self.grass is not None:
            self.grass.states.settle()
        if self.engine is not None:
            self.engine.destroy()
        self.__dict__.clear()
        gc.collect()

    def _settings(self) -> dict[str, Any]:
        every = {"sampling_interval": self.args.interval, "update_interval": self.args.interval}
        return {"active_layers": self.args.active, **every, **GRASS[self.method]}

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.method in GRASS:
            config = grass_dist.GrassConfig(**self._settings())
            return grass_dist.GrassOptimizer(self.model, torch.optim.AdamW, ADAMW, config=config)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if self.method == "badam":
            return badam(self.model, torch.optim.AdamW(trained, **ADAMW), self.args.interval)
        if self.method == "host":
            from torchao.optim import CPUOffloadOptimizer  # type: ignore[import-not-found]

            return CPUOffloadOptimizer(trained, torch.optim.AdamW, **ADAMW)
        return torch.optim.AdamW(trained, **ADAMW)

    def _engine(self) -> Any:
        import deepspeed

        buckets = ("reduce_bucket_size", "allgather_bucket_size")  # of eight engines at once, 4 GB each by default
        stage: dict[str, Any] = {"stage": int(self.backend[-1]), **dict.fromkeys(buckets, 50_000_000)}
        config: dict[str, Any] = {
            **{"train_micro_batch_size_per_gpu": self.args.batch, "zero_optimization": stage},
            **{"bf16": {"enabled": dtype() != torch.float32}, "gradient_clipping": 0.0, "steps_per_print": 10**9},
            **{"zero_allow_untested_optimizer": True},
        }
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if self.method in GRASS:
            optimizer = torch.optim.AdamW(trained, **ADAMW)
            settings = config | {"grass": self._settings()}
            return grass_dist.initialize(model=self.model, optimizer=optimizer, config=settings)[0]
        if self.method == "host":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            stage["offload_optimizer"] = {"device": "cpu", "pin_memory": dtype() != torch.float32}
            optimizer = DeepSpeedCPUAdam(trained, **ADAMW)
        elif self.method == "badam":
            optimizer = badam(self.model, torch.optim.AdamW(trained, **ADAMW), self.args.interval, config)
        else:
            optimizer = torch.optim.AdamW(trained, **ADAMW)
        engine = deepspeed.initialize(model=self.model, model_parameters=trained, optimizer=optimizer, config=config)[0]
        if self.method == "badam":
            optimizer.ds_optimizer = engine.optimizer  # type: ignore[attr-defined]  # as its guide asks
        return engine


def with_lora(model: nn.Module) -> nn.Module:
    import peft

    settings = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    adapted = peft.get_peft_model(model, settings)  # type: ignore[arg-type]
    return adapted.to(dtype())  # FSDP2 wants one dtype a module


def badam(model: nn.Module, inner: torch.optim.Optimizer, every: int, ds_config: Any = None) -> torch.optim.Optimizer:
    """BAdam finds out by transformers whether it is under ZeRO-3: when it is imported, and when it is made."""
    from transformers.integrations import HfDeepSpeedConfig

    known = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    from badam import BlockOptimizer  # type: ignore[import-not-found]

    if ds_config is None or ds_config["zero_optimization"]["stage"] < 3:
        del known
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights are float32
        return BlockOptimizer(inner, list(model.named_parameters()), switch_block_every=every, verbose=0)
