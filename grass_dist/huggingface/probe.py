"""The probe of a Trainer's run, before its loop: it measures gradients and leaves everything else as it was.

Trainer's loop counts steps, steps the schedule, evaluates and logs. So none of it may see the probe. The batches are
the first ones that the loop will train on, and it trains on them again: random generators, the samplers' among them,
and what the trainer has counted are put back afterwards. From a dataset that can be read only once the probe takes its
batches away.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from grass_dist.errors import GrassError
from grass_dist.huggingface.report import GrassReport
from grass_dist.method.controller import GrassController
from grass_dist.ranks import say

MOST_COUNTED = 1000
"""Largest number of values in an attribute of a trainer that counts as one of its counters, not as data."""


def run_probe(trainer: Any, grass: GrassController, loader: Any, reports: Sequence[GrassReport] = ()) -> None:
    """Takes the steps of the probe that are left, on batches of ``loader``, through `Trainer.training_step`.

    Args:
        reports: record them.

    Raises:
        GrassError: the loader has no batch.
    """
    grass.restart()  # an earlier train() may have been interrupted within a step
    if grass.phase == "train":
        return
    if isinstance(dataset := getattr(loader, "dataset", None), Iterator):
        told = f"{type(dataset).__name__} can be read only once: the probe takes its first batches, which do not train."
        say(grass.backend.ranks, told)
    with _as_before(trainer, loader), _schedule_of_engine_stopped(trainer.model_wrapped):
        for batches, items in _steps_of(trainer, loader):
            for report in reports:
                report.begin_probe_step()
            _measure(trainer, batches, items)
            for report in reports:
                report.end_probe_step()
            if grass.phase == "train":
                break


def _steps_of(trainer: Any, loader: Any) -> Iterator[tuple[Sequence[Any], Any]]:
    """Yields the micro-batches of each step and their number of items, as Trainer's loop takes them, without end."""
    while True:
        batches, passed = iter(loader), 0
        try:
            while True:
                given = trainer.get_batch_samples(
                    batches, trainer.args.gradient_accumulation_steps, trainer.args.device
                )
                if not given[0]:
                    break
                passed += 1
                yield given
        finally:
            if hasattr(loader, "end"):  # Accelerate's loader takes itself for the active one until its last batch
                loader.end()
        if not passed:
            raise GrassError("The train dataloader has no batch for the probe, so nothing would be trained.")


def _measure(trainer: Any, batches: Sequence[Any], items: Any) -> None:
    """One step of the probe, in the way of Trainer's loop; there is no gradient left that could be clipped."""
    accelerator, model = trainer.accelerator, trainer.model_wrapped
    reduces_each = accelerator.distributed_type == "DEEPSPEED"
    trainer.current_gradient_accumulation_steps = len(batches)
    for number, batch in enumerate(batches, start=1):
        accelerator.sync_gradients = last = number == len(batches)
        with contextlib.nullcontext() if last or reduces_each else accelerator.no_sync(model):
            trainer.training_step(model, batch, items)
    trainer.optimizer.step()
    model.zero_grad()


@contextlib.contextmanager
def _schedule_of_engine_stopped(engine: Any) -> Iterator[None]:
    """A DeepSpeed engine steps the scheduler of its ds_config within `step`; others have none."""
    if (schedule := getattr(engine, "lr_scheduler", None)) is None:
        yield
        return
    engine.lr_scheduler = None
    try:
        yield
    finally:
        engine.lr_scheduler = schedule


@contextlib.contextmanager
def _as_before(trainer: Any, loader: Any) -> Iterator[None]:
    """Puts back the random generators and what the trainer counts, such as the metrics that TRL averages."""
    device = trainer.args.device
    devices = [] if device.type == "cpu" else [device]
    generators = [(generator, generator.get_state()) for generator in _generators_of(loader)]
    counted = [(holder, _counters_of(holder)) for holder in (trainer, trainer.state)]
    python, numpy = random.getstate(), np.random.get_state()  # data collators draw from both
    try:
        with torch.random.fork_rng(devices, device_type="cuda" if not devices else device.type):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in generators:
            generator.set_state(state)
        for holder, counters in counted:
            _put_back(holder, counters)


def _generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that a loader and its samplers have of their own."""
    holders, found = [loader], []
    for holder in holders:
        inner = [getattr(holder, name, None) for name in ("sampler", "batch_sampler")]
        holders += [i for i in inner if i is not None and all(i is not h for h in holders)]
        own = [getattr(holder, name, None) for name in ("generator", "synchronized_generator")]
        found += [g for g in own if isinstance(g, torch.Generator) and all(g is not f for f in found)]
    return found


_Counters = dict[str, tuple[Any, Any]]
"""By the name of an attribute: its value, and a copy."""


def _counters_of(holder: Any) -> _Counters:
    return {name: (value, copy.deepcopy(value)) for name, value in vars(holder).items() if _is_counter(value)}


def _is_counter(value: Any) -> bool:
    """Whether ``value`` is a number, a text, nothing, or a small collection of these."""
    rest, seen = [value], 0
    while rest and seen <= MOST_COUNTED:
        item, seen = rest.pop(), seen + 1
        if isinstance(item, dict | list | tuple | set | deque):
            if len(item) > MOST_COUNTED:
                return False
            rest += item.values() if isinstance(item, dict) else item
        elif item is not None and not isinstance(item, bool | int | float | str):
            return False
    return not rest


def _put_back(holder: Any, counters: _Counters) -> None:
    """Fills collections again, since others may hold them too."""
    for name, (value, before) in counters.items():
        if isinstance(value, dict | set):
            value.clear()
            value.update(before)
        elif isinstance(value, list | deque):
            value.clear()
            value.extend(before)
        setattr(holder, name, value)
