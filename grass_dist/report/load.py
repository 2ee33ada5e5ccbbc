"""Reads the folder of a run: run.json, config.yaml and metrics.jsonl, whose last line may be half-written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from grass_dist.errors import GrassError
from grass_dist.regular_files import open_regular, read_regular

LARGEST_INFO, LARGEST_CONFIG = 2**24, 2**20
"""Largest sizes of run.json and of config.yaml, in bytes."""
LONGEST_LINE = 2**24
"""Largest size of a line of metrics.jsonl, in bytes; a model of a thousand layers has lines of 40 kB."""
MOST_EVENTS = 5_000_000

Count = Annotated[int, Field(ge=0, lt=2**63)]
StepNumber = Annotated[int, Field(ge=0, lt=2**53)]
Measured = Annotated[float | None, AfterValidator(lambda x: x if x is not None and math.isfinite(x) else None)]
"""A number that was measured; None if it is missing, infinite or not a number."""


@dataclass(frozen=True, slots=True)
class ExamplePiece:
    """A part of an example: a special token, or text between two."""

    text: str
    learnt: bool
    special: bool


@dataclass(frozen=True, slots=True)
class ShownExample:
    """A training example as the model sees it; ``tokens`` and ``learnt`` are numbers of tokens."""

    tokens: int
    learnt: int
    pieces: tuple[ExamplePiece, ...]


@dataclass(frozen=True, slots=True)
class RunInfo:
    """run.json: what was trained, on what, and with which settings."""

    name: str
    model: str
    backend: str
    world_size: Annotated[int, Field(ge=1, lt=2**31)]
    device: str
    dtype: str
    num_layers: Annotated[int, Field(ge=1, le=100_000)]
    layer_names: tuple[str, ...]
    layer_numel: tuple[Count, ...]
    params_total: Annotated[int, Field(ge=1, lt=2**63)]
    params_always_active: Count
    grass: dict[str, Any]
    train: dict[str, Any]
    data: dict[str, Any]
    started: str = ""
    versions: dict[str, Any] | None = None
    hosts: tuple[str, ...] = ()
    """Host of each rank; empty where it was not recorded."""
    replicate: Annotated[int, Field(ge=1)] = 1
    """Replicas of the sharded model (HSDP)."""
    frozen_layers: tuple[int, ...] = ()
    """Layers that the user has frozen, so that they do not compete."""
    trains: dict[str, Any] | None = None
    """What trained at every step and what never did, as the run's start said it; None in older records."""
    recorded_by: str = ""
    """Names the program, where it is not the training program of this package."""
    example: ShownExample | None = None
    """The first training example; None in older records."""


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One step, after which the optimizer has done ``step`` steps."""

    step: StepNumber
    phase: Literal["probe", "train"]
    loss: Measured
    lr: float
    grad_norm: Measured
    seconds: float
    tokens: Count
    bytes_reduced: Count
    state_bytes: Count
    active_layers: tuple[int, ...]
    host_state_bytes: Count = 0
    bytes_to_device: Count = 0
    bytes_to_host: Count = 0
    weight_bytes_to_device: Count = 0
    weight_bytes_to_host: Count = 0
    transfer_seconds: float = 0.0
    wait_seconds: float = 0.0
    switch_seconds: float = 0.0
    tokens_per_second: Measured = None
    """None in older records, and where something else records; so are the fields below."""
    flops_per_second: Measured = None
    mfu: Measured = None
    data_seconds: Measured = None
    backward_seconds: Measured = None
    update_seconds: Measured = None


@dataclass(frozen=True, slots=True)
class EvalEvent:
    """The held-out loss after ``step`` steps, and the metrics of the task; None where it has no such metric."""

    step: StepNumber
    loss: Measured
    perplexity: Measured = None
    accuracy: Measured = None
    f1: Measured = None


@dataclass(frozen=True, slots=True)
class RefreshEvent:
    """New importances and probabilities after ``step`` steps; an importance is None until it is measured."""

    step: StepNumber
    importances: tuple[Measured, ...]
    probabilities: tuple[Measured, ...]
    dropped: Count


@dataclass(frozen=True, slots=True)
class SampleEvent:
    """The draw of the layers that train after ``step`` steps, made after ``drawn_at``; None in older records."""

    step: StepNumber
    round: StepNumber
    active_layers: tuple[int, ...]
    probabilities: tuple[Measured, ...]
    drawn_at: StepNumber | None = None


@dataclass(frozen=True, slots=True)
class AnswerEvent:
    """Holds what the model answered before or after the training."""

    when: Literal["before", "after"]
    prompt: str
    text: str
    expected: str | None = None


@dataclass(frozen=True, slots=True)
class EndEvent:
    """The run came to its end after ``step`` steps and ``seconds`` seconds."""

    step: StepNumber
    seconds: float


RecordEvent = StepEvent | EvalEvent | RefreshEvent | SampleEvent | AnswerEvent | EndEvent

_EVENTS: dict[str, TypeAdapter[RecordEvent]] = {
    kind.__name__.removesuffix("Event").lower(): TypeAdapter(kind) for kind in get_args(RecordEvent)
}
"""How each kind of line is read, by its "event"."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Training steps ``first`` to ``last``, both included, that trained the same layers."""

    first: int
    last: int
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as it was recorded; events are in the order of their steps."""

    folder: Path
    info: RunInfo
    config_text: str
    steps: tuple[StepEvent, ...] = ()
    evals: tuple[EvalEvent, ...] = ()
    refreshes: tuple[RefreshEvent, ...] = ()
    samples: tuple[SampleEvent, ...] = ()
    answers: tuple[AnswerEvent, ...] = ()
    end: EndEvent | None = None
    notes: tuple[str, ...] = ()
    """Sentences about what the record lacks, for the reader of the page."""

    @property
    def begins_at(self) -> int:
        """The first step that was recorded; 1 where there is none."""
        return self.steps[0].step if self.steps else 1

    @property
    def probe_steps(self) -> list[StepEvent]:
        """The steps that measured every layer and trained none."""
        return [step for step in self.steps if step.phase == "probe"]

    @property
    def train_steps(self) -> list[StepEvent]:
        """The steps that trained their active layers."""
        return [step for step in self.steps if step.phase == "train"]

    def times_trained(self) -> list[int]:
        """Number of training steps of each layer; steps of the probe, which train no layer, do not count."""
        counts = [0] * self.info.num_layers
        for step in self.train_steps:
            for layer in step.active_layers:
                counts[layer] += 1
        return counts

    def staleness(self) -> list[int | None]:
        """Steps of the run since each layer trained last; None where it never has."""
        last: dict[int, int] = {layer: step.step for step in self.train_steps for layer in step.active_layers}
        end = self.steps[-1].step if self.steps else 0
        return [end - last[layer] if layer in last else None for layer in range(self.info.num_layers)]

    def intervals(self) -> list[Interval]:
        """The training steps, cut where the trained layers change."""
        found: list[Interval] = []
        for step in self.train_steps:
            layers = tuple(sorted(step.active_layers))
            if found and found[-1].layers == layers and found[-1].last == step.step - 1:
                found[-1] = Interval(found[-1].first, step.step, layers)
            else:
                found.append(Interval(step.step, step.step, layers))
        return found

    def probability_events(self) -> list[RefreshEvent | SampleEvent]:
        """Returns the events that have sampling probabilities, in the order of the steps; a draw is at its own step."""
        draws = [event if event.drawn_at is None else replace(event, step=event.drawn_at) for event in self.samples]
        return sorted([*self.refreshes, *draws], key=lambda event: event.step)


def relative(importances: Sequence[float | None]) -> list[float | None]:
    """Returns importances over the mean of the measured ones; None for one not measured, for all if the mean is 0."""
    measured = [value for value in importances if value is not None]
    mean = sum(measured) / len(measured) if measured else 0.0
    return [value / mean if value is not None and mean > 0 else None for value in importances]


def load_run(folder: Path) -> RunRecord:
    """Reads the run in ``folder``, whoever has made it: only plain files in it, following no link.

    Raises:
        GrassError: the folder, run.json or metrics.jsonl is missing, is not that of a run, or is damaged anywhere
            but in the last line of metrics.jsonl; or one of them is a link, a pipe or too large.
    """
    if not folder.is_dir():
        raise GrassError(f"{folder}: there is no such folder; give the folder of a run, e.g. runs/NAME.")
    info = _read_info(folder / "run.json")
    events, notes = _read_events(folder / "metrics.jsonl", info.num_layers)
    ends = [event for event in events if isinstance(event, EndEvent)]
    if not ends:
        notes.append("The record has no end: the run was cut off, or was still going when this page was made.")
    record = RunRecord(
        folder=folder,
        info=info,
        config_text=_read_config(folder / "config.yaml", notes),
        steps=_by_step(event for event in events if isinstance(event, StepEvent)),
        evals=_by_step(event for event in events if isinstance(event, EvalEvent)),
        refreshes=_by_step(event for event in events if isinstance(event, RefreshEvent)),
        samples=_by_step(event for event in events if isinstance(event, SampleEvent)),
        answers=tuple(event for event in events if isinstance(event, AnswerEvent)),
        end=ends[-1] if ends else None,
    )
    if record.begins_at > 1:
        notes.append(f"The record begins at step {record.begins_at}: what the run did before is not on this page.")
    return replace(record, notes=tuple(notes))


_Stepped = TypeVar("_Stepped", StepEvent, EvalEvent, RefreshEvent, SampleEvent)


def _by_step(events: Iterable[_Stepped]) -> tuple[_Stepped, ...]:
    """Sorts events by step. A resumed run repeats some steps: the later record of a step counts."""
    latest = {event.step: event for event in events}
    return tuple(latest[step] for step in sorted(latest))


def _read_info(path: Path) -> RunInfo:
    with _readable(path):
        content = read_regular(path, LARGEST_INFO)
    try:
        info = TypeAdapter(RunInfo).validate_python(json.loads(content))
    except ValidationError as error:
        raise GrassError(f"{path}: this is not the record of a run; {_first_problem(error)}.") from None
    except (ValueError, RecursionError) as error:
        raise GrassError(f"{path}: this is not JSON; {_lower(str(error))}.") from None
    for field, value in (("layer_names", info.layer_names), ("layer_numel", info.layer_numel)):
        if len(value) != info.num_layers:
            raise GrassError(
                f"{path}: {field} has {len(value)} entries and num_layers={info.num_layers}; they must be as many."
            )
    return info


def _read_events(path: Path, num_layers: int) -> tuple[list[RecordEvent], list[str]]:
    """Reads all events that this version knows, and the note about a half-written last line."""
    events: list[RecordEvent] = []
    broken: tuple[int, Exception] | None = None
    with _readable(path), open_regular(path) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), b""), start=1):
            if not line.strip():
                continue
            if broken is not None:  # so it was not the last one
                number, error = broken
                problem = _first_problem(error) if isinstance(error, ValidationError) else _lower(str(error))
                raise GrassError(f"{path}, line {number}: this line is damaged; {problem}.")
            try:
                if len(line) > LONGEST_LINE:
                    raise ValueError(f"it has more than {LONGEST_LINE} bytes")
                event = _parse(line, num_layers)
            except (ValueError, RecursionError) as error:
                broken = number, error
                continue
            if event is not None:
                events.append(event)
            if len(events) > MOST_EVENTS:
                raise GrassError(f"{path}: this record has more than {MOST_EVENTS} events, which a page cannot show.")
    if broken is None:
        return events, []
    return events, [f"The last line of metrics.jsonl (line {broken[0]}) was half-written; it is left out."]


def _parse(line: bytes, num_layers: int) -> RecordEvent | None:
    """Returns the event of a line; None for a kind of event that this version does not know."""
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        raise ValueError('it is not an object with an "event"')
    adapter = _EVENTS.get(record["event"])
    if adapter is None:
        return None
    encodable = {k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in record.items()}
    event = adapter.validate_python(encodable)
    if isinstance(event, StepEvent | SampleEvent):
        if any(not 0 <= i < num_layers for i in event.active_layers):
            raise ValueError(f"active_layers names a layer outside 0 to {num_layers - 1}")
        if len(event.active_layers) > num_layers:
            raise ValueError(f"active_layers names {len(event.active_layers)} of {num_layers} layers")
    for field in ("importances", "probabilities"):
        values = getattr(event, field, None)
        if values is not None and len(values) != num_layers:
            raise ValueError(f"{field} has {len(values)} entries for {num_layers} layers")
    return event


def _read_config(path: Path, notes: list[str]) -> str:
    try:
        return read_regular(path, LARGEST_CONFIG).decode("utf-8", errors="replace")
    except FileNotFoundError:
        notes.append("The folder has no config.yaml.")
    except OSError as error:
        notes.append(f"The folder's config.yaml was not read: {error.strerror}.")
    return ""


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says of a file that cannot be read whose it should be."""
    try:
        yield
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        problem = "this file is missing" if missing else f"this file cannot be read ({error.strerror})"
        raise GrassError(f"{path}: {problem}, so {path.parent} is not the folder of a run.") from None


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    return f"{field}: {_lower(first['msg'])}" if field else _lower(first["msg"])


def _lower(sentence: str) -> str:
    return (sentence[:1].lower() + sentence[1:]).rstrip(".")
