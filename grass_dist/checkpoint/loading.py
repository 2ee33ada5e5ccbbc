"""Loading: every file of a checkpoint is checked before anything of the run is changed."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from math import inf, isfinite
from pathlib import Path
from reprlib import repr as shown
from typing import Annotated, Any

import torch
from pydantic import FailFast, Field

from grass_dist.checkpoint import files, folders
from grass_dist.checkpoint.dcp import TensorReader, open_tensors
from grass_dist.checkpoint.deepspeed_files import open_deepspeed
from grass_dist.checkpoint.files import Stored, up_to_a_wrong_one
from grass_dist.checkpoint.per_rank import MEASURED, measured_of, read_rng
from grass_dist.checkpoint.pieces import MARK, Entries, Holdings, decode, dtype_name, state_key
from grass_dist.checkpoint.together import together
from grass_dist.errors import CheckpointError, shorten
from grass_dist.method.saved import SETTINGS, other_settings
from grass_dist.ranks import Ranks
from grass_dist.states.layer_state import MASTER
from grass_dist.states.update_rule import HOW

_ALL = {dtype_name(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_DTYPES = {name: dtype for name, dtype in _ALL.items() if not name.startswith("q")}
"""All dtypes by their names, without the quantized ones."""

_MOST_RANKS = 2**20

Layers = Annotated[list[int], FailFast()]


class TrackerState(Stored):
    importances: Annotated[list[float | None], FailFast()]
    dropped: int = Field(ge=0)


class NextState(Stored):
    step: int
    round: int
    active_layers: Layers
    probabilities: Annotated[list[float], FailFast()]
    drawn_at: int


class MeasuredState(Stored):
    layers: Annotated[list[Layers], FailFast()]


class EngineState(Stored):
    step: int = Field(ge=0, lt=2**53)
    active_layers: Layers
    numbers: Layers = []
    """The numbers, in the model's stack, of the layers that compete. Empty in checkpoints of older releases."""
    names: Annotated[list[str], FailFast()] = []
    """The FQNs of these layers. Empty in checkpoints of older releases."""
    next: NextState | None
    tracker: TrackerState
    measured: MeasuredState
    skipped: int = Field(default=0, ge=0)
    trained: Layers = []
    unused: Annotated[list[Annotated[list[int], Field(min_length=2, max_length=2)]], FailFast()] = []
    settings: dict[str, Any] = {}
    """See `settings_of`. Empty in checkpoints of older releases."""


def _is_unit(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(state, dict) for state in value.values())


UnitState = Annotated[dict[str, dict[str, Any]], up_to_a_wrong_one(lambda state: isinstance(state, dict))]


class State(Stored):
    """``state.json``."""

    engine: EngineState
    groups: Annotated[list[dict[str, Any]], FailFast()]
    units: Annotated[dict[str, UnitState], up_to_a_wrong_one(_is_unit)]
    run: dict[str, Any]
    deepspeed: dict[str, Any] | None = None
    """`Layout` of DeepSpeed's files, in a checkpoint in its format."""


class Checkpoint:
    """A checkpoint that `open_checkpoint` has checked. Its run keeps it until it is closed; a context manager.

    Args:
        hold: the descriptor that `folders.hold` returned.
    """

    def __init__(self, folder: Path, manifest: files.Manifest, state: State, hold: int | None = None) -> None:
        self.folder, self.manifest, self.state = folder, manifest, state
        self._release = None if hold is None else weakref.finalize(self, os.close, hold)

    def close(self) -> None:
        """Ends the reading: the run may remove the checkpoint."""
        if self._release is not None:
            self._release()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def step(self) -> int:
        return self.manifest.step

    def tensors(self) -> TensorReader:
        """Opens its tensors, in either format."""
        if self.manifest.kind == "dcp":
            return open_tensors(self.folder / files.TENSORS)
        return open_deepspeed(self.folder, self.manifest, self.state.deepspeed, self.state.units)


def open_checkpoint(folder: Path, ranks: Ranks | None = None) -> Checkpoint:
    """Checks every file of a checkpoint; the ranks share that work.

    Raises:
        CheckpointError: on every rank, the first thing that is wrong with it.
    """
    ranks = ranks or Ranks()
    return together(ranks, lambda: look_at(folder, (ranks.rank, ranks.world_size)))


def look_at(folder: Path, part: tuple[int, int] = (0, 1)) -> Checkpoint:
    """Opens a checkpoint and verifies a part of its files; see `files.verify`.

    Raises:
        CheckpointError: the first thing that is wrong with it.
    """
    hold = folders.hold(folder)
    try:
        manifest = files.read_manifest(folder)
        files.verify(folder, manifest, part)
        return Checkpoint(folder, manifest, read_state(folder, manifest), hold)
    except BaseException:
        if hold is not None:
            os.close(hold)
        raise


def read_state(folder: Path, manifest: files.Manifest) -> State:
    if files.STATE not in manifest.files:
        raise CheckpointError(f"{folder} has no {files.STATE}.")
    return files.parse(State, files.read_json(folder / files.STATE), folder / files.STATE)


def newest_good(
    parent: Path, ranks: Ranks | None = None, tell: Callable[[str], None] = lambda _: None
) -> Checkpoint | None:
    """Opens the newest checkpoint below ``parent`` that is whole; None if there is none.

    Args:
        tell: called with a sentence on each newer one, which says what is wrong with it.
    """
    ranks = ranks or Ranks()
    found = together(ranks, lambda: folders.checkpoints_in(parent) if ranks.rank == 0 else None)
    for folder in ranks.gather_objects(found)[0] or []:
        try:
            return open_checkpoint(folder, ranks)
        except CheckpointError as error:
            tell(f"{error} Going back to the checkpoint before it.")
    return None


def load(checkpoint: Checkpoint, holdings: Holdings) -> bool:
    """Puts weights, states, method and random numbers of a checkpoint into a run. Called on every rank.

    The run must be built with the same model, parameter groups and method. The number of ranks, the wrapper, the ZeRO
    stage, offloading and micro-batches may differ.

    Returns:
        Whether the run goes on to the bit. It does not on another number of ranks, which have no random numbers there.

    Raises:
        CheckpointError: on every rank. If the checkpoint is of another run, nothing has been changed.
    """
    state, manifest, ranks = checkpoint.state, checkpoint.manifest, holdings.ranks
    described = holdings.describe()
    together(ranks, lambda: _check_fits(checkpoint, holdings, described))
    reader = together(ranks, checkpoint.tensors)
    with torch.no_grad():
        together(ranks, lambda: _check_tensors(reader, manifest, state))
        if manifest.kind == "deepspeed":  # only what is opened is known to be tensors
            together(ranks, lambda: reader.try_all((ranks.rank, ranks.world_size)))
        measured = together(
            ranks, lambda: measured_of(state.engine.measured.layers, manifest.world_size, ranks, reader.read)
        )
        rng = together(ranks, lambda: read_rng(reader.tensors, manifest.world_size, ranks, reader.read))
        wanted = [(p.key, p.start, p.tensor) for p in holdings.weights() if p.tensor.numel()]
        together(ranks, lambda: reader.read_all(wanted))
        engine = {**state.engine.model_dump(), "measured": measured}
        groups = [{k: v for k, v in group.items() if k not in HOW} for group in state.groups]
        holdings.restore({"engine": engine, "groups": groups}, state.units, reader.read)
        together(ranks, lambda: [put(own) for put, own in rng or ()])
    return rng is not None


def _check_fits(checkpoint: Checkpoint, holdings: Holdings, described: Mapping[str, Any]) -> None:
    where, manifest, state = checkpoint.folder, checkpoint.manifest, checkpoint.state
    if manifest.world_size > _MOST_RANKS:
        raise CheckpointError(f"{where / files.MANIFEST} is damaged: no {manifest.world_size!r:.40} ranks saved it.")
    shapes = holdings.shapes()
    if odd := sorted(set(shapes) ^ set(manifest.weights)):
        side = (
            "the model has and the checkpoint has not" if odd[0] in shapes else "the checkpoint has and the model not"
        )
        raise CheckpointError(f"{where} is of another model: {odd[0]!r:.80} is one of {len(odd)} tensors that {side}.")
    dtypes = {piece.key: dtype_name(piece.tensor.dtype) for piece in holdings.weights()}
    for key, entry in manifest.weights.items():
        if tuple(entry.shape) != shapes[key]:
            raise CheckpointError(
                f"{where} is of another model: {key} is of shape {shown(entry.shape):.60} there and {shapes[key]} here."
            )
        if entry.dtype not in _DTYPES:
            raise CheckpointError(f"{where / files.MANIFEST} is damaged: {key} is in {entry.dtype!r:.40}.")
        if entry.dtype != dtypes[key]:
            raise CheckpointError(
                f"{where} holds {key} in {entry.dtype}, and this run trains it in {dtypes[key]}: set "
                f"model.dtype={entry.dtype}."
            )
    if told := other_settings(state.engine.model_dump(), described["engine"][SETTINGS]):
        raise CheckpointError(f"{where}: {told}")
    _check_groups(where, state.groups, described["groups"])
    _check_engine(where, state, described["engine"], holdings.active, holdings.unit_names())
    _check_units(where, state.units, manifest)
    holdings.check(state.engine.model_dump(), state.groups, state.units)


def _check_groups(where: Path, saved: Sequence[Mapping[str, Any]], mine: Sequence[Mapping[str, Any]]) -> None:
    if len(saved) != len(mine):
        raise CheckpointError(f"{where} has {len(saved)} parameter groups and this run {len(mine)}.")
    for theirs, own in zip(saved, mine, strict=True):
        for key, value in theirs.items():
            if key == "params" or (key not in HOW and key in own and not _is_like(value, own[key])):
                raise _damaged(where, f"{key!r:.60} of a parameter group is {shown(value):.60}")


def _is_like(value: Any, own: Any) -> bool:
    """Whether the saved setting of a parameter group can replace this run's ``own``."""
    if isinstance(own, list | tuple):
        same = isinstance(value, list) and len(value) == len(own)
        return same and all(_is_like(v, o) for v, o in zip(value, own, strict=True))
    if own is None:
        return not isinstance(value, list | dict)
    if isinstance(own, bool | str) or value is None:
        return type(value) is type(own)
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _check_engine(where: Path, state: State, mine: Mapping[str, Any], active: int, units: Sequence[str]) -> None:
    layers = len(mine["tracker"]["importances"])
    engine, importances = state.engine, state.engine.tracker.importances
    chosen = [engine.active_layers, *engine.measured.layers, *([engine.next.active_layers] if engine.next else [])]
    if len(importances) != layers:
        raise CheckpointError(f"{where} is of a model with {len(importances)} layers, and this one has {layers}.")
    if engine.numbers and engine.numbers != mine["numbers"]:
        theirs, ours = (shorten(", ".join(map(str, numbers)), 120) for numbers in (engine.numbers, mine["numbers"]))
        raise CheckpointError(f"{where}: layers {theirs} compete in it, and in this run {ours}; freeze the same ones.")
    if engine.names and engine.names != mine["names"]:
        theirs, ours = (shorten(", ".join(names), 120) for names in (engine.names, mine["names"]))
        raise CheckpointError(f"{where}: the layers are {theirs!r:.130} in it, and in this run {ours}.")
    if any(m is not None and not 0 <= m < inf for m in importances):
        raise _damaged(where, "an importance is no number from 0 on")
    if any(not 0 <= i < layers or len(set(of)) != len(of) or not of for of in chosen for i in (of or [-1])):
        raise _damaged(where, "it trains layers that the model does not have")
    # A budget of parameters may leave room for fewer.
    fewer = range(1, active) if engine.settings.get("active_parameters") is not None else ()
    if odd := sorted({len(of) for of in chosen} - {layers, active, *fewer}):
        raise CheckpointError(f"{where} trains {odd[0]} layers at a time, and this run {active}.")
    if any(not 0 <= layer < layers or times < 0 for layer, times in engine.unused):
        raise _damaged(where, "it counts steps without layers that the model does not have")
    if not fewer and len({len(of) for of in engine.measured.layers}) > 1:
        raise _damaged(where, "it has measured more layers in some steps than in others")
    if engine.next is not None and not _is_draw(engine.next, engine.step, layers):
        raise _damaged(where, "the layers that wait are of another step, or have no probabilities")
    if unknown := sorted(set(state.units) - set(units)):
        raise CheckpointError(f"{where} has a state of {unknown[0]!r:.80}, which this run never trains.")


def _is_draw(waiting: NextState, step: int, layers: int) -> bool:
    odds = waiting.probabilities
    when = 0 <= waiting.drawn_at <= step < waiting.step < 2**54 and 0 <= waiting.round <= waiting.step
    return when and len(odds) == layers and all(0 <= p <= 1 for p in odds) and abs(sum(odds) - 1) < 1e-6


def _check_units(where: Path, units: Mapping[str, Entries], manifest: files.Manifest) -> None:
    for unit, entries in units.items():
        if odd := sorted(set(entries) - set(manifest.weights)):
            raise _damaged(where, f"{unit} has no parameter {odd[0]!r:.80}")
        for name, state in entries.items():
            for key, entry in state.items():
                if MARK in key or len(key) > 100 or not key.isprintable() or not _is_state(key, entry):
                    raise _damaged(where, f"{key!r:.60} is {shown(entry):.60}, which is no state of {name:.80}")


def _is_state(key: str, entry: Any) -> bool:
    if not isinstance(entry, dict):
        return key != MASTER and ((_is_number(entry) and entry >= 0) if key == "step" else entry not in (inf, -inf))
    if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in _DTYPES or set(entry) - {"dtype", "value"}:
        return False
    if "value" not in entry or key == MASTER:
        return "value" not in entry
    try:
        made = decode(entry).item() if isinstance(entry["value"], int | float) else None
        return made is not None and isfinite(made) and (key != "step" or 0 <= made < 2**53)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False


def _check_tensors(reader: TensorReader, manifest: files.Manifest, state: State) -> None:
    """Checks that everything which will be read is there, before the run is changed."""
    sizes = {key: files.numel(entry) for key, entry in manifest.weights.items()}
    for key, entry in manifest.weights.items():
        reader.require(key, sizes[key], _DTYPES[entry.dtype])
    for entries in state.units.values():
        for name, keys in entries.items():
            for key, entry in keys.items():
                if isinstance(entry, dict) and "value" not in entry:
                    reader.require(state_key(name, key), sizes[name], _DTYPES[entry["dtype"]])
    measured = sum(len(layers) for layers in state.engine.measured.layers)
    reader.require(MEASURED, measured * manifest.world_size, torch.float64)


def _damaged(where: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{where / files.STATE} is damaged: {problem}.")
