"""Loading: a checkpoint is found and checked, every file of it, before anything of the run is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from grass_dist.backends.base import Ranks
from grass_dist.checkpoint import files
from grass_dist.checkpoint.dcp import TensorReader, open_tensors
from grass_dist.checkpoint.per_rank import measured_of, restore_rng
from grass_dist.checkpoint.pieces import Entries, Holdings, dtype_name
from grass_dist.checkpoint.saving import together
from grass_dist.config import StrictModel
from grass_dist.errors import CheckpointError, GrassError

DEEPSPEED_LAYOUT = "deepspeed"
"""In state.json of a checkpoint in DeepSpeed's format: where its partitions lie."""


class TrackerState(StrictModel):
    importances: list[float | None]
    dropped: int = Field(ge=0)


class NextState(StrictModel):
    step: int
    round: int
    active_layers: list[int]
    probabilities: list[float]
    drawn_at: int


class MeasuredState(StrictModel):
    layers: list[list[int]]


class EngineState(StrictModel):
    step: int = Field(ge=0)
    active_layers: list[int]
    next: NextState | None
    tracker: TrackerState
    measured: MeasuredState
    skipped: int = Field(default=0, ge=0)


class State(StrictModel):
    """``state.json``."""

    engine: EngineState
    groups: list[dict[str, Any]]
    units: dict[str, dict[str, dict[str, Any]]]
    run: dict[str, Any]
    deepspeed: dict[str, Any] | None = None


class Checkpoint:
    """One that has been checked: `open_checkpoint` makes it."""

    def __init__(self, folder: Path, manifest: files.Manifest, state: State) -> None:
        self.folder, self.manifest, self.state = folder, manifest, state

    @property
    def step(self) -> int:
        return self.manifest.step

    def tensors(self) -> TensorReader:
        """Reads its tensors, in whichever format they are."""
        if self.manifest.kind == "dcp":
            return open_tensors(self.folder / files.TENSORS)
        from grass_dist.checkpoint.deepspeed_files import open_deepspeed

        return open_deepspeed(self.folder / files.DEEPSPEED, self.manifest, self.state)


def open_checkpoint(folder: Path, ranks: Ranks | None = None) -> Checkpoint:
    """Checks every file of a checkpoint; the ranks share that work.

    Raises:
        CheckpointError: on every rank, the first thing that is wrong with it.
    """
    ranks = ranks or Ranks()

    def check() -> Checkpoint:
        manifest = files.read_manifest(folder)
        files.verify(folder, manifest, (ranks.rank, ranks.world_size))
        return Checkpoint(folder, manifest, _read_state(folder, manifest))

    return together(ranks, check)


def _read_state(folder: Path, manifest: files.Manifest) -> State:
    if files.STATE not in manifest.files:
        raise CheckpointError(f"{folder} has no {files.STATE}.")
    body = files.read_json(folder / files.STATE)
    try:
        state = State(**body) if isinstance(body, dict) else None
    except (GrassError, TypeError) as error:
        raise CheckpointError(f"{folder / files.STATE} is damaged: {error}") from None
    if state is None:
        raise CheckpointError(f"{folder / files.STATE} is damaged: it holds no settings.")
    return state


def newest_good(
    parent: Path, ranks: Ranks | None = None, tell: Callable[[str], None] = lambda _: None
) -> Checkpoint | None:
    """The newest checkpoint below ``parent`` that is whole; None if there is none.

    Args:
        tell: called with what is wrong with each newer one.
    """
    ranks = ranks or Ranks()
    folders = together(ranks, lambda: files.checkpoints_in(parent) if ranks.rank == 0 else None)
    for folder in ranks.gather_objects(folders)[0] or []:  # type: ignore[attr-defined]
        try:
            return open_checkpoint(folder, ranks)
        except CheckpointError as error:
            tell(f"{error} Going back to the checkpoint before it.")
    return None


def load(checkpoint: Checkpoint, holdings: Holdings) -> bool:
    """Puts weights, states, method and random numbers of a checkpoint into a run. Called on every rank.

    The run must have been built with the same model, parameter groups and method; ranks, wrapper, ZeRO stage,
    offloading and micro-batches may be others.

    Returns:
        Whether it goes on to the bit: random numbers are only there for as many ranks as saved it.

    Raises:
        CheckpointError: on every rank, before anything is changed if it is of another run.
    """
    state, manifest, ranks = checkpoint.state, checkpoint.manifest, holdings.ranks
    described = holdings.describe()
    together(ranks, lambda: _check_fits(checkpoint, holdings, described))
    reader = together(ranks, checkpoint.tensors)
    with torch.no_grad():
        wanted = [(p.key, p.start, p.tensor) for p in holdings.weights() if p.tensor.numel()]
        together(ranks, lambda: reader.read_all(wanted))
        measured = together(
            ranks, lambda: measured_of(state.engine.measured.layers, manifest.world_size, ranks, reader.read)
        )
        engine = {**state.engine.model_dump(), "measured": measured}
        holdings.restore({"engine": engine, "groups": state.groups}, state.units, reader.read)
        return together(ranks, lambda: restore_rng(reader.tensors, manifest.world_size, ranks, reader.read))


def _check_fits(checkpoint: Checkpoint, holdings: Holdings, described: Mapping[str, Any]) -> None:
    where, manifest, state = checkpoint.folder, checkpoint.manifest, checkpoint.state
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
                f"{where} is of another model: {key} is of shape {tuple(entry.shape)} there and {shapes[key]} here."
            )
        if entry.dtype != dtypes[key]:
            raise CheckpointError(
                f"{where} holds {key} in {entry.dtype}, and this run trains it in {dtypes[key]}: set "
                f"model.dtype={entry.dtype}."
            )
    if len(state.groups) != len(described["groups"]):
        raise CheckpointError(
            f"{where} has {len(state.groups)} parameter groups and this run {len(described['groups'])}."
        )
    _check_engine(where, state, described["engine"], holdings.active, holdings.unit_names())
    _check_units(where, state.units, manifest)


def _check_engine(where: Path, state: State, mine: Mapping[str, Any], active: int, units: Sequence[str]) -> None:
    layers = len(mine["tracker"]["importances"])
    engine = state.engine
    chosen = [engine.active_layers, *engine.measured.layers, *([engine.next.active_layers] if engine.next else [])]
    if len(engine.tracker.importances) != layers:
        raise CheckpointError(
            f"{where} is of a model with {len(engine.tracker.importances)} layers, and this one has {layers}."
        )
    if any(not 0 <= i < layers or len(set(of)) != len(of) or not of for of in chosen for i in (of or [-1])):
        raise CheckpointError(f"{where / files.STATE} is damaged: it trains layers that the model does not have.")
    if {len(of) for of in chosen} - {layers, active}:
        raise CheckpointError(f"{where} trains {len(chosen[0])} layers at a time, and this run {active}.")
    if unknown := sorted(set(state.units) - set(units)):
        raise CheckpointError(f"{where} has a state of {unknown[0]!r:.80}, which this run never trains.")


def _check_units(where: Path, units: Mapping[str, Entries], manifest: files.Manifest) -> None:
    for unit, entries in units.items():
        if odd := sorted(set(entries) - set(manifest.weights)):
            raise CheckpointError(f"{where / files.STATE} is damaged: {unit} has no parameter {odd[0]!r:.80}.")
