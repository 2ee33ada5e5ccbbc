"""What a user passes to `GrassOptimizer` becomes what trains: checked on one rank, before the ranks compare it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grass_dist.backends import backend_for, trains_alone
from grass_dist.backends.base import SPARSE, HookedBackend
from grass_dist.backends.single import SingleBackend
from grass_dist.config import GrassConfig, as_config, check_num_layers
from grass_dist.errors import ConfigError, GrassError, UnsupportedModel
from grass_dist.events import Started
from grass_dist.method.changes import ChangeLog
from grass_dist.method.interfaces import LayerStates
from grass_dist.method.samplers import make_sampler
from grass_dist.method.watch import GradientWatch
from grass_dist.model.adapters import (
    add_adapters,
    begin_adapters,
    layers_of,
    names_of_adapters,
    remove_adapters,
    split_groups,
)
from grass_dist.model.compiled import compiled_whole, too_low_recompile_limit
from grass_dist.model.discovery import Unit
from grass_dist.model.experts import idle_experts_move
from grass_dist.model.groups import full_groups, shortly
from grass_dist.model.names import freeze_named
from grass_dist.model.tied import tied_weights
from grass_dist.model.units import (
    check_one_device,
    choose_units,
    fingerprint,
    freeze_others,
    frozen_layers,
    refuse_second,
    restore_flags,
    several_stacks,
    sparse_parameters,
    started_with,
)
from grass_dist.states.fields import Groups
from grass_dist.states.moving import MovingStates
from grass_dist.states.placement import place
from grass_dist.states.refused import check_class
from grass_dist.states.resident import ResidentStates
from grass_dist.states.unit_optimizer import UnitOptimizer
from grass_dist.states.update_rule import (
    UpdateRule,
    class_and_arguments,
    has_modes,
    judge_class,
    rounds_by_place,
)
from grass_dist.states.weights import HostWeights
from grass_dist.states.weights_placement import StatesAndWeights, place_weights


@dataclass(frozen=True, slots=True)
class Given:
    """What the user has passed, of whatever type it is."""

    model: Any
    optimizer_class: Any
    optimizer_kwargs: Any
    config: Any
    params: Any
    accumulation_steps: Any
    observers: Any
    shard_states: Any


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was made of it on this rank.

    Attributes:
        layers: those that compete.
        roles: those that always train.
        optimizers: of the layers, then of the roles.
        ours: names and parameters that the user's groups hold.
        agree: what must be equal on all ranks, by the names that an error shows.
        sentences: for the user.
        started: what the run trains, and what never trains.
        fallback: why no state can move, if none can.
        resident: bytes of the states that never move.
        stack: FQNs of all layers, those that do not compete included.
    """

    model: nn.Module
    config: GrassConfig
    optimizer_class: type[torch.optim.Optimizer]
    backend: HookedBackend
    watch: GradientWatch
    changes: ChangeLog
    layers: tuple[Unit, ...]
    roles: tuple[Unit, ...]
    optimizers: Sequence[UnitOptimizer]
    ours: Sequence[tuple[str, nn.Parameter]]
    agree: Mapping[str, Any]
    sentences: Sequence[str]
    started: Started
    fallback: str | None
    resident: int
    stack: tuple[str, ...]

    def must_agree(self) -> dict[str, Any]:
        return {**self.agree, "whether states can move": self.fallback}

    def place_states(self) -> ResidentStates | MovingStates:
        """Takes the memory for the states of the layers, on all ranks together."""
        sharding = self.backend.sharding
        states = place(
            [own.state for own in self.optimizers[: len(self.layers)]],
            self.config,
            sharding.ranks,
            self.device,
            resident=self.resident,
            fallback=self.fallback,
        )
        if not isinstance(states, ResidentStates):
            self.backend.takes_sparse = False  # a class keeps sparse states of them, which do not move
        return states

    def place_weights(
        self, states: ResidentStates | MovingStates, undo: ExitStack
    ) -> tuple[HostWeights | None, LayerStates]:
        """Takes the weights of the layers to host memory, on all ranks together, if they are to rest there.

        Returns:
            The weights that rest, if there are any, and what the controller tells of switches.
        """
        if self.config.offload.weights == "resident":
            return None, states
        where = self.config, self.backend.ranks, self.device
        weights = place_weights(self.model, self.stack, self.layers, self.roles, *where, undo=undo.callback)
        return weights, StatesAndWeights(states, weights)

    @property
    def device(self) -> torch.device:
        """The device that trains."""
        sharding = self.backend.sharding
        return sharding.weights_come_to or sharding.shard_of(self.layers[0].params[0][1]).device


def prepare(given: Given, undo: ExitStack, begin: Callable[[Groups, dict[str, Any]], Groups]) -> Prepared:
    """Makes all that needs no other rank. Whatever is wrong is raised on this rank alone.

    Args:
        undo: gets what gives the model back as it was.
        begin: takes full groups and defaults as `torch.optim.Optimizer` does, with its checks, and gives its groups.

    Raises:
        ConfigError, UnsupportedModel: something that was passed cannot work.
        Exception: what torch or the optimizer class raises for it.
    """
    config, model, steps = as_config(given.config), given.model, given.accumulation_steps
    if not isinstance(model, nn.Module):
        raise ConfigError("model", shortly(model), "it is no nn.Module", "pass the model, wrapped as it trains")
    if (odd := isinstance(steps, bool) or not isinstance(steps, int)) or steps < 1:
        problem = "is no whole number" if odd else "is below 1"
        raise ConfigError("gradient_accumulation_steps", steps, problem, "use 1 or more")
    _check_observers(given.observers)
    if not isinstance(given.shard_states, bool):
        raise ConfigError("shard_states", given.shard_states, "is neither True nor False", "use one of them")
    optimizer_class, kwargs = class_and_arguments(given.optimizer_class, given.optimizer_kwargs)
    refuse_second(model)
    bare: list[nn.Module] = []
    backend = _add_adapters(model, config, steps, bare)
    undo.callback(lambda: [remove_adapters(each) for each in bare])
    undo.callback(restore_flags, [(param, param.requires_grad) for param in model.parameters()])
    if config.offload.weights == "host":
        backend.rest_weights()
    undo.callback(backend.detach)  # its hooks would change how the model trains without it

    woken = begin_adapters(model, config)
    unmatched = freeze_named(model, config)
    groups = begin(*_full_groups(model, given.params, optimizer_class, kwargs, config))
    found = layers_of(model, config, [p for group in groups for p in group["params"]])
    check_num_layers(config, len(found.layers))
    make_sampler(config, len(found.layers))
    layers, roles = choose_units(model, found, config, groups)
    units = [*layers, *roles]
    check_one_device(units, resting=backend.sharding.weights_come_to)
    ours = _passed(model, groups)
    sparse = _check_gradients(model, backend, units, ours)
    rule = judge_class(optimizer_class, kwargs, [{**group, "params": _among(units, group)} for group in groups])
    _check_modes(optimizer_class, config)
    if given.shard_states and rule.elementwise and not rounds_by_place(groups, _device_of(units, backend)):
        backend.sharding.divide_states(units)

    told = [
        woken,
        unmatched,
        several_stacks(found),
        frozen_layers(found, layers),
        tied_weights(model, units),
        compiled_whole(model, layers),
        too_low_recompile_limit(model, layers),
        trains_alone(backend),
        idle_experts_move(model, layers) if backend.name == "fsdp2" else None,
    ]
    freeze_others(units, [param for _, param in ours])
    optimizers = _unit_optimizers(units, groups, optimizer_class, kwargs, backend, rule)
    watch = GradientWatch(model, layers)
    undo.callback(watch.close)
    changes = ChangeLog(units, model)
    undo.callback(changes.close)
    agree = fingerprint(config, found, layers, groups, optimizer_class, kwargs, shard_states=given.shard_states)
    agree["update rule"] = (rule.elementwise, rule.blockwise, sorted(rule.kept))
    fallback, resident = _ask_fields(optimizers, len(layers), groups, sparse)
    if fallback is not None and config.offload.weights == "host":
        problem = f"states of layers would stay on the device, which take more than weights: {fallback}"
        raise ConfigError("grass.offload.weights", "host", problem, "use weights='resident', or another optimizer")
    sentences = [sentence for sentence in told if sentence]
    bare.clear()  # adapters stay from here on
    return Prepared(
        model,
        config,
        optimizer_class,
        backend,
        watch,
        changes,
        layers,
        roles,
        optimizers,
        ours,
        agree,
        sentences,
        started_with(model, found, layers, roles),
        fallback,
        resident,
        tuple(unit.name for unit in found.layers),
    )


def _check_observers(observers: Any) -> None:
    """
    Raises:
        ConfigError: they are no list of functions.
    """
    fix = "pass a list of functions of one argument, the event"
    if not isinstance(observers, Collection) or isinstance(observers, str):
        raise ConfigError("observers", shortly(observers), "it is no list", fix)
    for number, observer in enumerate(observers):
        if not callable(observer):
            raise ConfigError(f"observers[{number}]", shortly(observer), "it cannot be called", fix)


def _add_adapters(model: nn.Module, config: GrassConfig, steps: int, bare: list[nn.Module]) -> HookedBackend:
    """Adds the adapters of ``config``, unless the model has them, and gives the backend.

    Args:
        bare: gets the model if it had none.

    Raises:
        ConfigError: the model is wrapped already.
    """
    backend = backend_for(model, steps)
    if config.adapters is not None and not names_of_adapters(model) and not isinstance(backend, SingleBackend):
        problem = f"the model is wrapped for {backend.name} and has no adapters, which come before"
        fix = "call grass_dist.add_adapters(model, config) before you wrap it"
        raise ConfigError("grass.adapters", config.adapters.model_dump(), problem, fix)
    if config.adapters is not None and not names_of_adapters(model):
        bare.append(model)
    add_adapters(model, config)
    return backend


def _full_groups(
    model: nn.Module,
    params: Any,
    optimizer_class: type[torch.optim.Optimizer],
    kwargs: Mapping[str, Any],
    config: GrassConfig,
) -> tuple[Groups, dict[str, Any]]:
    """Does what `full_groups` does, and names the class that takes what Muon does not."""
    check_class(optimizer_class)
    try:
        return full_groups(model, params, optimizer_class, kwargs, lambda listed: split_groups(listed, model, config))
    except ValueError as error:
        if optimizer_class is torch.optim.Muon and "2D" in str(error):
            fix = "use grass_dist.MuonAdamW, which updates the others by AdamW"
            raise ConfigError("optimizer_class", "Muon", "it takes matrices alone", fix) from error
        raise


def _check_modes(optimizer_class: type[torch.optim.Optimizer], config: GrassConfig) -> None:
    """
    Raises:
        ConfigError: the class computes with states of layers that do not train, which host memory would have rounded.
    """
    if has_modes(optimizer_class) and config.offload.host_dtype is not None:
        problem = f"{optimizer_class.__name__}.eval() computes weights from states in host memory"
        raise ConfigError("grass.offload.host_dtype", config.offload.host_dtype, problem, "leave it out")


def raised_by(work: Callable[[], None]) -> Callable[[], None]:
    """Does ``work``, which communicates, and gives a function that raises what it has raised on this rank."""
    problem: Exception | None = None
    try:
        work()
    except Exception as error:  # of an observer, for example
        problem = error

    def report() -> None:
        if problem is not None:
            raise problem

    return report


def _passed(model: nn.Module, groups: Groups) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that the groups hold."""
    ours = {id(p) for group in groups for p in group["params"]}
    return [(name, p) for name, p in model.named_parameters() if id(p) in ours]


def _among(units: Sequence[Unit], group: Mapping[str, Any]) -> list[nn.Parameter]:
    """The parameters of a group that train."""
    trained = {id(p) for unit in units for _, p in unit.params}
    return [p for p in group["params"] if id(p) in trained]


def _device_of(units: Sequence[Unit], backend: HookedBackend) -> torch.device:
    """The device of what trains, after `check_one_device`."""
    return backend.sharding.weights_come_to or units[0].params[0][1].device


def _check_gradients(
    model: nn.Module, backend: HookedBackend, units: Sequence[Unit], ours: Sequence[tuple[str, nn.Parameter]]
) -> list[str]:
    """Checks that the backend reduces all gradients that there will be, and names the sparse ones."""
    sparse = sparse_parameters(model, units)
    if sparse and not backend.takes_sparse:
        raise UnsupportedModel(f"{sparse[0]} will have sparse gradients: {SPARSE}.")
    passed = {id(p) for _, p in ours}
    backend.check_others([n for n, p in model.named_parameters() if p.requires_grad and id(p) not in passed])
    return sparse


def _unit_optimizers(
    units: Sequence[Unit],
    groups: Groups,
    optimizer_class: type[torch.optim.Optimizer],
    kwargs: Mapping[str, Any],
    backend: HookedBackend,
    rule: UpdateRule,
) -> list[UnitOptimizer]:
    group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    return [
        UnitOptimizer(unit, [group_of[id(p)] for _, p in unit.params], optimizer_class, kwargs, backend.sharding, rule)
        for unit in units
    ]


def _ask_fields(
    optimizers: Sequence[UnitOptimizer], layers: int, groups: Groups, sparse: Sequence[str]
) -> tuple[str | None, int]:
    """Asks what each optimizer will keep; gives why nothing can move, and the bytes of the roles' states."""
    if sparse:
        return f"{sparse[0]} has sparse gradients", 0
    try:
        fields = [optimizer.fields(groups) for optimizer in optimizers]
    except GrassError as error:
        return str(error), 0
    return None, sum(field.nbytes for own in fields[layers:] for field in own)
