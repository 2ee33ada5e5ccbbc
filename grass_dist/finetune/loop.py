"""The loop of a fine-tune: steps, evaluations between them, and saves, until the last step or a signal."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from grass_dist.finetune import setup
from grass_dist.finetune.checkpoints import Checkpoints, Position, check_bad_steps
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.data.loading import Data
from grass_dist.finetune.feed import Feed
from grass_dist.finetune.metrics import MetricsLog
from grass_dist.finetune.parallel import Run
from grass_dist.finetune.progress import Reporter
from grass_dist.finetune.steps import StepResult, evaluate, train_step
from grass_dist.finetune.tasks.base import Task
from grass_dist.job.signals import LeaveSignals
from grass_dist.job.world import World
from grass_dist.record.costs import StepCosts
from grass_dist.record.speed import Speed, told


@dataclass
class Loop:
    """One fine-tune from where it is to its end.

    Args:
        log: on the main rank.
        signals: that ask it to leave; whoever has made them keeps them until the model is written.
        state: for a checkpoint, what the program has besides the position.
    """

    config: RunConfig
    world: World
    run: Run
    data: Data
    task: Task
    reporter: Reporter
    log: MetricsLog | None
    speed: Speed
    checkpoints: Checkpoints
    signals: LeaveSignals
    state: Callable[[], dict[str, Any]]

    def train(self, start: Position) -> int | None:
        """All optimizer steps after ``start``, with evaluations between them.

        Returns:
            The signal that asked the run to leave before the end, after it was saved; None: all steps are done.

        Raises:
            GrassError: on every rank: see `Checkpoints.save` and `check_bad_steps`.
        """
        feed = Feed(self.config, self.data, self.task, self.world, start.step + 1)
        try:
            return self._train(start, feed)
        finally:
            feed.close()

    def _train(self, start: Position, feed: Feed) -> int | None:
        settings, at = self.config.train, start
        scheduler, costs = self._scheduler(start), StepCosts(self.run)
        self.signals.hold()
        saved = start.step
        while True:
            asked = self._evaluate(at.step, feed)
            if asked is None:
                if at.step >= settings.max_steps:
                    break
                result, asked = self._step(at, feed, scheduler, costs)
                at = Position(at.step + 1, scheduler.last_epoch, at.bad_steps + 1 if result.bad else 0)
                check_bad_steps(at.bad_steps, self.config, at.step)
            if asked is not None:
                if at.step != saved:  # after an evaluation it may be
                    self._save(at, leaving=True)
                self.checkpoints.close()
                return asked
            if self.checkpoints.due(at.step):
                self._save(at)
                saved = at.step
        self.checkpoints.close()
        return None

    def _step(
        self,
        at: Position,
        feed: Feed,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        costs: StepCosts,
    ) -> tuple[StepResult, int | None]:
        step = at.step + 1
        waits = time.perf_counter()
        with self.world.during(f"the reading of the data of step {step}"):
            data = feed.take()
        grass = self.run.grass
        numbers = [grass.numbers[i] for i in grass.active_layers]
        roles = {unit.name for unit in grass.trainable_units() if unit.index is None}
        phase, active, rate = grass.phase, grass.active_layers, scheduler.get_last_lr()[0]
        began = time.perf_counter()

        def flags() -> list[float]:
            return [self.checkpoints.flag(), *self.signals.flags()]

        result = train_step(self.run, data, self.task, self.world, step, flags)
        if phase == "train" and result.applied:
            scheduler.step()
        seconds = time.perf_counter() - began
        fast = self.speed.of_step(numbers, roles, result.positions, result.tokens, seconds + began - waits)
        self.reporter.step(step, phase, result.loss, seconds, told(fast))
        if result.bad:
            self.reporter.bad_step(step, result.loss, result.grad_norm)
        spent = costs.of_step()
        if self.log:
            did = {"phase": phase, "active_layers": active, "lr": rate if phase == "train" else 0.0, "seconds": seconds}
            gave = {name: getattr(result, name) for name in ("loss", "grad_norm", "applied", "tokens")}
            lanes = {f"{lane}_seconds": took for lane, took in self.run.lanes.seconds().items()}
            self.log.write("step", step, **did, **gave, **fast, data_seconds=began - waits, **lanes, **spent)
        saved, *asked = result.flags
        self.checkpoints.poll(saved)
        return result, self.signals.agreed(asked)

    def _asked(self) -> int | None:
        """The signal that some rank has got, the same on all."""
        return self.signals.agreed(self.world.sum(*self.signals.flags()))

    def _evaluate(self, step: int, feed: Feed) -> int | None:
        """Evaluates if it is time to; returns the signal that came meanwhile and has ended it."""
        settings = self.config.train
        last = step == settings.max_steps
        if not len(self.data.held_out):
            return None
        if step == 0 or last or (settings.eval_every and step % settings.eval_every == 0):
            feed.settle()
            with self.world.during(f"the evaluation after step {step}"):
                micro, leaves = settings.micro_batch_size, lambda: self._asked() is not None
                found = evaluate(self.run.model, self.data.held_out, micro, self.task, self.world, leaves)
                if found is None:
                    return self._asked()
            self.reporter.held_out(step, **found)
            if self.log:
                self.log.write("eval", step, **found)
        return None

    def _save(self, at: Position, *, leaving: bool = False) -> None:
        with self.world.during(f"the checkpoint of step {at.step}"):
            state = {**self.state(), "step": at.step, "updates": at.updates, "bad_steps": at.bad_steps}
            self.checkpoints.save(at.step, state, leaving=leaving)

    def _scheduler(self, start: Position) -> torch.optim.lr_scheduler.LambdaLR:
        settings = self.config.train
        for group in self.run.optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # train.learning_rate, or that of the adapters
        factor = setup.learning_rate_factor(settings, settings.max_steps - self.run.grass.schedule.probe_steps)
        return torch.optim.lr_scheduler.LambdaLR(self.run.optimizer, factor, last_epoch=start.updates - 1)
