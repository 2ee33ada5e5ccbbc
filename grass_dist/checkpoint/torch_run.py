"""The `Holdings` of a `GrassOptimizer`: under FSDP2, HSDP and DDP, and in one process."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.checkpoint.files import printable
from grass_dist.checkpoint.model import fqn, pieces_of, shapes_of
from grass_dist.checkpoint.pieces import Entries, Piece, Read, UnitPieces, decode, encode, state_key
from grass_dist.checkpoint.together import together
from grass_dist.errors import CheckpointError
from grass_dist.method.controller import GrassController
from grass_dist.method.saved import SETTINGS, check_clock, settings_of
from grass_dist.model.sharding import Block
from grass_dist.states.layer_state import MASTER
from grass_dist.states.unit_optimizer import GROUP, UnitOptimizer
from grass_dist.states.update_rule import HOW, LOW, step_unseen
from grass_dist.states.view import PutState


class TorchHoldings:
    """The `Holdings` of a `GrassOptimizer`, which passes its parts.

    Args:
        optimizers: those of all units.
        class_name: of the optimizer class.
        groups: the user's parameter groups.
        settle: waits until the states can be read.
        put: replaces the state of a unit, by its index among ``optimizers``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[UnitOptimizer],
        class_name: str,
        groups: Sequence[dict[str, Any]],
        grass: GrassController,
        settle: Callable[[], None],
        put: PutState,
    ) -> None:
        self.ranks, self._sharding = grass.backend.ranks, grass.backend.sharding
        self._model, self._optimizers, self._groups, self._grass = model, list(optimizers), groups, grass
        self._settle, self._put = settle, put
        self._settings = settings_of(grass, class_name)
        self.name, self.active = grass.backend.name, grass.config.active_layers

    def unit_names(self) -> list[str]:
        return [fqn(optimizer.unit.name) for optimizer in self._optimizers]

    def weights(self) -> list[Piece]:
        return pieces_of(self._model, self._sharding)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return shapes_of(self._model)

    def states(self) -> Iterator[UnitPieces]:
        self._settle()
        for optimizer in self._optimizers:
            if not optimizer.has_state:
                continue
            tensors, entries = [], {}
            for at, (name, param) in enumerate(optimizer.unit.params):
                state = optimizer.state_of(at)
                entries[fqn(name)] = {key: encode(value) for key, value in state.items()}
                tensors += [
                    self._piece(optimizer, name, param, key, value)
                    for key, value in state.items()
                    if torch.is_tensor(value) and value.ndim
                ]
            yield UnitPieces(fqn(optimizer.unit.name), tensors, entries)

    def describe(self) -> dict[str, Any]:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._groups]
        return {"engine": {**self._grass.state_dict(), SETTINGS: self._settings}, "groups": groups}

    def check(
        self, engine: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], units: Mapping[str, Entries]
    ) -> None:
        """Checks that this run can go on from the contents of a checkpoint. Changes nothing.

        Raises:
            CheckpointError: the method is not at such a point then, or an optimizer cannot take a step from its state.
            GrassError: something that trains was frozen since the layers were drawn.
        """
        self._grass.backend.verify()
        check_clock(self._grass, engine)
        merged = [{**own, **_like(own, saved)} for own, saved in zip(self._groups, groups, strict=True)]
        group_of = {id(param): index for index, own in enumerate(self._groups) for param in own["params"]}
        tried = set()  # most parameters of a layer have the same
        for optimizer in self._optimizers if all(o.shards for o in self._optimizers) else ():
            for name, param in optimizer.unit.params:
                index, state = group_of[id(param)], units.get(fqn(optimizer.unit.name), {}).get(fqn(name), {})
                if (found := (index, param.dtype, json.dumps(state))) not in tried:
                    tried.add(found)
                    _try_step(optimizer, {**merged[index]}, param, state)

    def restore(self, saved: Mapping[str, Any], units: Mapping[str, Entries], read: Read) -> None:
        for group, other in zip(self._groups, saved["groups"], strict=True):
            group.update(_like(group, other))

        def put() -> None:
            for index, optimizer in enumerate(self._optimizers):
                entries = units.get(fqn(optimizer.unit.name))
                self._put(index, [] if entries is None else self._states(optimizer, entries, read))

        together(self.ranks, put)
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
            states.append(state)
        return states

    def _piece(self, optimizer: UnitOptimizer, name: str, param: nn.Parameter, key: str, value: torch.Tensor) -> Piece:
        flat = self._sharding.local(value.detach()).reshape(-1)
        if flat.numel() != optimizer.shard_of(param).numel():
            raise CheckpointError(
                f"The {key} of {name} is of shape {tuple(value.shape)}, which is not the parameter's: a checkpoint "
                "that any number of ranks can load needs states with an entry for each of the parameter's."
            )
        own = self._sharding
        shared = own.keeps_whole_state(param) if optimizer.shards else own.replicates(param)
        writes = self._sharding.replicates(param) or self._sharding.counts(param)
        return Piece(state_key(fqn(name), key), param.numel(), self._start(optimizer, param), flat, writes, shared)

    def _start(self, optimizer: UnitOptimizer, param: nn.Parameter) -> int | Block:
        return self._sharding.state_start_of(param) if optimizer.shards else self._sharding.start_of(param)


def _like(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters from JSON, which has lists instead of tuples."""
    return {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items()}


def _try_step(optimizer: UnitOptimizer, group: dict[str, Any], param: nn.Parameter, state: Mapping[str, Any]) -> None:
    """Takes a step of the optimizer's class on a stand-in of six entries with such a state.

    Raises:
        CheckpointError: the step fails.
    """
    like = optimizer.shard_of(param)
    stand_in = nn.Parameter(torch.zeros(2, 3, dtype=torch.float32 if like.dtype in LOW else like.dtype))
    stand_in.grad = torch.zeros_like(stand_in)
    try:
        made = {key: copy.deepcopy(decode(entry)) for key, entry in state.items() if key != MASTER}
        group |= {key.removeprefix(GROUP): made.pop(key) for key in list(made) if key.startswith(GROUP)}
        own = {k: torch.zeros(2, 3, dtype=v) if isinstance(v, torch.dtype) else v for k, v in made.items()}
        plain = {key: False for key in HOW if key in group}  # a stand-in is on the CPU
        stepped = optimizer.fresh([{**group, **plain, "params": [stand_in]}], **plain)
        if own:
            stepped.state[stand_in] = own
        step_unseen(stepped)
    except Exception as error:  # whatever it makes an optimizer raise
        raise CheckpointError(
            f"The state of {optimizer.name} in the checkpoint, or its parameter group, is none that this run's "
            f"optimizer can go on from ({type(error).__name__}: {printable(error)[:150]})."
        ) from None
