"""Stock ZeRO optimizers that are constructed again, in place, over the layers of each sampling interval.

DeepSpeed fixes what a ZeRO optimizer trains when it is constructed: flat buffers, partitions, gradient hooks. So a draw
runs the stock constructor again, over one parameter group for each (active layer, group of the user's), and puts the
states of those groups back. Between two draws everything is DeepSpeed's own code (reduction, norm, clipping, loss
scale, step, gather), which never sees an inactive layer. The object stays the same, so engine, schedulers and Trainer
keep their references to it. While DeepSpeed saves or loads a checkpoint, the object shows it the groups of all layers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from grass_dist.backends.zero.groups import Group, GroupsOptimizer, zero_shard
from grass_dist.backends.zero.loss_scale import LossScale, loss_scale_of
from grass_dist.backends.zero.private import CARRIED, Names, check_instance, check_state
from grass_dist.backends.zero.reads import Reads
from grass_dist.backends.zero.saved_state import GRASS_KEY, GROUPS_KEY, TOTAL_KEY, take_over, trainable, whole_state
from grass_dist.backends.zero.states import ZeroStates
from grass_dist.backends.zero.switching import nothing_but_constructing
from grass_dist.errors import CheckpointError, GrassError
from grass_dist.method.controller import GrassController
from grass_dist.method.saved import SETTINGS, check_clock, other_settings, settings_of
from grass_dist.model.discovery import Unit

_Stock: Any = object  # a type checker cannot know DeepSpeed's class, which stands behind this one


class Listener(Protocol):
    """What a `NarrowZero` tells about its steps."""

    grass: GrassController
    """Its state goes into checkpoints."""

    def gradients_ready(self) -> None:
        """Called in a step that updates, before any gradient is clipped or divided by the loss scale."""

    def rest_step(self) -> bool:
        """Called in a step while nothing trains. Returns whether a gradient overflowed on some rank."""
        ...

    def stepped(self, applied: bool) -> None:
        """Called at the end of every step; ``applied`` is False after an fp16 overflow."""


class NarrowZero(_Stock):
    """What the two classes below add to DeepSpeed's.

    Its constructor runs none of DeepSpeed's: the first `narrow` or `rest` does.

    Args:
        arguments: what the engine constructs the stock class with, by name.
        every: all groups, in the order of a checkpoint.
        states: those of all groups.
        listener: is told about every step.

    Attributes:
        user_optimizer: the optimizer that the engine was given; its groups are `param_groups` here.
        groups: what trains, in DeepSpeed's order; empty while at rest.
        reads: answers for masters and moments.
        loaded: the method's state out of the checkpoint that was loaded last; empty if that was saved without GRASS,
            None if no optimizer state was loaded.
        universal: the folder of the universal checkpoint that was to be loaded last, if it was one.
    """

    names: ClassVar[Names]

    def __init__(
        self, arguments: dict[str, Any], every: Sequence[Group], states: ZeroStates, listener: Listener
    ) -> None:
        self.arguments, self.listener = arguments, listener
        self.user_optimizer: torch.optim.Optimizer = arguments["init_optimizer"]
        self.every, self.states = list(every), states
        self.groups: list[Group] = []
        group = arguments["dp_process_group"]
        self.reads = Reads(every, states, self.saved_order, self._has_gradient, group, self._note_changed)
        self.loaded: dict[str, Any] | None = None
        self.universal: Path | None = None
        self._total: list[list[float]] = []  # within a save: what all ranks have measured since the last refresh
        self._put_aside: dict[str, Any] | None = None  # within `whole`: DeepSpeed's lists of what trains
        self._built = False

    @property
    def grass(self) -> GrassController:
        """The method's controller, as `GrassOptimizer.grass`."""
        return self.listener.grass

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state that rest on this rank's device, as `GrassOptimizer.state_bytes`."""
        return self.states.device_bytes

    @property
    def host_state_bytes(self) -> int:
        """Bytes of optimizer state that rest in this rank's host memory."""
        return self.states.host_bytes

    # --- what the engine and schedulers see

    @property
    def defaults(self) -> dict[str, Any]:
        """Those of the user's optimizer, as without ZeRO."""
        return self.user_optimizer.defaults

    @property
    def loss_scale_config(self) -> LossScale:
        """The loss scale as DeepSpeed's optimizers without ZeRO show it: stage 0 runs as ZeRO-1 here."""
        return loss_scale_of(self)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The user's parameter groups, whatever trains."""
        return self.user_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.user_optimizer.param_groups = groups

    def step(self, closure: None = None) -> None:
        """Ends an optimizer step: DeepSpeed's, over the active groups; while at rest nothing is updated."""
        if self.groups:
            self.optimizer.follow_user()
            self.listener.gradients_ready()
            super().step()
            self.states.end_step()
        else:
            self.overflow = self.listener.rest_step()
            self._end_rest_step()
            self._update_scale(self.overflow)
            self._global_grad_norm = float("inf") if self.overflow else 0.0
        self.listener.stepped(not self.overflow)

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """The engine calls it after a backward; while at rest there is nothing of DeepSpeed's to reduce."""
        if self.groups:
            super().overlapping_partition_gradients_reduce_epilogue()

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """The engine calls it at the accumulation boundary of ZeRO-1; nothing is reduced at rest."""
        if self.groups:
            super().reduce_gradients(pipeline_parallel=pipeline_parallel)

    @property
    def state(self) -> Any:
        """The state of the base optimizer for what trains, by partition."""
        self.states.settle()
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    def state_dict(self) -> dict[str, Any]:
        """DeepSpeed's state of what trains; within `whole` the state of every group and of the method."""
        self.states.settle()
        state = self._state_of_what_trains()
        if self._put_aside is not None:
            order = [self.states.of[group.key] for group in self.every]
            position = {**self.grass.state_dict(), SETTINGS: self._settings, TOTAL_KEY: self._total}
            return whole_state(state, self.names, order, self.states.still, self.param_groups, position)
        if self.groups:  # DeepSpeed holds no master that is in host memory
            key, kept = self.names.masters_key, [self.states.of[group.key].master for group in self.groups]
            state[key] = [
                theirs if own is None else own[: theirs.numel()] for own, theirs in zip(kept, state[key], strict=True)
            ]
        return state

    def load_state_dict(self, state_dict_list: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        """Takes over this rank's saved state, if it is of GRASS; nothing trains until the next `narrow` or `rest`.

        Raises:
            CheckpointError: the method was set otherwise, or is not where this run's is after that many steps.
            GrassError: the state is of other layers or parameter groups.
        """
        if folder := kwargs.get("checkpoint_folder"):
            self.universal = Path(folder)  # its states come when DeepSpeed has done the rest
            return
        saved = state_dict_list[torch.distributed.get_rank(self.dp_process_group)]
        self.loaded = saved.get(GRASS_KEY, {})
        if GROUPS_KEY in saved:
            self.check_position(saved[GRASS_KEY])
            take_over(saved, self.names, self.every, self.states, self.param_groups)
            self.loss_scaler, self.dynamic_loss_scale = saved["loss_scaler"], saved["dynamic_loss_scale"]
            self.groups = []

    @property
    def _settings(self) -> dict[str, Any]:
        return settings_of(self.grass, type(self.user_optimizer).__name__)

    def check_position(self, position: Mapping[str, Any]) -> None:
        """Checks whether this run can go on from a saved position of the method.

        Raises:
            CheckpointError: it cannot, on all ranks alike.
        """
        if told := other_settings(position, self._settings):
            raise CheckpointError(told).everywhere()
        try:
            self.grass.check_layers(position)
        except ValueError as error:
            raise CheckpointError(str(error)).everywhere() from None
        check_clock(self.grass, position)

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        """`engine.offload_states` calls it.

        Raises:
            GrassError: always, on all ranks, and before anything has moved.
        """
        raise GrassError(
            "engine.offload_states() does not work with GRASS, which takes the states of layers to host memory by "
            "itself (grass.offload). To free the device for other work, save a checkpoint, destroy the engine, and "
            "load the checkpoint into a new one."
        )

    # --- what trains

    def narrow(self, groups: Sequence[Group]) -> None:
        """Trains ``groups`` and nothing else from the next forward on."""
        self._let_go({group.key for group in groups})
        self._construct(groups)
        self.groups = list(groups)
        for group, master in zip(groups, getattr(self, self.names.masters), strict=True):
            self.states.of[group.key].adopt(master, self.optimizer.state)

    def narrow_frozen(self, groups: Sequence[Group]) -> None:
        """Narrows to groups that may be frozen, and leaves them frozen."""
        with trainable([p for group in groups for p in group.params]):
            self.narrow(groups)

    def rest(self, stand_in: Group) -> None:
        """Trains nothing. DeepSpeed must own a parameter, so it has ``stand_in``, of which it gets no gradient."""
        self.stand_in = stand_in
        self._let_go(set())
        self._construct([stand_in])
        self._release()
        self.groups = []

    def resume(self, groups: Sequence[Group]) -> None:
        """Goes back to training ``groups``, which trained before; to rest if there are none."""
        if groups:
            self.narrow(groups)
            self.states.enter(self.grass.active_layers)
        else:
            self.rest(self.stand_in)

    def forget(self) -> None:
        """Throws the states of all groups away; `narrow` then makes new masters from the weights."""
        self.states.forget()
        self.groups = []

    def partition_grads_of(self, i: int) -> list[torch.Tensor]:
        """This rank's parts of the averaged gradient of group ``i``, times the loss scale; valid in a step."""
        return [part for part in (self.averaged_gradients.get(i) or []) if part is not None]

    def saved_order(self, group: Group) -> list[nn.Parameter]:
        """The parameters of ``group`` in the order in which its flat partitions hold them."""
        return list(group.params)

    def _note_changed(self, unit: Unit) -> None:
        self.grass.note_changed([unit])

    def _has_gradient(self, group: Group) -> bool:
        return self.averaged_gradients.get(self.groups.index(group)) is not None

    def _end_rest_step(self) -> None:
        self.optimizer.step_nothing()

    # --- construction

    def _construct(self, groups: Sequence[Group]) -> None:
        carried = {name: self.__dict__[name] for name in CARRIED if self._built and name in self.__dict__}
        own = GroupsOptimizer(self.user_optimizer, groups, lambda m: self.states.updating(m, self.optimizer.state))
        params = [param for group in groups for param in group.params if hasattr(param, "ds_tensor")]
        with _quiet(self, params) if self._built else nullcontext():
            super().__init__(**{**self.arguments, "init_optimizer": own})
        self.__dict__.update(carried)
        if not self._built:
            check_instance(self, self.names, len(groups))
        self._built = True

    def _let_go(self, keep: set[tuple[str, int]]) -> None:
        """Keeps, before a construction, what DeepSpeed has of the groups that train."""
        if not self._built:
            return
        self._keep_lists()
        self.states.keep_new()
        for group in self.groups:
            self.states.of[group.key].param = None
        self._release()

    def _release(self) -> None:
        """Takes DeepSpeed's hooks and references off the parameters."""
        with nothing_but_constructing(self):
            self.destroy()

    # --- checkpoints

    def complete(self) -> None:
        """Makes masters of the layers that were never drawn, one layer at a time, where states are kept."""
        current, missing = list(self.groups), self.without_masters()
        for _, groups in groupby(missing, key=lambda group: group.unit.name):
            self.narrow_frozen([*current, *groups])
        if missing:
            self.resume(current)
        self._keep_lists()
        self.states.settle()

    def without_masters(self) -> list[Group]:
        """The groups that have no state for a checkpoint yet; `complete` makes it, and so constructs again."""
        known = {group.key for group in self.groups} | {key for key, own in self.states.of.items() if own.noted}
        return [group for group in self.every if group.key not in known]

    @contextmanager
    def whole(self, *, saving: bool = False) -> Iterator[None]:
        """While it lasts, DeepSpeed's checkpoint code finds every group, trainable if it ever trains.

        A save also has groups of what the user's optimizer has and GRASS never trains. Under ZeRO-3 DeepSpeed's tools
        find in a checkpoint what is in groups, and a full fine-tune that goes on from it asks for all that the
        optimizer has. Loading does not need these groups: DeepSpeed saves frozen weights besides.
        """
        still = self.states.still if saving else []
        for own in still:  # ZeRO-3 keeps master and moments of a group and no more, so none need be constructed
            own.numel = own.saved = sum(zero_shard(param).numel() for param in own.group.params)
        groups = [*self.every, *(own.group for own in still)]
        shown = {name: [self.saved_order(group) for group in groups] for name in self.names.shapes}
        narrow = {name: getattr(self, name) for name in self.names.shapes}
        with trainable([p for group in self.every for p in group.params]):
            self.__dict__.update(shown)
            self._put_aside, self.loaded, self.universal = narrow, None, None
            if saving:
                self._total = self._sum_measured()
            try:
                yield
            finally:
                self._put_aside = None
                self.__dict__.update(narrow)
                for own in still:
                    own.forget()

    def _sum_measured(self) -> list[list[float]]:
        """Adds up over the ranks what they have measured since the last refresh, T × γ × 8 bytes."""
        if not (rows := self.grass.state_dict()["measured"]["rows"]):
            return []
        mine = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
        parts = torch.split(self.grass.backend.ranks.sum_over_ranks(mine), [len(row) for row in rows])
        return [part.tolist() for part in parts]

    def _state_of_what_trains(self) -> dict[str, Any]:
        """The stock state_dict, also within `whole`."""
        shown = {name: getattr(self, name) for name in self.names.shapes}
        self.__dict__.update(self._put_aside or {})
        try:
            return super().state_dict()
        finally:
            self.__dict__.update(shown)

    def _keep_lists(self) -> None:
        """Notes the entries that the groups which train have in DeepSpeed's state, besides their tensors."""
        if not self.groups:
            return
        state = self._state_of_what_trains()
        check_state(state, self.names)
        lists = {k: v for k, v in state.items() if isinstance(v, list) and len(v) == len(self.groups)}
        saved = lists.pop(self.names.masters_key)
        for i, group in enumerate(self.groups):
            kept = self.states.of[group.key]
            kept.lists, kept.saved, kept.noted = {k: v[i] for k, v in lists.items()}, saved[i].numel(), True


@contextmanager
def _quiet(zero: NarrowZero, params: Sequence[nn.Parameter]) -> Iterator[None]:
    """DeepSpeed tells its whole set-up whenever a ZeRO optimizer is constructed; once is enough."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with nothing_but_constructing(zero, params):
            yield
    finally:
        logger.setLevel(level)
