"""FSDP2 (`fully_shard`) and HSDP: gradients arrive in the hooks reduce-scattered, as DTensor shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from grass_dist.backends.base import HookedBackend, device_of
from grass_dist.errors import GrassError, UnsupportedModel
from grass_dist.method.interfaces import Arrived, GradientSink
from grass_dist.model.discovery import Unit
from grass_dist.model.sharding import Sharding
from grass_dist.ranks import Ranks


class Fsdp2Sharding(Sharding):
    """Parameters are DTensors: a rank holds rows of each, and the states of these."""

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def counts(self, param: nn.Parameter) -> bool:
        """A shard counts on the ranks at coordinate 0 of every mesh dimension that replicates it."""
        tensor = cast(DTensor, param)
        where = tensor.device_mesh.get_coordinate() or []
        return all(c == 0 for c, placed in zip(where, tensor.placements, strict=True) if isinstance(placed, Replicate))

    def start_of(self, param: nn.Parameter) -> int:
        tensor = cast(DTensor, param)
        start, rows = 0, tensor.shape[0]
        where = tensor.device_mesh.get_coordinate() or []
        for coordinate, size, placed in zip(where, tensor.device_mesh.shape, tensor.placements, strict=True):
            if isinstance(placed, Replicate):
                continue
            if placed != Shard(0):
                raise UnsupportedModel(
                    "A checkpoint holds runs of consecutive entries, and a parameter of shape "
                    f"{tuple(tensor.shape)} is placed as {placed}: call fully_shard without shard_placement_fn."
                )
            chunk = -(-rows // size)
            skipped = min(coordinate * chunk, rows)
            start, rows = start + skipped, max(0, min(chunk, rows - skipped))
        return start * (tensor.numel() // max(tensor.shape[0], 1))

    def replicates(self, param: nn.Parameter) -> bool:
        return False


class Fsdp2Backend(HookedBackend):
    """FSDP2 and HSDP.

    Over the wire, for each micro-batch that synchronises: a reduce-scatter of the trainable layers' gradients, by
    FSDP2 itself, which skips every frozen parameter (under HSDP an all-reduce of the shards follows). The all-gathers
    of the forward stay as they are. In a probe every micro-batch is reduced, also under
    ``set_requires_gradient_sync(False)``: else FSDP2 would hold all layers' unsharded gradients.
    """

    name = "fsdp2"

    @staticmethod
    def knows(model: nn.Module) -> bool:
        return any(isinstance(p, DTensor) for p in model.parameters())

    def __init__(self, model: nn.Module, accumulation_steps: int) -> None:
        super().__init__(model, accumulation_steps, Fsdp2Sharding(Ranks(_group_of(model), device_of(model))))
        self._first_forward = model.register_forward_pre_hook(self._settle_dtypes)
        self._sharded_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._handles += [
            model.register_forward_pre_hook(self._reduce_each_micro_batch_in_probe),
            self._first_forward,
            *(m.register_forward_hook(self._reshard_after_evaluation) for m in _alone(self._sharded_modules, model)),
        ]

    def attach(self, layers: Sequence[Unit], roles: Sequence[Unit], sink: GradientSink, arrived: Arrived) -> None:
        super().attach(layers, roles, sink, arrived)
        self._samples = [_place_of(self.model, unit.params[0][0]) for unit in self._units]
        dtype = reduce_dtype(self.model)
        self._wire_bytes = {
            (u.name, i): _reduced_bytes(cast(DTensor, p), dtype or p.dtype)
            for u in self._units
            for i, (_, p) in enumerate(u.params)
        }

    def finish_gradients(self) -> None:
        super().finish_gradients()
        self._reshard()

    def _begin_step(self) -> None:
        super()._begin_step()
        self._pending = False

    def _on_gradient(self, unit: Unit, slot: int, param: nn.Parameter) -> None:
        self.bytes_reduced += self._wire_bytes[unit.name, slot]
        self._pending = True
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
        if self._pending and not all(isinstance(getattr(owner, name), DTensor) for owner, name in self._samples):
            raise GrassError(
                "FSDP2 has parameters gathered between the backward and optimizer.step(), after a forward that needs "
                "gradients, or by set_reshard_after_backward(False): a clipping of model.parameters() leaves those "
                "out. Run such a forward under torch.no_grad(), or clip by optimizer.clip_grad_norm_()."
            )

    def _reduce_each_micro_batch_in_probe(self, *_: object) -> None:
        if self._probing and isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(True)

    def _settle_dtypes(self, *_: object) -> None:
        """Lets every module of FSDP2 take its reduce dtype from its parameters as if all of them trained.

        (They are the sharded ones, while parameters() of a module that runs gives the unsharded ones.)

        FSDP2 takes it at the first forward from the parameters that are trainable then; a module that is frozen
        then would reduce in the weights' dtype, not in `MixedPrecisionPolicy.reduce_dtype`, for ever after.
        `FSDPModule.unshard` takes it again. FSDP2's own pre-forward hook has run when this one does. Over the wire:
        one all-gather of each layer, once.
        """
        self._first_forward.remove()
        params = [p for unit in self._units for _, p in unit.params]
        trainable = [p.requires_grad for p in params]
        for param in params:
            param.requires_grad_(True)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                if module is not self.model:  # the root has just been gathered for this forward and stays so
                    module.reshard()
        for param, flag in zip(params, trainable, strict=True):
            param.requires_grad_(flag)


def _group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that train ``model`` together.

    Raises:
        UnsupportedModel: it is not sharded as a whole, or on a mesh that is neither of all ranks nor of one dimension.
    """
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise UnsupportedModel(
            "The parameters are DTensors but no module is sharded by fully_shard; "
            "call fully_shard on the layers and on the model before GrassOptimizer."
        )
    plain = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    if plain:
        raise UnsupportedModel(
            f"{len(plain)} parameters are not sharded ({plain[0]}, ...) while others are; "
            "call fully_shard(model) on the whole model after its layers, before GrassOptimizer."
        )
    meshes = {cast(DTensor, p).device_mesh for p in model.parameters()}
    check_offloaded_weights(meshes, {p.device for p in model.parameters()}, torch.__version__)
    mesh = max(meshes, key=lambda m: m.size())
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    if mesh.ndim == 1:
        return mesh.get_group()
    raise UnsupportedModel(
        f"The parameters' mesh {mesh} is of {mesh.ndim} dimensions and smaller than the world of "
        f"{dist.get_world_size()} ranks; use a mesh over all ranks, or of one dimension."
    )


def _place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a parameter, and its name there."""
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


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
    """Bytes that a rank puts into the reductions of one gradient; FSDP2 pads dimension 0 to the shard count."""
    shards, replicas = 1, 1
    for size, placed in zip(param.device_mesh.shape, param.placements, strict=True):
        if isinstance(placed, Replicate):
            replicas *= size
        else:
            shards *= size
    rows = param.shape[0] if param.ndim else 1
    padded = -(-rows // shards) * shards * (param.numel() // max(rows, 1))
    scattered = padded if shards > 1 else 0
    reduced = padded // shards if replicas > 1 else 0
    return (scattered + reduced) * dtype.itemsize
