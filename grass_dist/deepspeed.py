"""`initialize`: does what `deepspeed.initialize` does, and trains by GRASS if the ds_config has a ``"grass"`` block."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from grass_dist.backends.zero.backend import ZeroBackend, ZeroSharding
from grass_dist.backends.zero.checks import check_axes, check_group, check_model, check_optimizer, is_new_adagrad
from grass_dist.backends.zero.ds_config import (
    ZeroSetup,
    has_grass,
    load_ds_config,
    refuse_factor,
    sequence_ranks,
    split_ds_config,
)
from grass_dist.backends.zero.engine import wrap_methods
from grass_dist.backends.zero.groups import dtype_of_masters, groups_of, weights_on_host
from grass_dist.backends.zero.jit import accelerator, on_cpu, spare_the_compiler
from grass_dist.backends.zero.narrow import NarrowZero
from grass_dist.backends.zero.place import place_states
from grass_dist.backends.zero.private import (
    check_classes,
    check_reduction,
    comm_dtype_of,
    deepspeed_version,
    stock_classes,
    zero_optimizers_from,
)
from grass_dist.backends.zero.stages import narrow_class
from grass_dist.config import check_num_layers
from grass_dist.errors import ConfigError, GrassError
from grass_dist.events import Observer
from grass_dist.method.changes import ChangeLog
from grass_dist.method.controller import GrassController
from grass_dist.method.samplers import make_sampler
from grass_dist.method.watch import GradientWatch
from grass_dist.model.adapters import (
    add_adapters,
    begin_adapters,
    layers_of,
    names_of_adapters,
    remove_adapters,
    split_in,
)
from grass_dist.model.compiled import compiled_whole, too_low_recompile_limit
from grass_dist.model.discovery import LayerMap, Unit
from grass_dist.model.experts import expert_blocks, idle_experts_move
from grass_dist.model.names import freeze_named
from grass_dist.model.tied import tied_weights
from grass_dist.model.units import (
    check_one_device,
    choose_units,
    fingerprint,
    freeze_others,
    frozen_layers,
    refuse_second,
    several_stacks,
    started_with,
)
from grass_dist.ranks import Ranks, say, together, world

Initialize = Callable[..., tuple[Any, Any, Any, Any]]


def initialize(*args: Any, observers: Sequence[Observer] = (), **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Takes what `deepspeed.initialize` takes, and returns what it returns.

    With a top-level block ``"grass": {...}`` in the ds_config (the fields of `GrassConfig`) the engine trains by
    GRASS: ``engine.grass`` is the `GrassController`. ``engine.backward``, ``step``, ``save_checkpoint`` and
    ``load_checkpoint`` work as without it. Without the block this is `deepspeed.initialize`.

    Args:
        observers: called with each `Refreshed` and `Sampled`, from the first draw on.

    Raises:
        ConfigError: a setting that cannot work; the message names its place in the ds_config.
        UnsupportedModel: no layer stack was found, or the model is of a kind that ZeRO sharding by layer cannot hold.
        RanksDisagree: ranks were given different configurations or models.
        GrassError: another rank has one of these problems, or this DeepSpeed is not known.
    """
    return initialize_with(stock_initialize(), args, kwargs, observers)


def initialize_with(
    stock: Initialize, args: Sequence[Any], kwargs: dict[str, Any], observers: Sequence[Observer]
) -> tuple[Any, Any, Any, Any]:
    """Does what `initialize` does, given DeepSpeed's own function."""
    given = inspect.signature(stock).bind(*args, **kwargs).arguments
    config, problem = config_of(given), None
    setup: ZeroSetup | None = None
    try:
        config = None if config is None else load_ds_config(config)
        if config is None or not has_grass(config):
            return stock(*args, **kwargs)
        setup = split_ds_config(config, given.get("mpu"))
        check_axes(given.get("mpu"), given.get("mesh_param"))
        check_classes(*stock_classes(), deepspeed_version())
        check_reduction(setup.stage, deepspeed_version(), on_cpu=on_cpu())
        check_model(given["model"])
        check_optimizer(given.get("optimizer"), setup)
    except GrassError as error:
        problem = error
    said = spare_the_compiler(setup.ds_config if setup else {})
    _join(given)
    setup = _agree(problem, setup)
    for sentence in (*setup.said, *said):
        say(world(), sentence)
    return _start(stock, given, setup, observers)


def stock_initialize() -> Initialize:
    """DeepSpeed's own `initialize`, also after `grass_dist.enable` has replaced it by ours."""
    import deepspeed

    return getattr(deepspeed.initialize, "__wrapped__", deepspeed.initialize)


def _start(
    stock: Initialize, given: dict[str, Any], setup: ZeroSetup, observers: Sequence[Observer]
) -> tuple[Any, Any, Any, Any]:
    given = {**given, "config": setup.ds_config}
    given.pop("config_params", None)
    if getattr(given.get("args"), "deepspeed_config", None) is not None:
        given["args"].deepspeed_config = None
    if given.get("lr_scheduler") is None and setup.scheduler is not None:
        given["lr_scheduler"] = functools.partial(_scheduler, *setup.scheduler)
    model: nn.Module = given["model"]
    bare = not names_of_adapters(model)
    together(world(), lambda: _add_adapters(model, setup))
    flags = [(param, param.requires_grad) for param in model.parameters()]
    made: list[ZeroMethod] = []

    def make(stock_zero: type, arguments: dict[str, Any]) -> NarrowZero:
        made.append(ZeroMethod(model, setup, observers, stock_zero, arguments))
        made[-1].grass.start()
        return made[-1].zero

    try:
        with zero_optimizers_from(make):
            engine, optimizer, loader, scheduler = stock(**given)
    except BaseException:  # there is no engine to destroy, and another may be made of the model
        for method in made:
            method.grass.detach()
        for param, flag in flags:
            param.requires_grad_(flag)
        if bare:
            remove_adapters(model)
        raise
    if "gradient_clipping" not in setup.ds_config:
        say(
            world(),
            f"gradient_clipping is not set: DeepSpeed {deepspeed_version()} takes its default of "
            f"{engine.gradient_clipping()}, as it does without GRASS (0 is no clipping).",
        )
    engine.grass = engine.optimizer.grass
    wrap_methods(engine, flags)
    return engine, optimizer, loader, scheduler


class ZeroMethod:
    """GRASS over one ZeRO optimizer: builds all of it from top to bottom, then listens to the optimizer's steps.

    ``grass.start()`` is left to the caller. It chooses what trains first, and so runs DeepSpeed's constructor.

    Args:
        stock: DeepSpeed's class.
        arguments: what the engine constructs ``stock`` with, by name.

    Attributes:
        zero: the optimizer for the engine.
        grass: the method's controller.
    """

    def __init__(
        self, model: nn.Module, setup: ZeroSetup, observers: Sequence[Observer], stock: type, arguments: dict[str, Any]
    ) -> None:
        user, config, stage = arguments["init_optimizer"], setup.grass, max(setup.stage, 1)
        sharding = ZeroSharding(Ranks(arguments["dp_process_group"]))
        check_group(sharding.ranks)
        found, layers, roles, still, said = _choose(model, setup, user, sharding)
        told = [*said, several_stacks(found), frozen_layers(found, layers), tied_weights(model, [*layers, *roles])]
        told += [compiled_whole(model, layers), too_low_recompile_limit(model, layers)]
        told += [_gather_with_experts(model, layers)] if stage == 3 else []
        told += [idle_experts_move(model, layers)]
        for sentence in filter(None, told):
            say(sharding.ranks, sentence)
        every = groups_of([*layers, *roles], user.param_groups)
        # Stages 1 and 2 save whole weights, where DeepSpeed's tools find what is in no group.
        never = groups_of([Unit("never trained", None, still)] if still and stage == 3 else [], user.param_groups)

        where = {"on_host": weights_on_host(arguments), "dtype": dtype_of_masters(arguments)}
        states = place_states(user, every, never, sharding, stage, config, layers, roles, **where)
        self.zero: NarrowZero = narrow_class(stock, stage == 3)(arguments, every, states, self)
        steps, summed = arguments["gradient_accumulation_steps"], _sequence_ranks(arguments, stage)
        self._backend = ZeroBackend(model, self.zero, sharding, steps, stage, _wire_bytes(arguments), summed)
        watch, changes = GradientWatch(model, layers), ChangeLog([*layers, *roles], model)
        self.grass = GrassController(config, layers, roles, self._backend, states, watch, changes, observers)
        self.grass.introduce(started_with(model, found, layers, roles))

    def gradients_ready(self) -> None:
        self.grass.check_gradients()
        self._backend.gradients_ready()

    def rest_step(self) -> bool:
        self.grass.check_gradients()
        return self._backend.rest_step()

    def stepped(self, applied: bool) -> None:
        self.grass.advance() if applied else self.grass.skip_step()


def _wire_bytes(arguments: dict[str, Any]) -> Callable[[nn.Parameter], int]:
    """Says in how many bytes DeepSpeed reduces an element of a parameter's gradient."""
    usual: torch.dtype = arguments["communication_data_type"]
    return lambda param: (comm_dtype_of(param) or usual).itemsize


def _sequence_ranks(arguments: dict[str, Any], stage: int) -> int:
    """The number of ranks over which DeepSpeed sums gradients of parts of a sequence, instead of averaging them.

    It does at all stages, except where ZeRO-3 reduce-scatters: there it averages over all ranks.
    """
    if stage == 3 and arguments.get("reduce_scatter", True):
        return 1
    return sequence_ranks(arguments.get("mpu"))


_Chosen = tuple[LayerMap, tuple[Unit, ...], tuple[Unit, ...], tuple[tuple[str, nn.Parameter], ...], list[str | None]]
"""(layers of the model, those that compete, roles that train, what the user's optimizer has and GRASS never trains,
what `begin_adapters` and `freeze_named` say)"""


def _choose(model: nn.Module, setup: ZeroSetup, user: torch.optim.Optimizer, sharding: ZeroSharding) -> _Chosen:
    """Chooses what trains, on all ranks alike."""
    config = setup.grass

    def choose() -> _Chosen:
        try:
            refuse_second(model)
            check_optimizer(user, setup)
            if is_new_adagrad(user):
                user.state.clear()  # a layer gets its states when it first trains
            said = [begin_adapters(model, config), freeze_named(model, config)]
            split_in(user, model, config)
            groups = user.param_groups
            found = layers_of(model, config, [p for group in groups for p in group["params"]])
            check_num_layers(config, len(found.layers))
            make_sampler(config, len(found.layers))
            given = {p for group in groups for p in group["params"] if p.requires_grad}
            layers, roles = choose_units(model, found, config, groups)
            freeze_others([*layers, *roles], model.parameters())
            still = tuple((n, p) for n, p in model.named_parameters() if p in given and not p.requires_grad)
            check_one_device([*layers, *roles])
        except ConfigError as error:
            raise error if error.field == "optimizer" else error.under("grass") from None
        return found, layers, roles, still, said

    kwargs = {k: v for k, v in user.defaults.items() if k != "params"}
    return together(
        sharding.ranks,
        choose,
        lambda made: fingerprint(config, made[0], made[1], user.param_groups, type(user), kwargs),
    )


def _add_adapters(model: nn.Module, setup: ZeroSetup) -> None:
    try:
        add_adapters(model, setup.grass)
    except ConfigError as error:
        raise error.under("grass") from None


def _gather_with_experts(model: nn.Module, layers: Sequence[Unit]) -> str | None:
    """Has ZeRO-3 gather a mixture of experts as one: ranks would gather what their batches use, and disagree."""
    from deepspeed.utils import set_z3_leaf_modules, z3_leaf_module

    if not (classes := {type(block) for block in expert_blocks(model, layers) if not z3_leaf_module(block)}):
        return None
    set_z3_leaf_modules(model, sorted(classes, key=str))
    names = ", ".join(sorted(cls.__name__ for cls in classes))
    return f"ZeRO-3 gathers all experts of a layer together ({names}), as ranks may use different ones."


def _scheduler(name: str, params: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    """Makes the ds_config's scheduler on the user's parameter groups: those of an interval come and go."""
    from deepspeed.runtime import lr_schedules

    cls = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name, None)
    if cls is None:
        raise ConfigError("scheduler.type", name, "neither DeepSpeed nor torch has it", "use WarmupLR, for example")
    return cls(optimizer, **params)


def config_of(given: dict[str, Any]) -> Any:
    """The ds_config among the arguments of `deepspeed.initialize`, which may have it in three places."""
    in_args = getattr(given.get("args"), "deepspeed_config", None)
    places = given.get("config"), given.get("config_params"), in_args
    return next((config for config in places if config is not None), None)


def _join(given: dict[str, Any]) -> None:
    """Makes the process group that `deepspeed.initialize` would make first."""
    import deepspeed

    port = {"distributed_port": given["distributed_port"]} if "distributed_port" in given else {}
    backend = accelerator().communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=given.get("dist_init_required"), **port)
    if not on_cpu():
        accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))


def _agree(problem: GrassError | None, setup: ZeroSetup | None) -> ZeroSetup:
    def checked() -> ZeroSetup:
        if problem is not None:
            raise problem
        assert setup is not None
        refuse_factor(setup.ds_config, world().world_size)
        return setup

    def compared(setup: ZeroSetup) -> dict[str, Any]:
        return {f"ds_config.{k}": v for k, v in setup.ds_config.items()} | {"deepspeed version": deepspeed_version()}

    return together(world(), checked, compared)
