"""Describes the checkpoints of a run as one JSON object."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from grass_dist.checkpoint import files
from grass_dist.checkpoint.export import checked_numel, folders_of
from grass_dist.checkpoint.folders import step_of
from grass_dist.checkpoint.loading import Checkpoint, EngineState, look_at, open_checkpoint
from grass_dist.checkpoint.model import fqn
from grass_dist.checkpoint.pieces import Entries, decode
from grass_dist.checkpoint.together import together
from grass_dist.config import ADAPTERS, ROLES, GrassConfig, among_competing, check_competing, check_num_layers
from grass_dist.errors import CheckpointError, ConfigError
from grass_dist.method.samplers import make_sampler, probe_steps
from grass_dist.method.schedule import Schedule
from grass_dist.ranks import Ranks
from grass_dist.regular_files import open_regular

METRICS = "metrics.jsonl"
Units = Mapping[str, Mapping[str, Any]]
_LONGEST_LINE = 2**20
_LARGEST = 2**53


@dataclass(frozen=True, slots=True)
class Draw:
    """A "sample" event: ``layers`` train after ``step`` steps of the method."""

    step: int
    round: int
    layers: list[int]


def inspect_run(run: Path, *, fast: bool = False) -> dict[str, Any]:
    """Describes the checkpoints of a run, and the newest good one in detail, as JSON can hold it.

    Args:
        run: the folder of a run or of a checkpoint.
        fast: does not compute the checksums.

    Raises:
        CheckpointError: there is no checkpoint, or the state.json of the newest whole one contradicts itself.
    """
    rows, best = [], None
    for folder in together(Ranks(), lambda: folders_of(run)):
        row, checkpoint = _look(folder, fast)
        rows.append(row)
        best = best or checkpoint
    good = best and together(Ranks(), lambda: describe(best, run))
    if best is not None:
        best.close()
    return {"run": str(run), "checksums": not fast, "checkpoints": rows, "newest_good": good}


def _look(folder: Path, fast: bool) -> tuple[dict[str, Any], Checkpoint | None]:
    row: dict[str, Any] = {"folder": str(folder), "step": step_of(folder)}
    row |= dict.fromkeys(("saved", "ranks", "backend", "format", "bytes"))
    try:
        manifest = together(Ranks(), lambda: files.read_manifest(folder))
        row |= {"step": manifest.step, "saved": manifest.saved, "ranks": manifest.world_size}
        row |= {"backend": manifest.backend, "format": manifest.kind}
        row["bytes"] = min(files.total_bytes(manifest), _LARGEST)
        # Names and sizes of all files, the content of none.
        fast_part = (len(manifest.files), 1)
        found = together(Ranks(), lambda: look_at(folder, fast_part)) if fast else open_checkpoint(folder)
    except CheckpointError as error:
        return {**row, "health": str(error)}, None
    return {**row, "health": "good"}, found


def describe(checkpoint: Checkpoint, run: Path) -> dict[str, Any]:
    """Describes the content of a checkpoint.

    Args:
        run: the folder that may have a ``metrics.jsonl``.

    Raises:
        CheckpointError: its ``state.json`` contradicts itself.
    """
    engine, notes = checkpoint.state.engine, []
    _check(checkpoint)
    numbers = _numbers(engine)
    config, draws = _config_of(checkpoint, notes), _draws_until(engine, run)
    units = {fqn(name): _unit(checkpoint, name, entries) for name, entries in checkpoint.state.units.items()}
    phase, round = _position(engine, config, draws, bool(units))
    layers = _layers(checkpoint, units, config, draws, notes)
    counted = any(layer["times_trained"] is not None for layer in layers)
    for layer in layers:
        layer["now"] = layer["now"] and phase != "probe"
    return {
        "folder": str(checkpoint.folder),
        "step": checkpoint.step,
        "phase": phase,
        "round": round,
        "skipped": engine.skipped,
        "dropped": engine.tracker.dropped,
        "active_layers": [numbers[i] for i in engine.active_layers],
        "next": engine.next
        and {"layers": [numbers[i] for i in engine.next.active_layers], "from_step": engine.next.step},
        "times_trained_by": (METRICS if draws else files.STATE) if counted else None,
        "layers": layers,
        "roles": [unit for name, unit in units.items() if name in (*ROLES, ADAPTERS)],
        "state_bytes": sum(unit["state_bytes"] for unit in units.values()),
        "notes": notes,
    }


def _check(checkpoint: Checkpoint) -> None:
    engine = checkpoint.state.engine
    importances = engine.tracker.importances
    if not importances or any(m is not None and not 0 <= m < math.inf for m in importances):
        raise _damaged(checkpoint, "an importance is missing, or no number from 0 on")
    for layers in (engine.active_layers, *([engine.next.active_layers] if engine.next else [])):
        if len(set(layers)) != len(layers) or any(not 0 <= i < len(importances) for i in layers):
            raise _damaged(checkpoint, "it trains layers that the model does not have")
    numbers = _numbers(engine)
    if len(numbers) != len(importances) or any(b <= a for a, b in pairwise([-1, *numbers])):
        raise _damaged(checkpoint, "the numbers of its layers are not in order, or not as many as the importances")


def _numbers(engine: EngineState) -> Sequence[int]:
    """The numbers of the layers in the model's stack."""
    return engine.numbers or range(len(engine.tracker.importances))


def _damaged(checkpoint: Checkpoint, problem: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint.folder / files.STATE} is damaged: {problem}.")


def _config_of(checkpoint: Checkpoint, notes: list[str]) -> GrassConfig | None:
    """The method's configuration, if the program has saved it and it works here; else a note says why not."""
    found: Any = checkpoint.state.run
    for name in ("config", "grass"):
        if name not in found:
            return None
        found = found[name]
        if not isinstance(found, dict):
            raise _damaged(checkpoint, f"run.{name} is {found!r:.40} and no settings")
    layers = len(checkpoint.state.engine.tracker.importances)
    try:
        config = GrassConfig(**found)
        numbers = _numbers(checkpoint.state.engine)
        if list(numbers) == list(range(layers)):
            check_num_layers(config, layers)
        else:
            check_competing(config, numbers, max(numbers) + 1)
            config = among_competing(config, numbers)
        make_sampler(config, layers)
    except (ConfigError, TypeError) as error:  # of another release, or with a sampler that is registered elsewhere
        notes.append(f"The run's configuration does not work here, so that probabilities are left out: {error}")
        return None
    return config


def _position(
    engine: EngineState, config: GrassConfig | None, draws: Sequence[Draw], trained: bool
) -> tuple[str | None, int | None]:
    """The phase of the next step, and the number of the draw whose layers it trains; None if it is not known."""
    if config is not None:
        probing = probe_steps(config, make_sampler(config, len(engine.tracker.importances)))
        schedule = Schedule(probing, config.update_interval, config.sampling_interval, config.lead)
        return schedule.phase(engine.step), schedule.round(engine.step)
    if draws:
        return "train", draws[-1].round
    if engine.next is not None:
        return "train", engine.next.round - 1
    return ("train" if trained else None), None


def _probabilities(engine: EngineState, config: GrassConfig | None, notes: list[str]) -> list[float | None]:
    layers = len(engine.tracker.importances)
    if config is None:
        return [None] * layers
    importances = np.array([math.nan if m is None else m for m in engine.tracker.importances])
    try:
        with np.errstate(all="ignore"):
            found = make_sampler(config, layers).probabilities(importances).tolist()
    except ConfigError as error:
        notes.append(f"Probabilities are left out: {error}")
        return [None] * layers
    return [p if math.isfinite(p) else None for p in found]


def _unit(checkpoint: Checkpoint, name: str, entries: Entries) -> dict[str, Any]:
    """Updates of a layer or role, None if its optimizer does not count them, and the bytes of its state."""
    nbytes, counts = 0, []
    for param, state in entries.items():
        if (weight := checkpoint.manifest.weights.get(param)) is None:
            raise _damaged(checkpoint, f"{name!r:.80} has no parameter {param!r:.80}")
        numel = checked_numel(checkpoint.folder, param, weight)
        for key, entry in state.items():
            if isinstance(entry, dict) and "value" not in entry:
                nbytes += numel * decode(entry).itemsize
            elif key == "step":
                counts.append(_count(checkpoint, param, entry))
    return {"name": name, "times_trained": max(counts, default=None), "state_bytes": nbytes}


def _count(checkpoint: Checkpoint, param: str, entry: Any) -> int:
    value = entry["value"] if isinstance(entry, dict) else entry
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LARGEST:
        raise _damaged(checkpoint, f"the step of {param!r:.80} is {value!r:.40}")
    return int(value)


def _layers(
    checkpoint: Checkpoint, units: Units, config: GrassConfig | None, draws: Sequence[Draw], notes: list[str]
) -> list[dict[str, Any]]:
    engine = checkpoint.state.engine
    importances, probabilities = engine.tracker.importances, _probabilities(engine, config, notes)
    names = layer_names(checkpoint, [name for name in units if name not in (*ROLES, ADAPTERS)])
    if names is None:
        notes.append("Which weights are whose layer's is not found, so states of layers are left out.")
    counted = not units or any(unit["times_trained"] is not None for unit in units.values())
    untrained = {"name": None, "times_trained": 0 if counted else None, "state_bytes": 0}
    unknown = {"name": None, "times_trained": None, "state_bytes": None}
    rows = []
    for i, (importance, p) in enumerate(zip(importances, probabilities, strict=True)):
        known = {**units.get(names[i], untrained), "name": names[i]} if names else unknown
        row = {"layer": _numbers(engine)[i], **known, "importance": importance, "probability": p}
        row["now"] = i in engine.active_layers
        rows.append({**row, "next": i in engine.next.active_layers if engine.next else None})
    for row, times in zip(rows, _times(draws, engine.step, len(rows)), strict=True) if draws else ():
        row["times_trained"] = times
    return rows


def layer_names(checkpoint: Checkpoint, units: Sequence[str]) -> list[str] | None:
    """The FQNs of the layers that compete: the saved ones, if they hold weights, all ``units`` among them. Older
    releases saved none: then those of the largest list of numbered blocks that has them and all ``units``."""
    if saved := checkpoint.state.engine.names:
        count, homes = len(checkpoint.state.engine.tracker.importances), set()
        for key in checkpoint.manifest.weights:
            parts = key.split(".", 12)
            homes.update(".".join(parts[:at]) for at in range(1, len(parts)))
        fits = len(saved) == len(set(saved)) == count and set(units) <= set(saved) <= homes
        return list(saved) if fits else None
    stacks: dict[str, dict[str, int]] = {}
    for key, entry in checkpoint.manifest.weights.items():
        parts = key.split(".", 12)
        for at, part in enumerate(parts[:-1]):
            if part.isdecimal():
                sizes = stacks.setdefault(".".join(parts[:at]), {})
                name = ".".join(parts[: at + 1])
                sizes[name] = sizes.get(name, 0) + checked_numel(checkpoint.folder, key, entry)
    layers = len(checkpoint.state.engine.tracker.importances)
    numbers = checkpoint.state.engine.numbers
    fitting = [sizes for sizes in stacks.values() if set(units) <= set(sizes)]
    if numbers:
        fitting = [sizes for sizes in fitting if all(0 <= number < len(sizes) for number in numbers)]
    else:
        fitting = [sizes for sizes in fitting if len(sizes) == layers]
    if not fitting:
        return None
    names = list(max(fitting, key=lambda sizes: sum(sizes.values())))
    return names if not numbers else [names[number] for number in numbers]


def _draws_until(engine: EngineState, run: Path) -> list[Draw]:
    """The draws up to the checkpoint, if the run's record has all of them and agrees with the checkpoint."""
    try:
        latest = {draw.step: draw for draw in _read_draws(run / METRICS) if draw.step <= engine.step}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # it is the record of a run, or it is not
        return []
    draws = [latest[step] for step in sorted(latest)]
    whole = [draw.round for draw in draws] == list(range(len(draws)))
    layers = {i for draw in draws for i in draw.layers}
    known = layers <= set(range(len(engine.tracker.importances)))
    return draws if draws and whole and known and draws[-1].layers == engine.active_layers else []


def _read_draws(file: Path) -> Iterator[Draw]:
    with open_regular(file) as stream:
        while line := stream.readline(_LONGEST_LINE):
            if b'"sample"' not in line or not line.endswith(b"\n"):  # the last one may be half-written
                continue
            event = json.loads(line)
            if event["event"] == "sample":
                numbers = [event["step"], event["round"], *event["active_layers"]]
                if not all(type(n) is int and 0 <= n < _LARGEST for n in numbers):
                    raise ValueError("no numbers of steps and layers")
                yield Draw(numbers[0], numbers[1], numbers[2:])


def _times(draws: Sequence[Draw], now: int, layers: int) -> list[int]:
    times = [0] * layers
    for draw, end in pairwise([*draws, Draw(now, -1, [])]):
        for layer in draw.layers:
            times[layer] += end.step - draw.step
    return times
