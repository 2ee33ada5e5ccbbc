"""A training that is stopped, and goes on from a checkpoint: on as many ranks, on others, under another backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import grass_dist
from grass_dist.checkpoint.loading import load, open_checkpoint
from grass_dist.checkpoint.saving import Saver
from grass_dist.events import Event
from grass_dist.ranks import Ranks
from integration_tests.support.model import ADAMW, CLIP, decay_groups, global_batch, schedule, small_llama, wrapped
from integration_tests.support.parallel import data_place
from integration_tests.support.training import full

BATCH = 12
"""Sequences of a global batch: for 1, 2, 3 and 4 ranks."""


@dataclass(frozen=True)
class Setting:
    """How a training runs."""

    backend: str
    grass: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    accumulation: int = 1
    background: bool = True


class Training:
    """A model that trains on `global_batch`, from the start or from a checkpoint."""

    def __init__(self, rank: int, world_size: int, setting: Setting) -> None:
        self.rank, self.world_size, self.setting = rank, world_size, setting
        low = setting.dtype != torch.float32
        model = wrapped(small_llama(setting.dtype), setting.backend, world_size, torch.float32 if low else None)
        self.model, self.done = model, 0
        self.events: list[tuple[int, Event]] = []  # refreshes and switches, by the step that they end
        self.optimizer = grass_dist.GrassOptimizer(
            model,
            torch.optim.AdamW,
            ADAMW,
            config=grass_dist.GrassConfig(**setting.grass),
            params=decay_groups(model),
            gradient_accumulation_steps=setting.accumulation,
            observers=[lambda event: self.events.append((self.done + 1, event))],
        )
        self.active: list[tuple[int, ...]] = []
        self._saver: Saver | None = None

    def run(self, until: int, save_at: Sequence[int] = (), folder: Path | None = None) -> Training:
        while self.done < until:
            self._step()
            if self.done in save_at:
                assert folder is not None
                self.save(folder)
        if self._saver and (saved := self._saver.outcome()) and saved.error:
            raise saved.error
        return self

    def save(self, folder: Path) -> None:
        if self._saver is None:
            group = dist.new_group(backend="gloo") if self.world_size > 1 else None
            ranks, holdings, background = Ranks(group), self.optimizer.holdings(), self.setting.background
            self._saver = Saver(folder, holdings, ranks, keep=100, background=background)
        elif (saved := self._saver.outcome()) and saved.error:
            raise saved.error
        self._saver.save(self.done, {})

    def load(self, folder: Path) -> Training:
        checkpoint = open_checkpoint(folder, self.optimizer.holdings().ranks)
        load(checkpoint, self.optimizer.holdings())
        self.done = checkpoint.step
        return self

    def params(self) -> dict[str, torch.Tensor]:
        return {n.removeprefix("module."): full(p).clone() for n, p in self.model.named_parameters()}

    def _step(self) -> None:
        for group, start in zip(self.optimizer.param_groups, (1e-3, 1e-3), strict=True):
            group["lr"] = start * schedule(self.done)
        x, accumulation = global_batch(self.done, BATCH), self.setting.accumulation
        place, places = data_place(self.setting.backend, self.rank, self.world_size)
        per = BATCH // places // accumulation
        self.active.append(self.optimizer.grass.active_layers)
        for micro in range(accumulation):
            mine = x[(micro * places + place) * per :][:per]
            (self.model(input_ids=mine, labels=mine).loss / accumulation).backward()
        self.optimizer.clip_grad_norm_(CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1


def leg(
    rank: int, world_size: int, setting: Setting, source: str | None, steps: int, save_at: int, folder: str
) -> dict:
    """One leg of a training that changes its ranks: from ``source`` on, saves at ``save_at``, goes on for a while."""
    training = Training(rank, world_size, setting)
    if source is not None:
        training.load(Path(source))
    training.run(steps, [save_at], Path(folder))
    return {"params": training.params(), "active": training.active}
