"""What a run of `GrassOptimizer` holds: under FSDP2, HSDP and DDP, and in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.backends import Backend
from grass_dist.checkpoint.model import fqn, pieces_of, shapes_of
from grass_dist.checkpoint.pieces import Entries, Piece, Read, UnitPieces, decode, encode, state_key
from grass_dist.engine import GrassEngine
from grass_dist.errors import CheckpointError
from grass_dist.optimizer import WHOLE, UnitOptimizer

Put = Callable[[int, Sequence[Mapping[str, Any]]], None]


class TorchHoldings:
    """`Holdings` of a `GrassOptimizer`, which gives it its parts.

    Args:
        optimizers: of all units.
        groups: the user's parameter groups.
        settle: makes the states readable.
        put: replaces the state of a unit, by its index among ``optimizers``.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Backend,
        optimizers: Sequence[UnitOptimizer],
        groups: Sequence[dict[str, Any]],
        grass: GrassEngine,
        settle: Callable[[], None],
        put: Put,
    ) -> None:
        self.ranks = self._backend = backend
        self._model, self._optimizers, self._groups, self._grass = model, list(optimizers), groups, grass
        self._settle, self._put = settle, put
        self.name, self.active = backend.name, grass.config.active_layers

    def unit_names(self) -> list[str]:
        return [optimizer.unit.name for optimizer in self._optimizers]

    def weights(self) -> list[Piece]:
        return pieces_of(self._model, self._backend)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return shapes_of(self._model)

    def states(self) -> Iterator[UnitPieces]:
        self._settle()
        for optimizer in self._optimizers:
            if not optimizer.born:
                continue
            tensors, entries = [], {}
            for at, (name, param) in enumerate(optimizer.unit.params):
                state = {k: v for k, v in optimizer.state_of(at).items() if k != "part"}
                entries[fqn(name)] = {key: encode(value) for key, value in state.items()}
                tensors += [
                    self._piece(optimizer, name, param, key, value)
                    for key, value in state.items()
                    if torch.is_tensor(value) and value.ndim
                ]
            yield UnitPieces(optimizer.unit.name, tensors, entries)

    def describe(self) -> dict[str, Any]:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._groups]
        return {"engine": self._grass.state_dict(), "groups": groups}

    def restore(self, saved: Mapping[str, Any], units: Mapping[str, Entries], read: Read) -> None:
        for group, other in zip(self._groups, saved["groups"], strict=True):
            group.update(_like(group, other))
        for index, optimizer in enumerate(self._optimizers):
            entries = units.get(optimizer.unit.name)
            self._put(index, [] if entries is None else self._states(optimizer, entries, read))
        self._grass.load_state_dict(saved["engine"])

    def _states(self, optimizer: UnitOptimizer, entries: Entries, read: Read) -> list[dict[str, Any]]:
        states = []
        for name, param in optimizer.unit.params:
            state: dict[str, Any] = {}
            for key, entry in entries.get(fqn(name), {}).items():
                value = decode(entry)
                if isinstance(value, torch.dtype):
                    shard = optimizer.shard_of(param)
                    out = torch.empty(shard.numel(), dtype=value)
                    value = read(state_key(fqn(name), key), self._start(optimizer, param), out).view(shard.shape)
                state[key] = value
            if state and optimizer.shards and self._backend.part != WHOLE:
                state["part"] = self._backend.part
            states.append(state)
        return states

    def _piece(self, optimizer: UnitOptimizer, name: str, param: nn.Parameter, key: str, value: torch.Tensor) -> Piece:
        flat = self._backend.local(value.detach()).reshape(-1)
        if flat.numel() != optimizer.shard_of(param).numel():
            raise CheckpointError(
                f"The {key} of {name} is of shape {tuple(value.shape)}, which is not the parameter's: a checkpoint that "
                "any number of ranks can load needs states with an entry for each of the parameter's."
            )
        shared = self._backend.replicates(param) and (not optimizer.shards or self._backend.part == WHOLE)
        writes = self._backend.replicates(param) or self._backend.counts(param)
        return Piece(state_key(fqn(name), key), param.numel(), self._start(optimizer, param), flat, writes, shared)

    def _start(self, optimizer: UnitOptimizer, param: nn.Parameter) -> int:
        return self._backend.state_start_of(param) if optimizer.shards else self._backend.start_of(param)


def _like(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters out of JSON, which knows no tuples."""
    return {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items()}
