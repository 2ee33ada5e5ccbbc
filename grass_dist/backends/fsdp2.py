"""FSDP2 (`fully_shard`), HSDP and both beside tensor parallelism: gradients arrive reduce-scattered, as DTensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from grass_dist.backends.base import HookedBackend, device_of
from grass_dist.backends.mesh import MeshSharding, check_blocks, largest_mesh
from grass_dist.errors import ConfigError, GrassError, UnsupportedModel
from grass_dist.method.interfaces import Arrived, GradientSink
from grass_dist.model.discovery import Unit
from grass_dist.model.experts import give_idle_experts_zeros
from grass_dist.ranks import Ranks


class Fsdp2Backend(HookedBackend):
    """FSDP2 and HSDP, also of a model whose modules `parallelize_module` has divided over another mesh dimension.

    Over the wire, for each micro-batch that synchronises: a reduce-scatter of the trainable layers' gradients, by
    FSDP2 itself, which skips every frozen parameter (under HSDP an all-reduce of the shards follows). The all-gathers
    of the forward stay as they are. In a probe every micro-batch is reduced, also under
    ``set_requires_gradient_sync(False)``: else FSDP2 would hold all layers' unsharded gradients.
    """

    name = "fsdp2"

    @staticmethod
    def knows(model: nn.Module) -> bool:
        return any(isinstance(module, FSDPModule) for module in model.modules())

    def __init__(self, model: nn.Module, accumulation_steps: int) -> None:
        _check_sharded(model)
        mesh = largest_mesh(model.parameters())
        super().__init__(model, accumulation_steps, MeshSharding(Ranks(_group_of(mesh), device_of(model)), mesh))
        self._sharded_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        before: Any = torch.compiler.disable(self._before_forward)
        self._handles += [
            *(cast(nn.Module, m).register_forward_pre_hook(before) for m in self._sharded_modules),
            *(m.register_forward_hook(self._reshard_after_evaluation) for m in _alone(self._sharded_modules, model)),
        ]
        self._begun = False  # whether a module of FSDP2 has run, which has then fixed the dtypes of its reductions
        self._reduced: set[FSDPModule] = set()  # modules that have reduced a gradient
        self._on: set[str] = set()

    def rest_weights(self) -> None:
        problem = "fully_shard divides the weights and says where they are"
        fix = (
            "pass fully_shard offload_policy=CPUOffloadPolicy(), which keeps this rank's part in host memory; in the "
            "training program use parallel: single or ddp, or ZeRO-3 of DeepSpeed with offload_param"
        )
        raise ConfigError("grass.offload.weights", "host", problem, fix)

    def attach(self, layers: Sequence[Unit], roles: Sequence[Unit], sink: GradientSink, arrived: Arrived) -> None:
        super().attach(layers, roles, sink, arrived)
        self._handles += give_idle_experts_zeros(self.model, layers)
        firsts = [unit.params[0] for unit in self._units]
        self._samples = [(_place_of(self.model, name), cast(DTensor, param).device_mesh) for name, param in firsts]
        modules = dict(self.model.named_modules(remove_duplicate=False))
        self._module_of = {unit.name: [_sharded_by(modules, name) for name, _ in unit.params] for unit in self._units}
        self._check_dtypes()
        dtype = reduce_dtype(self.model)
        self._wire_bytes = {
            (u.name, i): _reduced_bytes(cast(DTensor, p), dtype or p.dtype)
            for u in self._units
            for i, (_, p) in enumerate(u.params)
        }

    def _check_dtypes(self) -> None:
        """
        Raises:
            UnsupportedModel: FSDP2 could not reduce some gradients together, which it would say when they first train.
        """
        seen: dict[tuple[FSDPModule, DeviceMesh], tuple[str, torch.dtype]] = {}
        for unit in self._units:
            for module, (name, param) in zip(self._module_of[unit.name], unit.params, strict=True):
                first, dtype = seen.setdefault((module, cast(DTensor, param).device_mesh), (name, param.dtype))
                if dtype != param.dtype:
                    raise UnsupportedModel(
                        f"FSDP2 reduces {first} ({dtype}) and {name} ({param.dtype}) together, so they must be of "
                        "one dtype: call fully_shard on the modules of each dtype, or convert one of them."
                    )

    def set_trainable(self, units: Sequence[Unit], *, probing: bool, measuring: bool) -> None:
        super().set_trainable(units, probing=probing, measuring=measuring)
        if self._begun:
            self._settle_dtypes([unit for unit in units if unit.name not in self._on])
        self._on = {unit.name for unit in units}

    def finish_gradients(self) -> None:
        super().finish_gradients()
        self._reshard()

    def restart(self) -> None:
        super().restart()
        forget_unreduced(self._sharded_modules)

    def _begin_step(self) -> None:
        super()._begin_step()
        self._pending = False

    def _on_gradient(self, unit: Unit, slot: int, param: nn.Parameter) -> None:
        self.bytes_reduced += self._wire_bytes[unit.name, slot]
        self._pending = self._begun = True
        self._reduced.add(self._module_of[unit.name][slot])
        super()._on_gradient(unit, slot, param)

    def _reshard_after_evaluation(self, module: nn.Module, *_: object) -> None:
        """Frees what a forward without a backward (an evaluation) has gathered between a backward and its step.

        FSDP2 leaves the root's parameters gathered after a forward, for the backward. Here none follows. Then
        ``model.parameters()`` are gathered ones, which have no gradient to clip, and after the step the next forward
        takes them as they were before it. Over the wire: the next forward gathers them once more.
        """
        if self._pending and not torch.is_grad_enabled():
            if module is self.model:
                self._reshard()
            else:
                cast(FSDPModule, module).reshard()

    def _reshard(self) -> None:
        for module in self._sharded_modules:
            module.reshard()

    def check_before_step(self) -> None:
        """
        Raises:
            GrassError: a forward that was to have a backward has run since the last one and left parameters gathered,
                so that torch's own clipping would have left these out.
        """
        if self._pending and any(_is_gathered(place, mesh) for place, mesh in self._samples):
            raise GrassError(
                "FSDP2 has parameters gathered between the backward and optimizer.step(), after a forward that needs "
                "gradients, one by a method of register_fsdp_forward_method, or by set_reshard_after_backward(False): "
                "a clipping of model.parameters() leaves those out. Run such a forward under torch.no_grad() and by a "
                "call of the module, or clip by optimizer.clip_grad_norm_()."
            )

    def _before_forward(self, module: nn.Module, *_: object) -> None:
        """Whatever method is called, `register_fsdp_forward_method`'s or a module within, some module of FSDP2 runs."""
        self._begun = True
        if self._probing:  # or FSDP2 would hold gradients of all layers, unsharded
            cast(FSDPModule, module).set_requires_gradient_sync(True, recurse=False)

    def _settle_dtypes(self, units: Iterable[Unit]) -> None:
        """Lets the modules of ``units``, which train from now on, take their reduce dtype from their parameters.

        FSDP2 takes it when the model first runs, from the parameters that are trainable then. A module that is frozen
        then has none, and would reduce in the dtype of its gradients, not in `MixedPrecisionPolicy.reduce_dtype`.
        `FSDPModule.unshard` takes it again. Over the wire: one all-gather of a module, before it first trains.
        """
        modules = {module: None for unit in units for module in self._module_of[unit.name]}
        for module in modules:
            if module not in self._reduced:
                module.unshard()
                module.reshard()


def forget_unreduced(modules: Sequence[FSDPModule]) -> None:
    """Drops the gradients of micro-batches that FSDP2 has not reduced, or not over all replicas, since it was told to
    wait (``set_requires_gradient_sync(False)``, ``set_requires_all_reduce(False)``).

    Private: FSDP2 keeps them in its groups of parameters, and has no public way to drop them. Checked on torch
    2.13; `tests/test_private_interfaces.py` fails when it changes.
    """
    for module in modules:
        state = module._get_fsdp_state()
        several = getattr(state, "_fsdp_param_groups", None)  # where a module may have several groups
        for group in [state._fsdp_param_group] if several is None else several:
            if group is None:
                continue
            group._partial_reduce_output = None
            for param in group.fsdp_params:
                param.unsharded_accumulated_grad = None
                if hasattr(param, "_unsharded_param"):  # after the first all-gather
                    param._unsharded_param.grad = None


def _check_sharded(model: nn.Module) -> None:
    """
    Raises:
        UnsupportedModel: it is not sharded as a whole, or in parts that are no blocks, or its weights are offloaded.
    """
    _refuse_plain(model)
    check_blocks(model.named_parameters())
    meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
    check_offloaded_weights(meshes, {p.device for p in model.parameters()}, torch.__version__)


def _group_of(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The ranks of ``mesh``.

    Raises:
        UnsupportedModel: it is neither of all ranks nor of one dimension.
    """
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    if mesh.ndim == 1:
        return mesh.get_group()
    raise UnsupportedModel(
        f"The parameters' mesh {mesh} is of {mesh.ndim} dimensions and smaller than the world of "
        f"{dist.get_world_size()} ranks; use a mesh over all ranks, or of one dimension."
    )


def _refuse_plain(model: nn.Module) -> None:
    """
    Raises:
        UnsupportedModel: parameters that are to train are not sharded, or the model as a whole is not.
    """
    plain = [(name, p) for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    if not plain:
        return
    ignored = {id(p) for _, p in plain}
    wanted = {id(p) for p in model.parameters()} - ignored
    whole = any(isinstance(m, FSDPModule) and wanted <= {id(p) for p in m.parameters()} for m in model.modules())
    if not whole:
        raise UnsupportedModel(
            f"{len(plain)} parameters are not sharded ({plain[0][0]}, ...) while others are; "
            "call fully_shard(model) on the whole model after its layers, before GrassOptimizer."
        )
    if trained := [name for name, p in plain if p.requires_grad]:
        raise UnsupportedModel(
            f"{len(trained)} parameters are not sharded and have requires_grad ({trained[0]}, ...), as fully_shard "
            "leaves those of its ignored_params, whose gradients nothing averages over the ranks: set their "
            "requires_grad to False, or leave them out of ignored_params."
        )


def _sharded_by(modules: Mapping[str, nn.Module], name: str) -> FSDPModule:
    """The innermost module of FSDP2 around a parameter: the one that gathers and reduces it."""
    owner = name.rpartition(".")[0]
    while not isinstance(modules[owner], FSDPModule):
        owner = owner.rpartition(".")[0]
    return cast(FSDPModule, modules[owner])


def _place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a parameter, and its name there."""
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def _is_gathered(place: tuple[nn.Module, str], mesh: DeviceMesh) -> bool:
    """Whether the parameter at ``place``, sharded on ``mesh``, is the gathered one, which is on no mesh or fewer ranks.

    Args:
        place: a module and the name of its parameter.
    """
    now = getattr(*place)
    return not isinstance(now, DTensor) or now.device_mesh != mesh


FIRST_WITH_FINISHED_COPIES = (2, 13)
"""Release of torch from which a hook on a sharded parameter sees its gradient in host memory when the copy has ended
(pull request 180666)."""


def check_offloaded_weights(meshes: Iterable[DeviceMesh], devices: Iterable[torch.device], release: Any) -> None:
    """
    Args:
        devices: of the shards.
        release: of torch.

    Raises:
        UnsupportedModel: shards are in host memory beside a GPU (`CPUOffloadPolicy`), and hooks would read gradients
            that are still on their way there.
    """
    offloaded = any(m.device_type != "cpu" for m in meshes) and any(device.type == "cpu" for device in devices)
    if offloaded and release < FIRST_WITH_FINISHED_COPIES:
        first = ".".join(map(str, FIRST_WITH_FINISHED_COPIES))
        raise UnsupportedModel(
            f"The model is sharded with offload_policy=CPUOffloadPolicy(), and torch {release} would show grass_dist "
            f"gradients before they have arrived in host memory; install torch {first} or later, or call fully_shard "
            "without offload_policy."
        )


def reduce_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype that gradients of a sharded model are reduced in, None if it is that of the parameters.

    Private: reads ``_get_fsdp_state()._mp_policy``, since FSDP2 has no public way to ask. Checked on torch 2.9 and
    2.13; only the byte count shown to users depends on it. `tests/test_private_interfaces.py` fails when it changes.
    """
    module = next(m for m in model.modules() if isinstance(m, FSDPModule))
    policy = module._get_fsdp_state()._mp_policy
    return policy.reduce_dtype or policy.param_dtype


def _alone(modules: Sequence[FSDPModule], model: nn.Module) -> list[nn.Module]:
    """``model``, and those of its sharded modules that are gathered and let go by themselves.

    A group, ``fully_shard([norm, head])``, must not be let go of when one of its modules has run: before torch has
    hooks for each of them it is gathered before the first one only.

    Private: compares ``_get_fsdp_state()``, since FSDP2 has no public way to ask. Checked on torch 2.9 and 2.13;
    `tests/test_private_interfaces.py` fails when it changes.
    """
    sharing = Counter(id(module._get_fsdp_state()) for module in modules)
    alone = [cast(nn.Module, m) for m in modules if sharing[id(m._get_fsdp_state())] == 1 and m is not model]
    return [*alone, model]


def _reduced_bytes(param: DTensor, dtype: torch.dtype) -> int:
    """Bytes that a rank puts into FSDP2's reductions of one gradient; it pads dimension 0 to the shard count.

    Its mesh dimensions come first: those of replicas, then the one that it shards. Those of tensor parallelism follow,
    and their ranks reduce a part of the gradient each.
    """
    replicas, shards, shape = 1, 1, list(param.shape)
    placed = list(zip(param.device_mesh.shape, param.placements, strict=True))
    while placed and isinstance(placed[0][1], Replicate):
        replicas *= placed.pop(0)[0]
    if placed:
        shards = placed.pop(0)[0]
    for size, of_tensors in placed:
        if isinstance(of_tensors, Shard):
            shape[of_tensors.dim] = -(-shape[of_tensors.dim] // size)
    rows = shape[0] if shape else 1
    padded = -(-rows // shards) * shards * math.prod(shape[1:])
    scattered = padded if shards > 1 else 0
    reduced = padded // shards if replicas > 1 else 0
    return (scattered + reduced) * dtype.itemsize
