"""`GrassReport`: the record of a Trainer's run, for ``grass-dist report``."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grass_dist.events import Event, Refreshed
from grass_dist.huggingface.folder import begin_record, describe
from grass_dist.huggingface.logs import holder_of
from grass_dist.huggingface.switch import RESUMED, TRAINING
from grass_dist.method.controller import GrassController
from grass_dist.ranks import say, tell, world
from grass_dist.record.costs import StepCosts
from grass_dist.record.log import EventLog
from grass_dist.record.once import Once


class GrassReport:
    """A callback of a Trainer that records its run in ``output_dir``; ``grass-dist report`` makes the page of it.

    ``Trainer(..., callbacks=[grass_dist.GrassReport()])``, with GRASS switched on by `enable`. It is a
    `transformers.TrainerCallback`. The main process writes ``run.json``, ``config.yaml`` and, a line for each event,
    ``metrics.jsonl``; the other ranks do nothing, and need not have it.

    A step counts those of the probe: it is ``global_step`` plus the steps of the probe. Its loss is known where Trainer
    logs one, and is the mean since the log before; nothing is copied from the device for the record. Its tokens are
    those that Trainer counts, with ``include_num_input_tokens_seen``.

    A run that goes on from a checkpoint in ``output_dir`` goes on with the record: what that has of later steps is cut
    off. Any other ``train()`` begins it anew. Nothing is recorded, and one sentence says so, where the folder has a
    record of another program, where a file cannot be written, or where nothing trains by GRASS. Training goes on.
    """

    def __new__(cls, *_: Any, **__: Any) -> GrassReport:
        return object.__new__(_callback_class(cls))

    def __init__(self) -> None:
        self._run: _Run | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end_recording()  # of an earlier train
        if not state.is_world_process_zero:
            return
        holder = holder_of(kwargs.get("optimizer"))
        if holder is None:
            say(world(), "nothing trains by GRASS here, so GrassReport records nothing; call grass_dist.enable first.")
            return
        guard = Once(functools.partial(say, world()))
        with guard.around(f"GrassReport in {args.output_dir}", "the run goes on, and is not recorded"):
            self._run = _Run(holder, args, state, guard, kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run is not None:
            self._run.begin_step(kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run is not None:
            self._run.end_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._run is not None and logs:
            self._run.logged(logs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self._run is not None and metrics:
            self._run.evaluated(metrics)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run is not None:
            self._run.write_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run is not None:
            self._run.end()
            self._run.let_go()
            tell(world(), f"GRASS: grass-dist report {args.output_dir} makes the report of this run.")

    def begin_probe_step(self) -> None:
        """A step of the probe begins, before Trainer's loop."""
        if self._run is not None:
            self._run.begin_step(None)

    def end_probe_step(self) -> None:
        """The step of the probe has ended."""
        if self._run is not None:
            self._run.end_step(of_loop=False)

    def let_go(self) -> None:
        """Keeps no reference to what has trained, which another `train` may replace. Evaluations are still recorded."""
        if self._run is not None:
            self._run.let_go()

    def end_recording(self) -> None:
        """Closes the record."""
        if self._run is not None:
            self._run.close()
            self._run = None


@functools.cache
def _callback_class(cls: type) -> type:
    """The class as a callback of transformers, which is imported when the first one is made."""
    from transformers import TrainerCallback

    more = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return cls if issubclass(cls, TrainerCallback) else type(cls.__name__, (cls, TrainerCallback), more)


def reports_of(trainer: Any) -> list[GrassReport]:
    """The callbacks of a trainer that record its run."""
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, GrassReport)]


class _Run:
    """One `Trainer.train`, as it is recorded on the main process.

    Args:
        holder: what trains by GRASS.
        kwargs: what Trainer gives its callbacks besides.

    Raises:
        OSError: the record cannot be written.
    """

    def __init__(self, holder: Any, args: Any, state: Any, guard: Once, kwargs: dict[str, Any]) -> None:
        grass: GrassController = holder.grass
        self._state, self._numbers = state, grass.numbers
        self._ahead = min(grass.step, grass.schedule.probe_steps)  # steps of the probe, which global_step leaves out
        self._began, self._tokens = time.perf_counter(), state.num_input_tokens_seen
        self._step: dict[str, Any] | None = None  # that runs, or has ended and is not written
        self._written: dict[str, Any] = {}
        self._held_out: str | None = None
        found, about = describe(grass, args, state, kwargs)
        self._num_layers = len(found.layers)
        trainer = next((t for t in reversed(TRAINING) if t.state is state), None)
        goes_on = state.global_step > 0
        if trainer is not None and (folder := RESUMED.get(id(trainer))) is not None:
            goes_on = goes_on and folder.resolve().parent == Path(args.output_dir).resolve()
        lines = begin_record(Path(args.output_dir), about, args, self._number if goes_on else None)
        self._log = EventLog({str(Path(args.output_dir) / "metrics.jsonl"): lines}, guard)
        if not lines.nbytes:
            self._tell_position(grass)
        self._trains: tuple[GrassController, StepCosts] | None = grass, StepCosts(holder)
        grass.add_observer(self._observe)

    @property
    def _number(self) -> int:
        """Steps that have ended, those of the probe included."""
        return self._state.global_step + self._ahead

    def begin_step(self, optimizer: Any) -> None:
        self.write_step()
        if self._trains is None:
            return
        grass, _ = self._trains
        self._step = {
            "phase": grass.phase,
            "loss": None,
            "lr": _rate(optimizer) if grass.phase == "train" else 0.0,
            "grad_norm": None,
            "active_layers": [self._numbers[layer] for layer in grass.active_layers],
        }
        self._before, self._clock = grass.step, time.perf_counter()

    def end_step(self, of_loop: bool = True) -> None:
        if self._step is None or self._trains is None:  # a trainer that does not tell when a step begins
            return
        grass, costs = self._trains
        seconds = time.perf_counter() - self._clock
        if not of_loop:
            self._ahead += 1
        seen = self._state.num_input_tokens_seen
        self._step |= {"seconds": seconds, "applied": grass.step > self._before, "tokens": max(0, seen - self._tokens)}
        self._step |= {"number": self._number, **costs.of_step()}
        self._tokens = seen

    def logged(self, logs: dict[str, Any]) -> None:
        """Takes what Trainer has logged of the step that has just ended.

        A step that is written gets a second line, which counts: logs of an epoch come after an evaluation.
        """
        if "loss" not in logs:
            return
        if self._step is None and self._written.get("number") == self._number:
            self._step = self._written
        if self._step is not None and self._step.get("number") == self._number:
            known = {name: logs.get(name) for name in ("loss", "grad_norm")}
            self._step |= {name: value for name, value in known.items() if isinstance(value, int | float)}
            self.write_step()

    def evaluated(self, metrics: dict[str, Any]) -> None:
        """Records the held-out loss; of several data sets, of the first that was evaluated."""
        losses = [name for name in metrics if name.startswith("eval_") and name.endswith("loss")]
        self._held_out = self._held_out or next(iter(losses), None)
        if self._held_out in losses and isinstance(loss := metrics[self._held_out], int | float):
            self.write_step()
            self._log.write("eval", self._number, loss=loss)

    def write_step(self) -> None:
        """Writes the step that has ended, unless it is written."""
        if self._step is not None and "number" in self._step:
            self._written, self._step = self._step, None
            values = {name: value for name, value in self._written.items() if name != "number"}
            self._log.write("step", self._written["number"], **values)

    def end(self) -> None:
        """The training has ended; an evaluation may follow."""
        self.write_step()
        self._log.write("end", self._number, seconds=time.perf_counter() - self._began)

    def close(self) -> None:
        self.let_go()
        self._log.close()

    def let_go(self) -> None:
        self.write_step()
        self._step = self._trains = None

    def _observe(self, event: Event) -> None:
        """Writes an event of the method at the step under way, which the method counts too, but for steps skipped and
        an earlier `train` of the same optimizer.
        """
        if self._trains is not None:
            at = self._number + 1
            if not isinstance(event, Refreshed):
                event = dataclasses.replace(event, drawn_at=max(0, at - event.step + event.drawn_at))
            self._log.observe(self._of_model(dataclasses.replace(event, step=at)))

    def _tell_position(self, grass: GrassController) -> None:
        """Writes what trains now, where the record begins: a first draw comes before it."""
        at = self._number
        if any(not math.isnan(value) for value in grass.importances):
            self._log.observe(self._of_model(Refreshed(at, grass.importances, grass.probabilities, grass.dropped)))
        if grass.phase == "train":
            drawn = {"round": grass.round, "active_layers": [self._numbers[i] for i in grass.active_layers]}
            self._log.write("sample", at, **drawn, probabilities=self._spread(grass.probabilities, 0.0))

    def _of_model(self, event: Any) -> Any:
        """An event over all layers of the model: the method counts those that compete."""
        changed: dict[str, Any] = {"probabilities": self._spread(event.probabilities, 0.0)}
        if isinstance(event, Refreshed):
            changed["importances"] = self._spread(event.importances, math.nan)
        else:
            changed["active_layers"] = tuple(self._numbers[layer] for layer in event.active_layers)
        return dataclasses.replace(event, **changed)

    def _spread(self, values: Sequence[float], missing: float) -> tuple[float, ...]:
        by_number = dict(zip(self._numbers, values, strict=True))
        return tuple(by_number.get(number, missing) for number in range(self._num_layers))


def _rate(optimizer: Any) -> float:
    """The learning rate of the first parameter group; 0 where it is a tensor, which may be on a device."""
    groups = getattr(optimizer, "param_groups", None) or [{}]
    rate = groups[0].get("lr", 0.0)
    return float(rate) if isinstance(rate, int | float) else 0.0
