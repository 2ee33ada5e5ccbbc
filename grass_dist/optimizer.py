"""`GrassOptimizer`: layer-wise training behind the interface of a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import nn

from grass_dist.backends import backend_for
from grass_dist.backends.base import HookedBackend
from grass_dist.backends.clipping import clip_grads
from grass_dist.checkpoint.torch_run import TorchHoldings
from grass_dist.config import GrassConfig, check_num_layers
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
from grass_dist.ranks import say, together
from grass_dist.states.moving import MovingStates
from grass_dist.states.placement import place
from grass_dist.states.resident import ResidentStates
from grass_dist.states.unit_optimizer import ELEMENTWISE, HOW, UnitOptimizer

ParamGroups = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class GrassOptimizer(torch.optim.Optimizer):
    """Trains γ layers of a model at a time, chosen by their gradient norms (GRASS, arXiv 2604.07808).

    The model may be plain, wrapped in `DistributedDataParallel`, or sharded by `fully_shard` (FSDP2, HSDP); wrap it
    first. Frozen layers have ``requires_grad=False``: no gradient, no reduction, no decay, no step. For the first
    `probe_steps` calls of `step` nothing is updated; gradients are measured and freed in the backward.

    Args:
        model: its decoder layers are found by structure, or named by ``config.layers``.
        optimizer_class: a `torch.optim.Optimizer` class with per-parameter state, e.g. `torch.optim.AdamW`.
        optimizer_kwargs: its arguments, e.g. ``{"lr": 1e-5, "weight_decay": 0.01}``.
        config: `GrassConfig`, equal on all ranks.
        params: parameters or parameter groups to train, as for any optimizer; default all of the model's. Groups
            (decay and no decay, say) stay groups in `param_groups`.
        gradient_accumulation_steps: micro-batches of a step. Only the probe needs it, which frees gradients after
            each micro-batch and sums them in host memory.
        observers: called with each `Refreshed` and `Sampled`, from the first draw on.
        shard_states: under DDP each rank keeps and updates 1/N of every parameter, if the class is one of torch's that
            work entry by entry. False: whole states on each rank, as Hugging Face Trainer wants, which saves rank 0's
            alone. Under FSDP2 states are sharded anyway.

    Attributes:
        grass: the `GrassController`: phase, step, round, active_layers, importances, probabilities, add_observer.

    Raises:
        ConfigError: a setting that cannot work with this model.
        UnsupportedModel: no layer stack was found, or the model is wrapped in something unknown.
        RanksDisagree: ranks were given different configurations, models or groups.
        GrassError: another rank has one of these problems; so all of them end.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_class: type[torch.optim.Optimizer],
        optimizer_kwargs: Mapping[str, Any] | None = None,
        *,
        config: GrassConfig,
        params: ParamGroups | None = None,
        gradient_accumulation_steps: int = 1,
        observers: Sequence[Observer] = (),
        shard_states: bool = True,
    ) -> None:
        kwargs = dict(optimizer_kwargs or {})
        self._detached = False
        self._flags = [(param, param.requires_grad) for param in model.parameters()]
        backend = backend_for(model, gradient_accumulation_steps)
        try:
            self._build(
                model,
                backend,
                optimizer_class,
                kwargs,
                config,
                params,
                gradient_accumulation_steps,
                observers,
                shard_states,
            )
        except BaseException:
            backend.detach()  # its hooks would change how the model trains without it
            self._thaw()
            raise

    def _build(
        self,
        model: nn.Module,
        backend: HookedBackend,
        optimizer_class: type[torch.optim.Optimizer],
        kwargs: Mapping[str, Any],
        config: GrassConfig,
        params: ParamGroups | None,
        gradient_accumulation_steps: int,
        observers: Sequence[Observer],
        shard_states: bool,
    ) -> None:
        def prepare() -> tuple[LayerMap, list[dict[str, Any]], dict[str, Any], tuple[Unit, ...], tuple[Unit, ...]]:
            if gradient_accumulation_steps < 1:
                raise ConfigError(
                    "gradient_accumulation_steps", gradient_accumulation_steps, "is below 1", "use 1 or more"
                )
            refuse_second(model)
            found = find_layers(model, config.layers)
            check_num_layers(config, len(found.layers))
            make_sampler(config, len(found.layers))
            groups, defaults = _full_groups(model, params, optimizer_class, kwargs)
            layers, roles = choose_units(model, found, config, groups)
            check_one_device([*layers, *roles], backend.sharding)
            if shard_states and optimizer_class in ELEMENTWISE:
                backend.sharding.divide_states([*layers, *roles])
            return found, groups, defaults, layers, roles

        found, groups, defaults, layers, roles = together(
            backend.ranks,
            prepare,
            lambda made: fingerprint(
                config, made[0], made[3], made[1], optimizer_class, kwargs, shard_states=shard_states
            ),
        )
        if told := frozen_layers(found, layers):
            say(backend.ranks, told)
        super().__init__(groups, defaults)
        self._backend = backend
        trained = {id(p) for unit in (*layers, *roles) for _, p in unit.params}
        # In the model's order, as clip_grad_norm_(model.parameters()) would take them: a sum's last bit depends on it.
        self._trained = [p for p in model.parameters() if id(p) in trained]
        self._model = model
        self._layer_optimizers = self._make_unit_optimizers(layers, optimizer_class, kwargs)
        self._role_optimizers = self._make_unit_optimizers(roles, optimizer_class, kwargs)
        self._states = self._place_states(config)
        self._in_backward = config.offload.update_in_backward
        self._updated: set[int] = set()  # layers, since the last step ended
        if self._in_backward:
            backend.tell_final(self._update_in_backward)
        watch = GradientWatch(model, layers)
        self.grass = GrassController(config, layers, roles, backend, self._states, watch, observers)
        self.grass.start()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Ends an optimizer step: updates the active layers (nothing in the probe), then advances the method.

        Call it once for each global batch, on every rank, after the last micro-batch's backward.
        """
        self._check_attached()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._backend.check_before_step()
        self.grass.finish_gradients()
        if self.grass.phase == "train":
            for layer in reversed(self.grass.active_layers):  # the order in which the backward finished them
                if layer not in self._updated:
                    self._states.update(layer, partial(self._update, self._layer_optimizers[layer]))
            self._updated.clear()
            for optimizer in self._role_optimizers:
                with torch.profiler.record_function(f"GRASS::update ({optimizer.unit.name})"):
                    self._update(optimizer)
            self._states.finish()
            self._backend.sharding.publish(self.grass.trainable_units())
        self.grass.advance()
        return loss

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Clips the global gradient norm of the trainable parameters, over all shards and ranks.

        Returns:
            The norm before clipping, a 0-dim tensor; 0 in the probe, where there is no gradient left to clip.
        """
        self._check_attached()
        if self._in_backward:
            raise GrassError(
                "clip_grad_norm_ comes too late: grass.offload.update_in_backward updates the layers before the norm "
                "of all gradients is known. Set it to False, or do not clip."
            )
        self.grass.finish_gradients()
        trainable = {id(p) for unit in self.grass.trainable_units() for _, p in unit.params}
        params = [p for p in self._trained if id(p) in trainable and p.grad is not None]
        return clip_grads(params, max_norm, norm_type, self._backend.sharding)

    def detach(self) -> None:
        """Gives the model back as it was: no hook of the method, ``requires_grad`` as at the start, no gradient.

        The weights stay as they are trained, and `state_dict` can still be read; `step` raises from now on. Call it on
        every rank. Another optimizer may train the model afterwards; a second call does nothing.
        """
        if self._detached:
            return
        self._states.settle()
        self.grass.detach()
        self._thaw()
        for param, _ in self._flags:
            param.grad = None
        self._detached = True

    def _thaw(self) -> None:
        for param, flag in self._flags:
            param.requires_grad_(flag)

    def _check_attached(self) -> None:
        if self._detached:
            raise GrassError("This GrassOptimizer was detached from its model; make another one to go on training.")

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state (masters, moments) that rest on this rank's device."""
        return self._states.device_bytes + sum(optimizer.nbytes for optimizer in self._role_optimizers)

    @property
    def host_state_bytes(self) -> int:
        """Bytes of optimizer state that rest in this rank's host memory."""
        return self._states.host_bytes

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Any]]:
        """State of each parameter that has one, wherever it is: on the device, or in host memory.

        To ask for it waits for the copies under way. What was taken out of it is valid until the next step, after which
        it may lie elsewhere: ask again.
        """
        if hasattr(self, "_states"):
            self._states.settle()
        return self._shown

    @state.setter
    def state(self, state: dict[nn.Parameter, dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._shown = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: layers and their parameters are fixed then."""
        if hasattr(self, "grass"):
            raise GrassError("GrassOptimizer cannot take another parameter group; pass all of them as params=.")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """State of every layer that was ever active, of the method, and the parameter groups.

        ``state[i]`` belongs to the i-th parameter in the order of `param_groups`, this rank's shard of it, with its
        fp32 ``master`` if the weights are 16-bit and which ``part`` of how many it is if `shard_states` divides it. To
        be loaded on the same rank of as many ranks. Save or copy it before the next step: as in any optimizer, its
        tensors are the state itself, or lie in memory that it moves to.
        """
        self._states.settle()
        position = {id(p): i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        state: dict[int, dict[str, Any]] = {}
        for index, optimizer in enumerate(self._unit_optimizers):
            in_slot = index < len(self._layer_optimizers) and self._states.in_slot(index)
            for at, (_, param) in enumerate(optimizer.unit.params):
                if own := optimizer.state_of(at):
                    state[position[id(param)]] = {k: _copied(v) for k, v in own.items()} if in_slot else own
        groups, start = [], 0
        for group in self.param_groups:
            count = len(group["params"])
            groups.append({**group, "params": list(range(start, start + count))})
            start += count
        return {"state": dict(sorted(state.items())), "param_groups": groups, "grass": self.grass.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`: the same model, groups and number of ranks.

        Raises:
            ValueError: the groups, or the layers that compete, are not those of this optimizer, or the states are not
                of this rank's shards. Nothing has been changed.
        """
        saved, mine = state_dict["param_groups"], self.param_groups
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in mine]:
            raise ValueError(
                "The saved state is of parameter groups with "
                f"{[len(g['params']) for g in saved]} parameters, this optimizer's have "
                f"{[len(g['params']) for g in mine]}; build it with the same model and groups."
            )
        self._check_attached()
        position = {id(p): i for i, p in enumerate(p for g in mine for p in g["params"])}
        entries = [
            [state_dict["state"].get(position[id(p)], {}) for _, p in optimizer.unit.params]
            for optimizer in self._unit_optimizers
        ]
        for optimizer, states in zip(self._unit_optimizers, entries, strict=True):
            optimizer.check_parts(states)
        self.grass.check_layers(state_dict["grass"])
        for group, other in zip(mine, saved, strict=True):
            group.update({k: v for k, v in other.items() if k != "params" and k not in HOW})
        for index, states in enumerate(entries):
            self._put_state(index, states)
        self._updated.clear()
        self.grass.load_state_dict(state_dict["grass"])

    def holdings(self) -> TorchHoldings:
        """What `grass_dist.checkpoint` saves and loads: the model's weights too, for any number of ranks."""
        return TorchHoldings(
            self._model,
            self._unit_optimizers,
            self.param_groups,
            self.grass,
            self._states.settle,
            self._put_state,
        )

    @property
    def _unit_optimizers(self) -> list[UnitOptimizer]:
        return [*self._layer_optimizers, *self._role_optimizers]

    @torch.no_grad()
    def _update_in_backward(self, unit: Unit) -> None:
        assert unit.index is not None
        optimizer = self._layer_optimizers[unit.index]

        def job() -> None:
            self._update(optimizer)
            for _, param in unit.params:
                param.grad = None

        self._updated.add(unit.index)
        self._states.update(unit.index, job)

    def _put_state(self, index: int, states: Sequence[Mapping[str, Any]]) -> None:
        """Replaces the state of a unit by one for each of its parameters; all empty, it has none yet."""
        optimizer = self._unit_optimizers[index]
        load = partial(optimizer.load_state, states, self.param_groups)
        if index >= len(self._layer_optimizers):
            load()
        elif any(states):
            self._states.put(index, load)
        else:
            self._states.put(index, None)
            load()
        self._show_state(optimizer)

    def _update(self, optimizer: UnitOptimizer) -> None:
        first = not optimizer.has_state
        optimizer.step(self.param_groups)
        if first:
            self._show_state(optimizer)

    def _show_state(self, optimizer: UnitOptimizer) -> None:
        """Makes ``self.state[param]`` the very dict in which the layer's optimizer keeps that parameter's state."""
        for at, (_, param) in enumerate(optimizer.unit.params):
            if optimizer.inner is not None:
                self._shown[param] = optimizer.targets[at].state
            else:
                self._shown.pop(param, None)

    def _place_states(self, config: GrassConfig) -> ResidentStates | MovingStates:
        fallback, resident = None, 0
        try:
            for optimizer in self._layer_optimizers:
                optimizer.fields(self.param_groups)
            resident = sum(f.nbytes for own in self._role_optimizers for f in own.fields(self.param_groups))
        except GrassError as error:
            fallback = str(error)
        first, sharding = self._layer_optimizers[0].unit.params[0][1], self._backend.sharding
        return place(
            [own.state for own in self._layer_optimizers],
            config,
            sharding.ranks,
            sharding.shard_of(first).device,
            resident=resident,
            fallback=fallback,
        )

    def _make_unit_optimizers(
        self, units: Sequence[Unit], optimizer_class: type[torch.optim.Optimizer], kwargs: Mapping[str, Any]
    ) -> list[UnitOptimizer]:
        group_of = {id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]}
        sharding = self._backend.sharding
        return [
            UnitOptimizer(unit, [group_of[id(p)] for _, p in unit.params], optimizer_class, kwargs, sharding)
            for unit in units
        ]


def _copied(value: Any) -> Any:
    """Makes a copy in host memory: a slot on the device holds another layer's state later."""
    return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value


def _full_groups(
    model: nn.Module,
    params: ParamGroups | None,
    optimizer_class: type[torch.optim.Optimizer],
    kwargs: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The user's groups with every hyperparameter filled in by the optimizer class, and its defaults.

    The class is made over one-element stand-ins, since some classes make their state when they are made.
    """
    given: list[Any] = list(params) if params is not None else list(model.parameters())
    if not given:
        raise ConfigError("params", given, "there is no parameter to train", "pass the model's parameters")
    groups = given if isinstance(given[0], dict) else [{"params": given}]
    groups = [{**g, "params": [g["params"]] if torch.is_tensor(g["params"]) else list(g["params"])} for g in groups]
    stand_ins = [{**g, "params": [nn.Parameter(torch.zeros(1)) for _ in g["params"]]} for g in groups]
    template = optimizer_class([g for g in stand_ins if g["params"]], **kwargs)
    filled = iter(template.param_groups)
    full = [{**next(filled), "params": g["params"]} if g["params"] else g for g in groups]
    return full, dict(template.defaults)
