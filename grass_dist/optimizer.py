"""`GrassOptimizer`: layer-wise training behind the interface of a torch optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, overload

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from grass_dist.backends import ranks_of
from grass_dist.backends.clipping import clip_grads
from grass_dist.backends.scaling import LossScaling, asking_scaler
from grass_dist.checkpoint.torch_run import TorchHoldings
from grass_dist.checkpoint.torch_states import METHOD, Loaded, StateDict, StateHooks, TorchStates
from grass_dist.config import GrassConfig
from grass_dist.construction import Given, Prepared, prepare, raised_by
from grass_dist.errors import GrassError, StateError
from grass_dist.events import Observer
from grass_dist.method.controller import GrassController
from grass_dist.method.spoken import about_unmeasured, about_woken
from grass_dist.model.discovery import Unit
from grass_dist.model.groups import ParamGroups
from grass_dist.ranks import say, together
from grass_dist.states.joint_update import update_together
from grass_dist.states.moving import MovingStates
from grass_dist.states.unit_optimizer import UnitOptimizer, set_training_of
from grass_dist.states.update_rule import HOW, has_modes
from grass_dist.states.view import StateView


class GrassOptimizer(torch.optim.Optimizer):
    """Trains γ layers of a model at a time, chosen by their gradient norms (GRASS, arXiv 2604.07808).

    The model may be plain, wrapped in `DistributedDataParallel`, or sharded by `fully_shard` (FSDP2, HSDP); wrap it
    first. Frozen layers have ``requires_grad=False``: no gradient, no reduction, no decay, no step. For the first
    `probe_steps` calls of `step` nothing is updated; gradients are measured and freed in the backward.

    Args:
        model: its decoder layers are found by structure, or named by ``config.layers``.
        optimizer_class: a `torch.optim.Optimizer` class, e.g. `torch.optim.AdamW`, a `functools.partial` of one, or its
            name in `torch.optim`. It must update a parameter from the parameter's own gradient and state, which a trial
            on small stand-ins finds out: rules that mix parameters (Prodigy) or need a closure (LBFGS) are refused.
        optimizer_kwargs: its arguments, e.g. ``{"lr": 1e-5, "weight_decay": 0.01}``.
        config: `GrassConfig`, or a dict of its settings, equal on all ranks.
        params: parameters, pairs of name and parameter, or parameter groups to train, as for any optimizer; default
            all of the model's. Groups (decay and no decay, say) stay groups in `param_groups`. What is not passed keeps
            its ``requires_grad``; what is passed and is in no layer and no role that trains is frozen.
        gradient_accumulation_steps: micro-batches of a step. Only the probe needs it, which frees gradients after
            each micro-batch and sums them in host memory.
        observers: called with each `Refreshed` and `Sampled`, from the first draw on.
        shard_states: under DDP each rank keeps and updates 1/N of every parameter, if the class works entry by entry
            (fused kernels of the CPU do not).
            False: whole states on each rank, as Hugging Face Trainer wants, which saves rank 0's
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
        optimizer_class: type[torch.optim.Optimizer] | Callable[..., torch.optim.Optimizer] | str,
        optimizer_kwargs: Mapping[str, Any] | None = None,
        *,
        config: GrassConfig | Mapping[str, Any],
        params: ParamGroups | None = None,
        gradient_accumulation_steps: int = 1,
        observers: Sequence[Observer] = (),
        shard_states: bool = True,
    ) -> None:
        self._detached = False
        self._hooks = StateHooks()
        undo = ExitStack()  # gives the model back as it was
        how = config, params, gradient_accumulation_steps, observers, shard_states
        given = Given(model, optimizer_class, optimizer_kwargs, *how)
        ranks = ranks_of(model)
        try:
            made = together(ranks, lambda: prepare(given, undo, self._begin), Prepared.must_agree)
            self._build(made, observers, undo)
            together(ranks, raised_by(self.grass.start))
        except BaseException:
            undo.close()
            raise
        self._give_back = weakref.finalize(self, undo.close)  # the model outlives the optimizer
        self._give_back.atexit = False

    def _begin(self, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> list[dict[str, Any]]:
        super().__init__(groups, defaults)
        return self.param_groups

    def _build(self, made: Prepared, observers: Sequence[Observer], undo: ExitStack) -> None:
        for told in made.sentences:
            say(made.backend.ranks, told)
        self._model, self._backend, self._ours = made.model, made.backend, made.ours
        self._class_name = made.optimizer_class.__name__
        trained = {id(p) for unit in (*made.layers, *made.roles) for _, p in unit.params}
        # In the model's order, as clip_grad_norm_(model.parameters()) would take them: a sum's last bit depends on it.
        self._trained = [p for _, p in made.ours if id(p) in trained]
        count = len(made.layers)
        self._layer_optimizers, self._role_optimizers = made.optimizers[:count], made.optimizers[count:]
        self._states = made.place_states()
        self._weights, both = made.place_weights(self._states, undo)
        me, moves = weakref.proxy(self), isinstance(self._states, MovingStates)
        self._view = StateView(
            self._unit_optimizers, lambda *unit: me._put_state(*unit), moves=moves, asked=self._asked
        )
        self._has_modes = has_modes(made.optimizer_class)
        self._training: bool | None = None  # what `train` and `eval` were last asked for; None: nothing, or a load
        self._said: set[str] = set()  # what the user has been told
        self._in_backward = made.config.offload.update_in_backward
        self._updated: set[int] = set()  # layers, since the last step ended
        if self._in_backward:
            made.backend.tell_final(self._update_in_backward)
        self.grass = GrassController(
            made.config, made.layers, made.roles, made.backend, both, made.watch, made.changes, observers
        )
        self.grass.introduce(made.started)
        self._dicts = TorchStates(
            made.model,
            self._unit_optimizers,
            self.grass,
            self._class_name,
            self._view,
            lambda index: me._borrowed(index),
        )
        self._scaling = LossScaling(made.backend, self.grass, in_backward=bool(self._in_backward))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Ends an optimizer step: updates the active layers (nothing in the probe), then advances the method.

        Call it once for each global batch, on every rank, after the last micro-batch's backward. Without a backward
        it does nothing in the probe, and is counted in ``grass.skipped``.

        Raises:
            GrassError: it is compiled, by ``torch.compile(optimizer.step)`` or within a function that is.
        """
        compiled = torch.compiler.is_compiling()
        return self._step(closure, compiled=compiled)  # pyright: ignore[reportAttributeAccessIssue]

    @torch.compiler.disable()
    def _step(self, closure: Callable[[], float] | None, *, compiled: bool) -> float | None:
        """The work of `step`. A compiler does not follow it, so that the error is seen where `step` was traced."""
        if compiled:
            raise GrassError(
                "torch.compile cannot compile GrassOptimizer.step: it moves states, draws layers and communicates. "
                "Call it outside of compiled functions, and compile the model or its layers alone."
            )
        self._check_attached()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._dicts.makes_states(self.param_groups):
            return loss
        self._dicts.answer(self.param_groups)
        self._view.adopt()
        self._backend.check_before_step()
        self._freeze_again()
        if self.grass.phase == "probe" and not self.grass.arrived:
            # On all ranks, or on none: a gradient that has arrived on one was reduced with those of the others.
            self._scaling.skip()
            self._say_once("unmeasured", about_unmeasured(self.grass.step))
            return loss
        self.grass.finish_gradients()
        if self.grass.phase == "train":
            # In the order in which the backward finished them: at once what stays where it is, the others one by one.
            layers = [layer for layer in reversed(self.grass.active_layers) if layer not in self._updated]
            self._updated.clear()
            resting = self._states.resting(layers)
            joint = [*(self._layer_optimizers[layer] for layer in resting), *self._role_optimizers]
            names = ", ".join(optimizer.name for optimizer in joint)
            if joint:
                self._states.update_all(names, resting, partial(self._update, joint))
            for layer in layers:
                if layer not in resting:
                    self._states.update(layer, partial(self._update, [self._layer_optimizers[layer]]))
            self._states.finish()
            self._backend.sharding.publish(self.grass.trainable_units())
        self._backend.end_step()
        self.grass.advance(self._scaling.take())
        return loss

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Clips the global gradient norm of the trainable parameters, over all shards and ranks.

        With ``update_in_backward`` this raises, and torch's own functions would clip the roles alone: leave it off.

        Returns:
            The norm before clipping, a 0-dim tensor; 0 in the probe, where there is no gradient left to clip.

        Raises:
            GrassError: layers are updated in the backward.
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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, and starts the step anew if a backward has run since the last one.

        Without `step` after its backward a batch is dropped by this: micro-batches, reductions and measurements since
        the last step are forgotten, also in the probe. Call it on every rank.

        Raises:
            GrassError: ``update_in_backward`` has updated layers in a backward since the last step.
        """
        if not self._detached and not self._dicts.made():
            self._check_undone()
            self._scaling.restart()
        super().zero_grad(set_to_none)

    def skip_step(self) -> None:
        """Ends a step that is not to be applied (a NaN, an exception after the backward), in place of `step`.

        Nothing moves, no gradient is left, and the next batch begins the step anew; ``grass.skipped`` counts it. Call
        it on every rank.

        Raises:
            GrassError: ``update_in_backward`` has updated layers in a backward since the last step.
        """
        self._check_attached()
        self._check_undone()
        self._scaling.skip()
        super().zero_grad()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by `GradScaler.step`, before it unscales gradients and steps: see `asking_scaler`."""
        if not self._detached and (scaler := asking_scaler()) is not None:
            self._scaling.begin(scaler)
        return False

    def _check_undone(self) -> None:
        """
        Raises:
            GrassError: the backward has updated layers, so that its batch can no longer be dropped.
        """
        if not self._updated:
            return
        names = [self.grass.layers[layer].name for layer in sorted(self._updated)]
        shown = ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ... {names[-1]}"
        raise GrassError(
            f"This batch can no longer be dropped: grass.offload.update_in_backward has updated {len(names)} layers "
            f"({shown}) in its backward. Call optimizer.step() before zero_grad() or skip_step(), drop batches before "
            "their backward, or set update_in_backward=False."
        )

    def detach(self) -> None:
        """Gives the model back as it was: no hook of the method, ``requires_grad`` as at the start, no gradient.

        The weights stay as they are trained, and `state_dict` can still be read; `step` raises from now on. Call it on
        every rank. Another optimizer may train the model afterwards; a second call does nothing.
        """
        if self._detached:
            return
        self._states.settle()
        self._give_back()
        for param in self._trained:
            param.grad = None
        self._detached = True

    def _freeze_again(self) -> None:
        """Freezes what was unfrozen by someone else since the last switch, and says so once."""
        on = {id(p) for unit in self.grass.trainable_units() for _, p in unit.params}
        woken = [(name, p) for name, p in self._ours if p.requires_grad and id(p) not in on]
        for _, param in woken:
            param.requires_grad_(False)
            param.grad = None
        if woken:
            self._say_once("woken", about_woken([name for name, _ in woken], self.grass.step))

    def _say_once(self, what: str, told: str) -> None:
        if what not in self._said:
            self._said.add(what)
            say(self._backend.ranks, told)

    def _check_attached(self) -> None:
        if self._detached:
            raise GrassError("This GrassOptimizer was detached from its model; make another one to go on training.")

    def train(self) -> None:
        """Has an optimizer class that keeps other weights for training, as those without a schedule do, show them.

        For other classes it does nothing. Call it before the first step, and after `eval`.
        """
        self._set_training(training=True)

    def eval(self) -> None:
        """Has such a class show the weights to evaluate and to save, also of layers that do not train now."""
        self._set_training(training=False)

    def _set_training(self, *, training: bool) -> None:
        self._check_attached()
        if self._has_modes and training is not self._training:
            self._training = training
            self._view.adopt()
            self._states.settle()
            self.grass.note_changed(own.unit for own in self._unit_optimizers if own.has_state)
            set_training_of(self._unit_optimizers, self._backend.sharding, training=training)

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

        It is the state itself, to read and to change: entries and whole states that are replaced, edited in place,
        added or taken away count from the next step on, in every offload mode. To ask for it waits for the copies
        under way. What was taken out of it is valid until the next step, after which it may lie elsewhere: ask again.
        """
        if not hasattr(self, "_dicts"):  # under construction
            return self._first_state
        self._view.adopt()  # before a state is bound to where it has arrived
        self._states.settle()
        return self._view.lend()

    @state.setter
    def state(self, state: dict[nn.Parameter, dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if hasattr(self, "_dicts"):
            self._states.settle()
            self._view.replace(state)
        else:
            self._first_state = state

    def _asked(self) -> None:
        self._dicts.ask(self.param_groups)

    def _borrowed(self, index: int) -> bool:
        return index < len(self._layer_optimizers) and self._states.in_slot(index)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: layers and their parameters are fixed then."""
        if hasattr(self, "grass"):
            raise GrassError("GrassOptimizer cannot take another parameter group; pass all of them as params=.")
        super().add_param_group(param_group)

    def register_state_dict_pre_hook(
        self, hook: Callable[[torch.optim.Optimizer], None], prepend: bool = False
    ) -> RemovableHandle:
        return self._hooks.add("state_dict pre", hook, prepend)

    def register_state_dict_post_hook(
        self, hook: Callable[[torch.optim.Optimizer, StateDict], StateDict | None], prepend: bool = False
    ) -> RemovableHandle:
        return self._hooks.add("state_dict post", hook, prepend)

    def register_load_state_dict_pre_hook(
        self, hook: Callable[[torch.optim.Optimizer, StateDict], StateDict | None], prepend: bool = False
    ) -> RemovableHandle:
        return self._hooks.add("load pre", hook, prepend)

    def register_load_state_dict_post_hook(
        self, hook: Callable[[torch.optim.Optimizer], None], prepend: bool = False
    ) -> RemovableHandle:
        return self._hooks.add("load post", hook, prepend)

    def state_dict(self) -> dict[str, Any]:
        """State of every layer that was ever active, of the method, and the parameter groups.

        ``state[i]`` belongs to the i-th parameter in the order of `param_groups`: what the optimizer class keeps, and
        the fp32 ``master`` of 16-bit weights. Where the ranks divide a parameter or its state (FSDP2, HSDP, DDP with
        `shard_states`), these are DTensors of the parameter's shape, of which each rank holds its part; so the dict is
        to be loaded on the same rank of as many. `torch.distributed.checkpoint` saves and loads it for any number of
        ranks by ``get_optimizer_state_dict`` and ``set_optimizer_state_dict``, which get the states of all layers.
        Save or copy it before the next step: as in any optimizer, its tensors are the state itself, or lie in memory
        that it moves to.
        """
        self._hooks.run("state_dict pre", self)
        self._view.show_own()
        self._view.adopt()  # before a state is bound to where it has arrived
        self._states.settle()
        saved = self._dicts.save(self.param_groups)
        self._dicts.answer(self.param_groups)
        return self._hooks.run("state_dict post", self, saved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`: the same model, groups and `GrassConfig`, of which `offload` may differ.

        A tensor of a state may be a DTensor as `state_dict` gives it, or the whole. Call it on every rank.

        Over the wire: one all-gather of what went wrong and of the position of the method.

        Raises:
            StateError: on every rank, a `ValueError`: one of them cannot go on from it, and the sentence says why.
                Nothing has been changed.
            RanksDisagree: the ranks were given states of different steps or groups. Nothing has been changed.
            GrassError: something that trains was frozen since the layers were drawn.
        """
        self._check_attached()
        given = self._hooks.run("load pre", self, dict(state_dict))
        self._dicts.answer(self.param_groups)

        def check() -> Loaded:
            self._backend.verify()
            return self._dicts.check(given, self.param_groups)

        fix = "load on all ranks what was saved at the same step"
        loaded = together(self._backend.ranks, check, Loaded.must_agree, others=StateError, fix=fix)
        for group, other in zip(self.param_groups, loaded.groups, strict=True):
            group.update({k: v for k, v in other.items() if k not in HOW and k not in ("params", METHOD)})
        for index, states in enumerate(loaded.states):
            self._put_state(index, states)
        self._updated.clear()
        self._training = None
        self.grass.load_state_dict(loaded.method)
        self._hooks.run("load post", self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses to be copied and pickled: its hooks are in the parameters of the model.

        Raises:
            GrassError: always.
        """
        raise GrassError(
            "A GrassOptimizer cannot be copied or pickled, since its hooks are in the parameters of its model; copy "
            "the model, make another GrassOptimizer for the copy, and load this one's state_dict() into it."
        )

    def holdings(self) -> TorchHoldings:
        """What `grass_dist.checkpoint` saves and loads: the model's weights too, for any number of ranks."""
        self._view.adopt()  # before a state is bound to where it has arrived
        self._states.settle()
        return TorchHoldings(
            self._model,
            self._unit_optimizers,
            self._class_name,
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
            self._update([optimizer])
            for _, param in unit.params:
                param.grad = None

        self._view.adopt()
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
        self._view.show(optimizer)

    def _update(self, optimizers: Sequence[UnitOptimizer]) -> None:
        new = [optimizer for optimizer in optimizers if not optimizer.has_state]
        update_together(optimizers, self.param_groups)
        for optimizer in new:
            self._view.show(optimizer)
