"""The controller: measures gradient norms, agrees on them with the other ranks, and says which layers train."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from grass_dist.config import GrassConfig, among_competing
from grass_dist.errors import ConfigError, GrassError, RanksDisagree, shorten
from grass_dist.events import Event, Observer, Refreshed, Sampled, Started, Traffic
from grass_dist.method.changes import ChangeLog
from grass_dist.method.importance import ImportanceTracker
from grass_dist.method.interfaces import GradientHooks, LayerStates
from grass_dist.method.measurement import SquareSums, sum_of_squares
from grass_dist.method.samplers import draw_layers, make_sampler, probe_steps
from grass_dist.method.schedule import Phase, Schedule
from grass_dist.method.spoken import about_idle, about_layers, about_run
from grass_dist.method.watch import WAYS_OUT, GradientWatch
from grass_dist.model.discovery import Unit
from grass_dist.model.stacks import bare_name
from grass_dist.ranks import note, say, tell, together


class GrassController:
    """Drives one model through probe, refreshes and draws; `GrassOptimizer.grass` is one of these.

    For each optimizer step `finish_gradients` closes the step's measurement and `advance` moves the clock.

    Over the wire: per refresh ONE all-reduce of the measured steps' sums of squares, fp64, T_u × γ × 8 bytes (T_p × L
    × 8 after the probe); per draw one all-gather of a 32-byte digest from each rank. Nothing else, and host and device
    wait for each other at refreshes and draws only.

    Attributes:
        step: optimizer steps completed, those of the probe included.
        skipped: steps that were not applied, on all ranks alike: a loss or gradient was not finite, or there was no
            backward in a step of the probe.
        switch_seconds: how long this process has been busy with switches of layers; on a GPU the copies that they begin
            run on.
        started: what the run trains, and what never trains.
        arrived: whether a backward has given a gradient since the last step ended or began anew.
        layers: those that compete, of which a `Unit.number` is the place in the model's stack.
        active_layers: indices in `layers` of those that train in the next step; all of them in the probe.
    """

    def __init__(
        self,
        config: GrassConfig,
        layers: tuple[Unit, ...],
        roles: tuple[Unit, ...],
        backend: GradientHooks,
        states: LayerStates,
        watch: GradientWatch,
        changes: ChangeLog,
        observers: Iterable[Observer] = (),
    ) -> None:
        self.config, self.layers, self.roles = config, layers, roles
        self.backend, self.states, self._watch, self._changes = backend, states, watch, changes
        self._drawn_by = among_competing(config, self.numbers)
        self._sampler = make_sampler(self._drawn_by, len(layers))
        probing = probe_steps(config, self._sampler)
        self.schedule = Schedule(probing, config.update_interval, config.sampling_interval, config.lead)
        self._tracker = ImportanceTracker([unit.numel for unit in layers], config.ema_alpha)
        self._observers = list(observers)
        self.step = 0
        self.skipped = 0
        self.switch_seconds = 0.0
        self._trained: set[int] = set()
        self.active_layers: tuple[int, ...] = tuple(range(len(layers)))
        self._next: Sampled | None = None
        # ZeRO-3 may keep its shards elsewhere, and weights may rest in host memory.
        device = backend.sharding.weights_come_to or layers[0].params[0][1].device
        alike = backend.ranks.world_size if backend.measures_alike else 1
        self._sums = SquareSums([len(unit.params) for unit in layers], device, alike)
        self.arrived = False
        self.started: Started | None = None
        backend.attach(layers, roles, self._sums.put, self._note_arrival)

    def _note_arrival(self, layer: int | None) -> None:
        self.arrived = True
        self._watch.arrived(layer)

    def start(self) -> None:
        """Begins the probe or, without one, the first round; called once, before any step."""
        for observer in self._observers:
            if self.started is not None and callable(tell_start := getattr(observer, "started", None)):
                tell_start(self.started)
        if self.phase == "probe":
            self._set_trainable()
        else:
            self._refresh_from_weights()
            self._draw()
            self._switch()

    def introduce(self, started: Started) -> None:
        """Says what this run is; `start`, which comes next, tells it to the observers."""
        self.started = started
        tell(self.backend.ranks, about_run(self.config, started, self.schedule.probe_steps))

    @property
    def phase(self) -> Phase:
        """Phase of the next optimizer step: "probe" (nothing is updated) or "train"."""
        return self.schedule.phase(self.step)

    @property
    def round(self) -> int:
        """Number of the draw whose layers are active, from 0; -1 in the probe."""
        return self.schedule.round(self.step)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The number of each of `layers` in the model's stack: 0 to L - 1, unless the user has frozen some."""
        return tuple(unit.number for unit in self.layers if unit.number is not None)

    @property
    def importances(self) -> tuple[float, ...]:
        """m_l, the mean RMS gradient of each layer; NaN where it has not been measured."""
        return tuple(self._tracker.importances.tolist())

    @property
    def probabilities(self) -> tuple[float, ...]:
        """p_l of the next draw, one float a layer."""
        return tuple(self._sampler.probabilities(self._tracker.importances).tolist())

    @property
    def dropped(self) -> int:
        """Steps whose measurement was thrown away on all ranks because a norm was not finite, as of the last
        refresh."""
        return self._tracker.dropped

    @property
    def never_trained(self) -> tuple[int, ...]:
        """Indices of the layers that have not trained in any step so far."""
        return tuple(layer for layer in range(len(self.layers)) if layer not in self._trained)

    @property
    def unused(self) -> dict[int, int]:
        """For each layer, in how many first steps of a probe or round the model left it out on this rank."""
        return dict(sorted(self._watch.unused.items()))

    def changed_since(self, step: int) -> tuple[Unit, ...]:
        """What differs from the weights as they were after ``step`` completed steps, and maybe more, never less.

        A unit is changed by each step that updates it, by loads (of a state, of a checkpoint, of weights by a module's
        ``load_state_dict``), by ``train()`` and ``eval()`` of an optimizer without a schedule, and by DeepSpeed's
        ``safe_set_*``. Steps of the probe and skipped steps change nothing. After a load every unit counts as changed
        since each step up to the highest one that this process had been at. Ranks do not communicate for it: it is the
        same on all of them if all have loaded and set the same.

        Not seen are weights that are set in another way (see `note_changed`), those of another optimizer, and buffers.

        Args:
            step: `step` at an earlier time in this process; 0 is before the first one.

        Returns:
            Layers in their order, then roles; and after a load a unit of the name "other", with the parameters that
            the method does not train. ``unit.params`` has names and parameters, with the prefixes of wrappers
            (``module.`` under DDP); ``unit.number`` is a layer's place in the model's stack. `WeightSync` takes them.

        Raises:
            ConfigError: ``step`` is negative, or higher than any that this process has been at.
        """
        if self.config.offload.update_in_backward and self.arrived and self.phase == "train":
            self._changes.note(self.layers[layer] for layer in self.active_layers)
        return self._changes.since(step)

    def note_changed(self, units: Iterable[Unit] | None = None) -> None:
        """Counts units as changed now, after their weights were set in a way that `changed_since` does not see.

        Args:
            units: of `layers` and `roles`; everything by default.
        """
        self._changes.note(units)

    @property
    def bytes_reduced(self) -> int:
        """Gradient bytes that this rank has put into reductions since the start."""
        return self.backend.bytes_reduced

    @property
    def traffic(self) -> Traffic:
        """What moving the layers' states has cost this rank since the start."""
        return self.states.harvest()

    def detach(self) -> None:
        """Takes the method's hooks off the model; nothing else is called after it."""
        self._watch.close()
        self._changes.close()
        self.backend.detach()

    def add_observer(self, observer: Observer) -> None:
        """Calls ``observer`` with every `Refreshed` and `Sampled` from now on, on this rank.

        Raises:
            ConfigError: it cannot be called.
        """
        if not callable(observer):
            fix = "give a function of one argument, the event"
            raise ConfigError("observer", type(observer).__name__, "it cannot be called", fix)
        self._observers.append(observer)

    def trainable_units(self) -> list[Unit]:
        """What has gradients in the next step: in the probe every layer and no role."""
        active = [self.layers[i] for i in self.active_layers]
        return active if self.phase == "probe" else [*active, *self.roles]

    def finish_gradients(self) -> None:
        """Makes the gradients of the global batch final, on all ranks alike. May be called again in a step.

        Raises:
            GrassError: active layers have run and got no gradient; looked at in the first step of a probe or round.
        """
        self.backend.finish_gradients()
        self.check_gradients()

    def check_gradients(self) -> None:
        """The part of `finish_gradients` that raises."""
        for layer, known in self._watch.end(self.step):
            why = (
                "since the model left it out"
                if known
                else "and is compiled, so that it may have been left out or cut off"
            )
            advice = "" if known else f" {WAYS_OUT}"
            say(
                self.backend.ranks,
                f"{self.layers[layer].name} is active and has no gradient in step {self.step + 1}, {why}; such steps "
                f"are counted in `unused`.{advice}",
            )

    def advance(self, scale: torch.Tensor | None = None) -> None:
        """Ends an optimizer step: keeps its measurement, then refreshes, draws and switches layers if that is due.

        Args:
            scale: factor of the losses of the step, an fp64 scalar on the gradients' device; None is a factor of 1.
        """
        self.arrived = False
        if self._measuring:
            self._sums.close_step(self.active_layers, scale)
        trains = self.phase == "train"
        if trains:
            self._trained.update(self.active_layers)
        self._changes.end_step(self.step + 1, self.trainable_units() if trains else ())
        self.step += 1
        if self.schedule.probe_ends(self.step) or self.schedule.refresh_due(self.step):
            self._refresh()
        if self.schedule.draw_due(self.step):
            self._draw()
        if self.schedule.switch_due(self.step):
            self._switch()
        elif self._next is not None:
            self.states.expect(self._next.active_layers, self.schedule.steps_to_switch(self.step))

    def skip_step(self) -> None:
        """Ends an optimizer step that was not applied (fp16 overflow, a NaN): the clock stands still, and what the step
        has reduced and measured is forgotten. The gradients in ``.grad`` stay; `GrassOptimizer.skip_step` drops them.
        """
        self.skipped += 1
        self.restart()

    def restart(self) -> None:
        """Starts the step anew: forgets micro-batches, reductions and measurements since the last step ended."""
        self.arrived = False
        self.backend.restart()
        self._sums.discard()
        self._watch.restart()

    @property
    def _measuring(self) -> bool:
        return self._sampler.importance == "gradient" and (self._sampler.refreshed or self.phase == "probe")

    def _refresh(self) -> None:
        if self._sampler.importance == "weight":
            self._refresh_from_weights()
        elif self._sums:
            squares, layers = self._sums.take()
            self._tracker.observe(self.backend.ranks.sum_over_ranks(squares).cpu().numpy(), layers)
        else:
            return
        self._tell(Refreshed(self.step, self.importances, self.probabilities, self.dropped))

    def _refresh_from_weights(self) -> None:
        if self._sampler.importance != "weight":
            return
        zero = torch.zeros((), dtype=torch.float64)
        own = self.backend.sharding
        mine = [
            sum((sum_of_squares(own.shard_of(p)).cpu() for _, p in unit.params if own.counts(p)), zero)
            for unit in self.layers
        ]
        self._tracker.replace(self.backend.ranks.sum_over_ranks(torch.stack(mine)).numpy())

    def _draw(self) -> None:
        drawn = self.schedule.round_drawn(self.step)
        chosen, problem = (), None
        try:
            self.backend.verify()
            sizes = [unit.numel for unit in self.layers]
            chosen = draw_layers(self._sampler, self._tracker.importances, self._drawn_by, drawn, sizes)
        except Exception as error:  # a user's sampler may raise anything, on one rank only: the others must not wait
            problem = error
        self._agree_on(drawn, chosen, problem)
        at = self.step if self.schedule.switch_due(self.step) else self.step + self.schedule.steps_to_switch(self.step)
        self._next = Sampled(at, drawn, chosen, self.probabilities, drawn_at=self.step)

    def _switch(self) -> None:
        began = time.perf_counter()
        if self._next is None:  # resumed from a state that was saved before layers were drawn ahead
            self._draw()
        assert self._next is not None
        event, self._next = dataclasses.replace(self._next, step=self.step), None
        self.active_layers = event.active_layers
        self.states.leave(self.active_layers)
        self._set_trainable()
        self.states.enter(self.active_layers)
        self.switch_seconds += time.perf_counter() - began
        probed, numbers = self.schedule.probe_ends(self.step), [self.numbers[i] for i in self.active_layers]
        if probed and (idle := [unit.name for unit, m in zip(self.layers, self.importances, strict=True) if m == 0]):
            say(self.backend.ranks, about_idle(idle, len(self.layers)))
        (tell if probed else note)(self.backend.ranks, about_layers(numbers, self.step, event.round, probed))
        self._tell(event)

    def _agree_on(self, drawn: int, chosen: tuple[int, ...], problem: Exception | None) -> None:
        importances = self._tracker.importances.astype("<f8").tobytes()
        choice = np.asarray([self.step, drawn, *chosen], dtype="<i8").tobytes()
        mine = bytes(32) if problem else hashlib.sha256(importances + choice).digest()
        digests = self.backend.ranks.gather_bytes(mine)
        if problem:
            raise problem
        if bytes(32) in digests:
            raise GrassError(f"Draw {drawn} at step {self.step} failed on rank {digests.index(bytes(32))}.")
        common = max(digests, key=digests.count)  # of two equally common ones the lowest rank's, on every rank
        if odd := [rank for rank, digest in enumerate(digests) if digest != common]:
            raise RanksDisagree(
                f"Draw {drawn} at step {self.step} came out differently on the ranks: {odd} disagree with the "
                f"other {len(digests) - len(odd)}; this rank drew {list(chosen)}. All ranks must run the same code, "
                "configuration and sampler, and call optimizer.step() equally often."
            )

    def _set_trainable(self) -> None:
        probing = self.phase == "probe"

        def switch() -> None:
            self.backend.set_trainable(self.trainable_units(), probing=probing, measuring=self._measuring)

        if probing:  # it may lack host memory on one rank
            together(self.backend.ranks, switch)
        else:
            switch()
        self._watch.begin(self.active_layers)

    def _tell(self, event: Event) -> None:
        for observer in self._observers:
            observer(event)

    def state_dict(self) -> dict:
        """Position of the run and all that the next draw depends on; measurements are those of this rank."""
        return {
            "step": self.step,
            "active_layers": list(self.active_layers),
            "next": None if self._next is None else dataclasses.asdict(self._next),
            "numbers": list(self.numbers),
            "names": self._names,
            "tracker": self._tracker.state_dict(),
            "measured": self._sums.state_dict(),
            "skipped": self.skipped,
            "trained": sorted(self._trained),
            "unused": [[layer, times] for layer, times in self.unused.items()],
        }

    def check_layers(self, state: Mapping[str, Any]) -> None:
        """Checks a state before anything is changed.

        Raises:
            ValueError: other layers compete in it.
        """
        theirs = list(state.get("numbers", range(len(state["tracker"]["importances"]))))
        if theirs != list(self.numbers):
            raise ValueError(
                f"In the saved state layers {shorten(str(theirs), 80)} compete, and here "
                f"{shorten(str(list(self.numbers)), 80)}; freeze the same ones, in the same model."
            )
        if (names := list(state.get("names", ())) or self._names) != self._names:  # an older release has none
            raise ValueError(
                f"In the saved state the layers are {shorten(str(names), 80)}, and here "
                f"{shorten(str(self._names), 80)}; use the same model and the same layers=."
            )

    @property
    def _names(self) -> list[str]:
        return [bare_name(unit.name) for unit in self.layers]

    def load_state_dict(self, state: dict) -> None:
        self.step, self.skipped = int(state["step"]), int(state.get("skipped", 0))
        self._changes.load(self.step)
        self.active_layers = tuple(state["active_layers"])
        self._tracker.load_state_dict(state["tracker"])
        self._sums.load_state_dict(state["measured"])
        self._trained = set(state.get("trained", ()))
        if not self._trained and self.step > self.schedule.probe_steps:  # an older release has not noted it
            self._trained = set(range(len(self.layers)))
        self._watch.unused = Counter(dict(state.get("unused", ())))
        waiting = state.get("next")
        self._next = _sampled(waiting) if waiting else None
        active = self.active_layers if self.phase == "train" else ()
        self.states.leave(active)
        self._set_trainable()
        self.states.enter(active)
        if self._next is not None:
            self.states.expect(self._next.active_layers, self.schedule.steps_to_switch(self.step))


def _sampled(state: dict) -> Sampled:
    chosen, probabilities = tuple(state["active_layers"]), tuple(state["probabilities"])
    return Sampled(state["step"], state["round"], chosen, probabilities, state["drawn_at"])
