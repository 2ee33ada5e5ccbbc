"""`initialize`: `deepspeed.initialize` for a ds_config with a ``"grass"`` block."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from grass_dist.backends.zero.backend import ZeroBackend
from grass_dist.backends.zero.checkpoint import add_checkpoints, add_exports
from grass_dist.backends.zero.checks import check_model, check_optimizer
from grass_dist.backends.zero.destroy import add_destroy, flags_of
from grass_dist.backends.zero.ds_config import ZeroSetup, has_grass, load_ds_config, split_ds_config
from grass_dist.backends.zero.jit import accelerator, on_cpu, spare_the_compiler
from grass_dist.backends.zero.narrow import NarrowZero, narrow_class
from grass_dist.backends.zero.place import place_states
from grass_dist.backends.zero.private import check_classes, deepspeed_version
from grass_dist.backends.zero.reads import Reads
from grass_dist.config import check_num_layers
from grass_dist.errors import ConfigError, GrassError
from grass_dist.events import Observer
from grass_dist.method.controller import GrassController
from grass_dist.method.samplers import make_sampler
from grass_dist.method.watch import GradientWatch
from grass_dist.model.discovery import LayerMap, Unit, find_layers
from grass_dist.model.units import (
    check_one_device,
    choose_units,
    fingerprint,
    frozen_layers,
    refuse_second,
)
from grass_dist.ranks import say, together, world

Initialize = Callable[..., tuple[Any, Any, Any, Any]]


def initialize(*args: Any, observers: Sequence[Observer] = (), **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Takes what `deepspeed.initialize` takes, and returns what it returns.

    With a top-level block ``"grass": {...}`` in the ds_config (the fields of `GrassConfig`) the engine trains by
    GRASS: ``engine.grass`` is the `GrassController`. ``engine.backward``, ``step``, ``save_checkpoint`` and
    ``load_checkpoint`` work as ever. Without the block this is `deepspeed.initialize`.

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
    """`initialize`, given DeepSpeed's own function."""
    given = inspect.signature(stock).bind(*args, **kwargs).arguments
    config, problem = config_of(given), None
    setup: ZeroSetup | None = None
    try:
        config = None if config is None else load_ds_config(config)
        if config is None or not has_grass(config):
            return stock(*args, **kwargs)
        setup = split_ds_config(config)
        check_classes(*_stock_classes(), deepspeed_version())
        check_model(given["model"])
        check_optimizer(given.get("optimizer"), setup)
    except GrassError as error:
        problem = error
    said = spare_the_compiler(setup.ds_config if setup else {})
    _join(given)
    setup = _agree(problem, setup)
    for sentence in (*setup.said, *said):
        say(world(), sentence)
    return _build(stock, given, setup, observers)


def stock_initialize() -> Initialize:
    """DeepSpeed's own `initialize`, also where `grass_dist.enable` has put ours in its place."""
    import deepspeed

    return getattr(deepspeed.initialize, "__wrapped__", deepspeed.initialize)


def _build(
    stock: Initialize, given: dict[str, Any], setup: ZeroSetup, observers: Sequence[Observer]
) -> tuple[Any, Any, Any, Any]:
    given = {**given, "config": setup.ds_config}
    given.pop("config_params", None)
    if getattr(given.get("args"), "deepspeed_config", None) is not None:
        given["args"].deepspeed_config = None
    if given.get("lr_scheduler") is None and setup.scheduler is not None:
        given["lr_scheduler"] = functools.partial(_scheduler, *setup.scheduler)
    model: nn.Module = given["model"]
    flags = flags_of(model)
    made: list[NarrowZero] = []
    try:
        with _narrowed(functools.partial(_connect, model, setup, tuple(observers), made)):
            engine, optimizer, loader, scheduler = stock(**given)
    except BaseException:
        for zero in made:  # there is no engine to destroy, and another may be made of the model
            zero.grass.detach()
            for param, flag in flags:
                param.requires_grad_(flag)
        raise
    if "gradient_clipping" not in setup.ds_config:
        say(
            world(),
            f"gradient_clipping is not set: DeepSpeed {deepspeed_version()} takes its default of "
            f"{engine.gradient_clipping()}, as it does without GRASS (0 is no clipping).",
        )
    engine.grass = engine.optimizer.grass
    add_checkpoints(engine)
    add_exports(engine)
    add_destroy(engine, flags)
    return engine, optimizer, loader, scheduler


def _connect(
    model: nn.Module, setup: ZeroSetup, observers: Sequence[Observer], made: list[NarrowZero], zero: NarrowZero
) -> None:
    """Puts the method on top of a ZeRO optimizer that the engine is making."""
    arguments, config = zero.arguments, setup.grass
    stage = max(setup.stage, 1)
    groups = zero.user_optimizer.param_groups
    wire = torch.empty(0, dtype=arguments["communication_data_type"]).element_size()
    backend = ZeroBackend(zero, arguments["dp_process_group"], arguments["gradient_accumulation_steps"], stage, wire)
    kwargs = {k: v for k, v in zero.user_optimizer.defaults.items() if k != "params"}

    def choose() -> tuple[LayerMap, tuple[Unit, ...], tuple[Unit, ...], tuple[tuple[str, nn.Parameter], ...]]:
        try:
            refuse_second(model)
            check_optimizer(zero.user_optimizer, setup)
            found = find_layers(model, config.layers)
            check_num_layers(config, len(found.layers))
            make_sampler(config, len(found.layers))
            given = {p for group in groups for p in group["params"] if p.requires_grad}
            layers, roles = choose_units(model, found, config, groups)
            still = tuple((n, p) for n, p in model.named_parameters() if p in given and not p.requires_grad)
            check_one_device([*layers, *roles], backend.sharding)
        except ConfigError as error:
            raise error if error.field == "optimizer" else error.under("grass") from None
        return found, layers, roles, still

    found, layers, roles, still = together(
        backend.ranks,
        choose,
        lambda made: fingerprint(config, made[0], made[1], groups, type(zero.user_optimizer), kwargs),
    )
    zero.every = backend.groups_of([*layers, *roles])
    if told := frozen_layers(found, layers):
        say(backend.ranks, told)
    # Stages 1 and 2 save whole weights, where DeepSpeed's tools find what is in no group.
    never = backend.groups_of([Unit("never trained", None, still)]) if still and stage == 3 else []
    zero.states = place_states(zero, backend, config, layers, roles, never)
    zero.reads = Reads(zero, arguments["dp_process_group"])
    watch = GradientWatch(model, layers)
    zero.grass = GrassController(config, layers, roles, backend, zero.states, watch, observers)
    made.append(zero)
    zero.on_step = lambda applied: zero.grass.advance() if applied else zero.grass.skip_step()


@contextmanager
def _narrowed(connect: Callable[[Any], None]) -> Iterator[None]:
    """While an engine is made, it finds our classes where it looks for DeepSpeed's."""
    import deepspeed.runtime.engine as engine
    import deepspeed.runtime.zero.stage3 as stage3

    stock12, stock3 = _stock_classes()
    engine.DeepSpeedZeroOptimizer = narrow_class(stock12, False, connect)
    stage3.DeepSpeedZeroOptimizer_Stage3 = narrow_class(stock3, True, connect)
    try:
        yield
    finally:
        engine.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3 = stock12, stock3


def _stock_classes() -> tuple[type, type]:
    import deepspeed.runtime.engine as engine
    import deepspeed.runtime.zero.stage3 as stage3

    return engine.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3


def _scheduler(name: str, params: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    """The ds_config's scheduler, on the user's parameter groups: those of an interval come and go."""
    from deepspeed.runtime import lr_schedules

    cls = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name, None)
    if cls is None:
        raise ConfigError("scheduler.type", name, "neither DeepSpeed nor torch has it", "use WarmupLR, for example")
    return cls(optimizer, **params)


def config_of(given: dict[str, Any]) -> Any:
    """The ds_config among the arguments of `deepspeed.initialize`, wherever it stands there."""
    for config in (
        given.get("config"),
        given.get("config_params"),
        getattr(given.get("args"), "deepspeed_config", None),
    ):
        if config is not None:
            return config
    return None


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
        return setup

    def compared(setup: ZeroSetup) -> dict[str, Any]:
        return {f"ds_config.{k}": v for k, v in setup.ds_config.items()} | {"deepspeed version": deepspeed_version()}

    return together(world(), checked, compared)
