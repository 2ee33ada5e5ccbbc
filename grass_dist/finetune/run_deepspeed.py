"""Fine-tuning under DeepSpeed ZeRO: `grass_dist.initialize` over the settings of our YAML and a DeepSpeed JSON."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grass_dist.checkpoint.pieces import Holdings
from grass_dist.checkpoint.zero_run import ZeroHoldings
from grass_dist.errors import ConfigError, GrassError
from grass_dist.events import Observer
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.deepspeed_config import check, fill, read_ds_config
from grass_dist.finetune.export import gather_zero, save_pretrained
from grass_dist.finetune.lanes import Lanes
from grass_dist.finetune.parallel import Loss, Stepped, Tell
from grass_dist.finetune.questions import answer_from_folder
from grass_dist.finetune.setup import (
    accumulation_steps,
    adamw_settings,
    check_ranks,
    load_model,
    parameter_groups,
    weight_dtype,
)
from grass_dist.finetune.tasks.base import Batch, Task
from grass_dist.job.world import World
from grass_dist.model.discovery import LayerMap
from grass_dist.model.packaged import resolve_model


class DeepSpeed:
    """The `Parallelism` of ZeRO-1, 2 and 3.

    Raises:
        ConfigError: the JSON contradicts the YAML, or GRASS cannot run with it.
        GrassError: DeepSpeed is not installed, or it is set to another device than torch finds.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        assert config.parallel.config is not None
        if find_spec("deepspeed") is None:
            raise GrassError("parallel.backend='deepspeed' needs DeepSpeed: pip install 'grass-dist[deepspeed]'.")
        check_ranks(config, world)
        self._config, self._world = config, world
        dtype = str(weight_dtype(config.model, world.device)).removeprefix("torch.")
        ds_config = read_ds_config(config.parallel.config)
        steps = accumulation_steps(config, world)
        self.ds_config = fill(ds_config, config.train, config.grass, accumulation=steps, dtype=dtype)
        self._setup = check(self.ds_config)
        stage = max(self._setup.stage, 1)
        self.name, self._shards_weights = f"DeepSpeed ZeRO-{stage}", stage == 3

    def load(self, task: Task | None = None) -> nn.Module:
        """Loads the model. Under ZeRO-3 each weight is sharded as it is loaded, so no device holds the whole model."""
        self._join()
        with self._zero3():
            return load_model(self._config, self._world.device, task)

    def answer(self, task: Task, model: nn.Module, prompt: str) -> str:
        device, settings = self._world.device, self._config.model
        if self._shards_weights:  # one rank alone cannot gather them, but it can load the model once more
            dtype = weight_dtype(settings, device)
            return answer_from_folder(task, resolve_model(settings.name), prompt, device, dtype=dtype)
        return task.answer(model, prompt, device)

    def start(self, model: nn.Module, layers: LayerMap, observers: Sequence[Observer]) -> DeepSpeedRun:
        from grass_dist.deepspeed import initialize

        train = self._config.train
        groups = parameter_groups(model, train.weight_decay)
        optimizer = torch.optim.AdamW(groups, **adamw_settings(train))
        with contextlib.ExitStack() as keep:
            keep.enter_context(self._zero3())
            engine, *_ = initialize(model=model, optimizer=optimizer, config=self.ds_config, observers=observers)
            return DeepSpeedRun(engine, optimizer, self._config, self._world, keep.pop_all())

    def _join(self) -> None:
        """Has DeepSpeed take over the process group, which zero.Init needs before a model is made."""
        import deepspeed

        from grass_dist.backends.zero.jit import accelerator, spare_the_compiler

        deepspeed.utils.logger.setLevel(logging.WARNING)  # it tells its whole set-up on every rank
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of names that DeepSpeed calls
        if (name := accelerator().device_name()) != self._world.device.type:
            problem = f"torch trains on {self._world.device.type} here"
            raise ConfigError("DS_ACCELERATOR", name, problem, "unset the variable")
        spare_the_compiler({})
        deepspeed.init_distributed(dist_backend=accelerator().communication_backend_name())

    @contextlib.contextmanager
    def _zero3(self) -> Iterator[None]:
        """Inside the block, transformers loads a model's weights in shards under ZeRO-3."""
        if not self._shards_weights:
            yield
            return
        from transformers.integrations import HfDeepSpeedConfig

        known = HfDeepSpeedConfig(self._setup.ds_config)  # transformers keeps a weak reference to it
        yield
        del known


class DeepSpeedRun:
    """The `Run` of an engine that `grass_dist.initialize` made."""

    def __init__(
        self, engine: Any, optimizer: torch.optim.Optimizer, config: RunConfig, world: World, keep: contextlib.ExitStack
    ) -> None:
        self.model, self.optimizer, self.grass = engine, optimizer, engine.grass
        self._accumulation, self._clip = accumulation_steps(config, world), config.train.clip_grad_norm
        self._world, self._keep = world, keep
        self.lanes = Lanes(world.device)

    def step(self, batches: Sequence[Batch], scale: torch.Tensor, loss: Loss, tell: Tell) -> Stepped:
        total = torch.zeros((), dtype=torch.float64, device=self._world.device)
        probing = self.grass.phase == "probe"
        self.lanes.begin()
        for number, batch in enumerate(batches, start=1):
            summed = loss(self.model, batch)
            # backward() divides by the steps of accumulation, and scale counts every micro-batch already.
            self.model.backward(summed * (scale * self._accumulation))
            total += summed.detach()
            if number == len(batches):
                self.lanes.end("backward")
            self.model.step()  # updates after the last one
        self.lanes.end("update")
        told = tell(total, None if probing or self._clip is None else self.model.get_global_grad_norm())
        finite = told.norm is None or math.isfinite(told.norm)
        return Stepped(told, applied=probing or (finite and not self.model.optimizer.overflow))

    def holdings(self) -> Holdings:
        return ZeroHoldings(self.model)

    @property
    def state_bytes(self) -> int:
        return self.model.optimizer.state_bytes

    @property
    def host_state_bytes(self) -> int:
        return self.model.optimizer.host_state_bytes

    def save(self, tokenizer: Any, folder: Path) -> None:
        self.grass.backend.before_read()
        module = self.model.module
        save_pretrained(module, gather_zero(module, self._world), tokenizer, folder, self._world)

    def close(self) -> None:
        self.model.destroy()
        self._keep.close()
        del self.model, self.optimizer, self.grass
        gc.collect()  # engine, module and hooks refer to each other
        if self._world.device.type == "cuda":
            torch.cuda.empty_cache()
