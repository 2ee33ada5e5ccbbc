"""The `Holdings` of a run under DeepSpeed ZeRO: flat partitions of groups, seen as entries of their parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.backends.zero.groups import Extent, Group, extents_of, numel_of, zero_shard
from grass_dist.backends.zero.narrow import NarrowZero
from grass_dist.backends.zero.states import GroupState, Made
from grass_dist.checkpoint.deepspeed_files import FileLayout, GroupLayout, Placed
from grass_dist.checkpoint.files import printable
from grass_dist.checkpoint.model import fqn, pieces_of, shapes_of
from grass_dist.checkpoint.pieces import Entries, Piece, Read, UnitPieces, decode, encode, state_key
from grass_dist.checkpoint.together import together
from grass_dist.errors import CheckpointError
from grass_dist.method.saved import SETTINGS, check_clock, settings_of
from grass_dist.states.layer_state import MASTER
from grass_dist.states.unit_optimizer import step_over
from grass_dist.states.update_rule import HOW


class ZeroHoldings:
    """The `Holdings` of an engine that `grass_dist.initialize` made."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._zero: NarrowZero = engine.optimizer
        self._module: nn.Module = engine.module
        self._grass = engine.grass
        backend = engine.grass.backend
        self.ranks, self._sharding, self._stage = backend.ranks, backend.sharding, backend.stage
        self.name, self.active = f"zero{self._stage}", engine.grass.config.active_layers
        self._names = {param: fqn(name) for name, param in self._module.named_parameters()}

    def unit_names(self) -> list[str]:
        return [fqn(name) for name in self._by_unit()]

    def weights(self) -> list[Piece]:
        return pieces_of(self._module, self._sharding)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return shapes_of(self._module)

    def states(self) -> Iterator[UnitPieces]:
        self._zero.states.settle()
        for name, groups in self._by_unit().items():
            tensors: list[Piece] = []
            entries: dict[str, dict[str, Any]] = {}
            for group, own in groups:
                if own.changed:
                    self._collect(group, own, tensors, entries)
            if entries:
                yield UnitPieces(fqn(name), tensors, entries)

    def describe(self) -> dict[str, Any]:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self._zero.user_optimizer.param_groups]
        # Without the class: DeepSpeed has its own for that of a ds_config, and each goes on from the other's states.
        settings = settings_of(self._grass)
        return {"engine": {**self._grass.state_dict(), SETTINGS: settings}, "groups": groups}

    def layout(self) -> FileLayout:
        """Says where DeepSpeed's partitions lie in the files that it would write. Call `NarrowZero.complete` before."""
        zero, placed = self._zero, self._placed
        groups = [
            GroupLayout(
                unit=fqn(group.unit.name),
                partition=zero.states.of[group.key].numel,
                params=[placed(param) for param in zero.saved_order(group)],
            )
            for group in zero.every
        ]
        trained = {param for group in zero.every for param in group.params}
        frozen = [placed(param) for param in self._names if param not in trained]
        [dtype] = {own.dtype for own in zero.states.of.values()}
        masters = "bfloat16" if dtype == torch.bfloat16 else "float32"
        return FileLayout(stage=self._stage, groups=groups, frozen=frozen, masters=masters)

    def _placed(self, param: nn.Parameter) -> Placed:
        shard = zero_shard(param).numel() if self._stage == 3 else 0
        return Placed(name=self._names[param], numel=numel_of(param), shard=shard)

    def check(
        self, engine: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], units: Mapping[str, Entries]
    ) -> None:
        """Checks that this run can go on from the contents of a checkpoint. Changes nothing.

        Raises:
            CheckpointError: the method is not at such a point then, or the optimizer cannot take a step from a state.
        """
        check_clock(self._grass, engine)
        for group in self._zero.every:
            entries = units.get(fqn(group.unit.name), {})
            states = [state for param in group.params if (state := entries.get(self._names[param]))]
            if states:
                self._check_state(group, groups[group.user_group], states)

    def _check_state(self, group: Group, saved: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> None:
        """Takes a step of the optimizer on six entries. A flat partition has one state for all its parameters."""
        user, like = self._zero.user_optimizer, self._sharding.shard_of(group.params[0])
        mine = user.param_groups[group.user_group]
        dtype = self._zero.states.of[group.key].dtype
        stand_in = nn.Parameter(torch.zeros(6, dtype=dtype, device=like.device))
        stand_in.grad = torch.zeros_like(stand_in)
        try:
            if len({_form(state) for state in states}) > 1:
                raise ValueError("it differs between parameters")
            made = {key: decode(entry) for key, entry in states[0].items() if key != MASTER}
            for key, value in made.items():
                vector = isinstance(value, torch.dtype)
                made[key] = torch.zeros_like(stand_in, dtype=value) if vector else self._number(group, value)
            known = defaultdict(dict, {stand_in: made} if made else {})
            step_over(user, [{**mine, **_like(mine, saved), "params": [stand_in]}], known)
        except Exception as error:  # whatever it makes an optimizer raise
            raise CheckpointError(
                f"The state of {group.unit.name} in the checkpoint, or its parameter group, is none that this run's "
                f"optimizer can go on from ({printable(error)[:150]})."
            ) from None

    def restore(self, saved: Mapping[str, Any], units: Mapping[str, Entries], read: Read) -> None:
        zero = self._zero
        for group, other in zip(zero.user_optimizer.param_groups, saved["groups"], strict=True):
            group.update(_like(group, other))
        zero.forget()
        for name, groups in self._by_unit().items():
            if fqn(name) in units:
                self._restore_unit(name, groups, units[fqn(name)], read)
        self._grass.load_state_dict(saved["engine"])

    def _restore_unit(
        self, name: str, groups: Sequence[tuple[Group, GroupState]], entries: Entries, read: Read
    ) -> None:
        """Has DeepSpeed cut the unit and make masters of the weights, then reads the states into them."""
        self._zero.narrow_frozen([group for group, _ in groups])
        made = together(self.ranks, lambda: [self._read(group, own, entries, read) for group, own in groups])
        self._zero.states.put(name, made)
        for _, own in groups:
            own.changed = True

    def _by_unit(self) -> dict[str, list[tuple[Group, GroupState]]]:
        units: dict[str, list[tuple[Group, GroupState]]] = {}
        for group in self._zero.every:
            units.setdefault(group.unit.name, []).append((group, self._zero.states.of[group.key]))
        return units

    def _collect(self, group: Group, own: GroupState, tensors: list[Piece], entries: dict[str, dict[str, Any]]) -> None:
        keep_master = own.master is not None and group.params[0].dtype != own.dtype  # else it is the weights
        values = {**own.state, **({MASTER: own.master} if keep_master else {})}
        vectors = {k: own.exact(k, v) for k, v in values.items() if torch.is_tensor(v) and v.ndim}
        for extent in self._extents(group, own.numel):
            entries[extent.name] = {k: encode(vectors.get(k, v)) for k, v in values.items()}
            for key, value in vectors.items():
                part = value.detach()[extent.at : extent.at + extent.length]
                tensors.append(Piece(state_key(extent.name, key), extent.numel, extent.start, part))

    def _read(self, group: Group, own: GroupState, entries: Entries, read: Read) -> Made:
        extents = list(self._extents(group, own.numel))
        master = None if own.master is None else own.master.detach().to("cpu", copy=True)
        state: dict[str, Any] = {}
        for extent in extents:
            for key, entry in entries.get(extent.name, {}).items():
                value = decode(entry)
                if not isinstance(value, torch.dtype):
                    state.setdefault(key, self._number(group, value))
                    continue
                into = master if key == MASTER else state.setdefault(key, torch.zeros(own.numel, dtype=value))
                if extent.length and into is not None:  # a master is missing where the weights are their own
                    read(state_key(extent.name, key), extent.start, into[extent.at : extent.at + extent.length])
        return own, own.numel, master, state

    def _number(self, group: Group, value: Any) -> Any:
        """A step count on the device that the update needs: fused ones read it on the GPU, all others on the host."""
        settings = self._zero.user_optimizer.param_groups[group.user_group]
        if not torch.is_tensor(value) or not (settings.get("fused") or settings.get("capturable")):
            return value
        return value.to(group.params[0].device)

    def _extents(self, group: Group, partition: int) -> Iterator[Extent]:
        sizes = [(self._names[param], numel_of(param)) for param in self._zero.saved_order(group)]
        shards = [zero_shard(p).numel() for p in self._zero.saved_order(group)] if self._stage == 3 else None
        return extents_of(sizes, self.ranks.rank, partition, shards)


def _like(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters from JSON, which has lists instead of tuples. How it computes is each run's own setting."""
    return {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items() if k not in HOW}


def _form(state: Mapping[str, Any]) -> str:
    """The keys and dtypes of a state, without step counts."""
    return str({k: entry.get("dtype") if isinstance(entry, dict) else None for k, entry in sorted(state.items())})
