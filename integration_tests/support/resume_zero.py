"""The same as `support/resume.py` under DeepSpeed ZeRO: an engine that stops, and goes on from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from grass_dist.checkpoint.loading import Checkpoint, load, open_checkpoint
from grass_dist.checkpoint.saving import Format, Saver
from grass_dist.checkpoint.zero_run import ZeroHoldings
from grass_dist.ranks import Ranks
from integration_tests.support.model import ADAMW, decay_groups, global_batch, schedule, small_llama
from integration_tests.support.resume import BATCH, Setting, Training
from integration_tests.support.zero import ds_config, full

GRASS = {
    "active_layers": 2,
    "sampling_interval": 4,
    "update_interval": 4,
    "probe_steps": 3,
    "draw_ahead": 2,
    "ema_alpha": 0.5,
    "temperature": 0.5,
    "seed": 3,
}


@dataclass(frozen=True)
class ZeroSetting(Setting):
    """``backend`` is zero1, zero2 or zero3."""

    kind: Format = "dcp"
    zero: dict[str, Any] = field(default_factory=dict)
    """Options of ``zero_optimization``."""


class ZeroTraining(Training):
    """`Training` on an engine."""

    def __init__(self, rank: int, world_size: int, setting: ZeroSetting) -> None:
        from grass_dist.deepspeed import initialize

        self.rank, self.world_size, self.setting, self._kind = rank, world_size, setting, setting.kind
        model = small_llama(setting.dtype)
        optimizer = torch.optim.AdamW(decay_groups(model), **ADAMW)
        config = ds_config(int(setting.backend[-1]), setting.grass, setting.accumulation, setting.dtype, setting.zero)
        self.engine, *_ = initialize(model=model, optimizer=optimizer, config=config)
        self.holdings = ZeroHoldings(self.engine)
        self.active: list[tuple[int, ...]] = []
        self.done = 0
        self._saver: Saver | None = None

    def save(self, folder: Path) -> None:
        if self._saver is None:
            ranks = Ranks(dist.new_group(backend="gloo"))
            self._saver = Saver(folder, self.holdings, ranks, keep=100, background=True, format=self._kind)
        elif (saved := self._saver.outcome()) and saved.error:
            raise saved.error
        self._saver.save(self.done, {})

    def load(self, folder: Path) -> ZeroTraining:
        return self.load_open(open_checkpoint(folder, self.holdings.ranks))

    def load_open(self, checkpoint: Checkpoint) -> ZeroTraining:
        self.to_the_bit = load(checkpoint, self.holdings)
        self.done = checkpoint.step
        self.active.clear()
        return self

    def params(self) -> dict[str, torch.Tensor]:
        return {n: full(p) for n, p in self.engine.module.named_parameters()}

    def _step(self) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = ADAMW["lr"] * schedule(self.done)
        x, accumulation = global_batch(self.done, BATCH), self.setting.accumulation
        per = BATCH // self.world_size // accumulation
        self.active.append(self.engine.grass.active_layers)
        for micro in range(accumulation):
            mine = x[(micro * self.world_size + self.rank) * per :][:per]
            self.engine.backward(self.engine(input_ids=mine, labels=mine).loss)
            self.engine.step()
        self.done += 1


def setting_of(stage: int, dtype: str, mode: str, kind: Format, grass: dict | None = None, **more: Any) -> ZeroSetting:
    grass = {**GRASS, "offload": {"mode": mode}, **(grass or {})}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return ZeroSetting(f"zero{stage}", grass, dtypes[dtype], kind=kind, **more)
