"""Refuses models and optimizers that cannot work, at start-up; ds_config.py refuses options."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grass_dist.backends.zero.ds_config import ZeroSetup
from grass_dist.backends.zero.jit import on_cpu
from grass_dist.errors import ConfigError, UnsupportedModel
from grass_dist.ranks import Ranks, world
from grass_dist.states.refused import check_class
from grass_dist.states.update_rule import ELEMENTWISE

_FIXES = {
    "OnebitAdam": "use AdamW",
    "ZeroOneAdam": "use AdamW",
    "OnebitLamb": "use AdamW",
    "FusedLamb": "use AdamW, which treats each entry by itself",
    **dict.fromkeys(
        ["Muon", "MuonAdamW", "MuonWithAuxAdam"],
        "use AdamW, or GrassOptimizer with grass_dist.MuonAdamW under FSDP2 or DDP, where matrices are whole",
    ),
    "Adafactor": "use AdamW: its factors and its scale are of whole matrices, and ZeRO gives it flat partitions",
}
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}
_DEEPSPEED_ELEMENTWISE = {"FusedAdam", "FusedLion"}
_DEEPSPEED_CPU = {"DeepSpeedCPUAdam", "DeepSpeedCPULion", "DeepSpeedCPUAdagrad"}


def check_model(model: nn.Module) -> None:
    """Refuses models that cannot be sharded layer by layer.

    Raises:
        UnsupportedModel: a pipeline or mixture-of-experts model of DeepSpeed's, or one that is wrapped already.
    """
    kinds = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if "PipelineModule" in kinds:
        raise UnsupportedModel(
            "The model is a PipelineModule, whose stages hold different layers on different ranks; grass_dist does not "
            "support pipeline parallelism: pass the plain model and use ZeRO-3."
        )
    if kinds & {"MOELayer", "AutoEPMoELayer"} or any(
        getattr(p, "allreduce", True) is False for p in model.parameters()
    ):
        raise UnsupportedModel(
            "The model has DeepSpeed MoE layers with expert parallelism, whose experts differ between ranks; "
            "grass_dist does not support it: use a model with plain (replicated) experts and ZeRO-3."
        )
    if wrapped := kinds & _WRAPPERS:
        raise UnsupportedModel(
            f"The model is wrapped in {sorted(wrapped)[0]} already; pass initialize the plain model, "
            "which DeepSpeed shards itself."
        )


def check_axes(mpu: Any, mesh_param: Any) -> None:
    """Refuses ranks that are not all copies of one model, or parts of a sequence (Ulysses).

    Args:
        mpu: as `deepspeed.initialize` takes it.
        mesh_param: the same.

    Raises:
        ConfigError: ranks would hold different parts of layers, or not reduce gradients together.
    """
    if mesh_param is not None:
        problem = "ZeRO then reduces gradients over its first dimension alone, and the ranks of a sequence drift apart"
        fix = "pass the mpu of UlyssesSPAttentionHF.register_with_transformers in its place"
        raise ConfigError("mesh_param", mesh_param, problem, fix)
    if mpu is None or hasattr(mpu, "initialize_sequence_parallel"):  # as DeepSpeed tells Ulysses' one from others
        return
    names = "get_tensor_model_parallel_world_size", "get_model_parallel_world_size"  # Megatron has either
    if (parts := max(getattr(mpu, name, lambda: 1)() for name in names)) > 1:
        problem = f"its {parts} model-parallel ranks hold parts of each layer, and would draw different layers"
        fix = "use GrassOptimizer with parallelize_module and fully_shard, or ZeRO-3 alone"
        raise ConfigError("mpu", type(mpu).__name__, problem, fix)


def check_group(ranks: Ranks) -> None:
    """
    Args:
        ranks: over which DeepSpeed reduces gradients.

    Raises:
        UnsupportedModel: they are not all ranks, so others hold other parts of the model (`deepspeed.tp_model_init`).
    """
    if ranks.world_size != (everyone := world().world_size):
        raise UnsupportedModel(
            f"DeepSpeed reduces gradients over {ranks.world_size} of {everyone} ranks, as under tensor parallelism "
            "(deepspeed.tp_model_init), and each such group would draw layers by its own part of them: pass a model "
            "that is whole on every rank, and use ZeRO-3 if it is too large."
        )


def check_optimizer(optimizer: Any, setup: ZeroSetup) -> None:
    """Refuses optimizers that GRASS cannot train with.

    Raises:
        ConfigError: there is none, or it cannot be run on flat partitions of single layers.
    """
    if optimizer is None:
        if "optimizer" not in setup.ds_config:
            raise ConfigError(
                "optimizer",
                None,
                "GRASS needs one to train with",
                "pass optimizer= or add the section to the ds_config",
            )
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        return  # a callable: it is checked when it has made one
    name = type(optimizer).__name__
    check_class(type(optimizer))
    if name in _FIXES:
        raise ConfigError("optimizer", name, "GRASS cannot train single layers with it", _FIXES[name])
    if name in _DEEPSPEED_CPU and not on_cpu():
        raise ConfigError(
            "optimizer",
            name,
            "it updates on the host, and GRASS brings the active layers' states to the device",
            "use torch.optim.AdamW or FusedAdam; the states of inactive layers are in host memory in any case",
        )
    known = type(optimizer) in ELEMENTWISE or name in _DEEPSPEED_ELEMENTWISE | _DEEPSPEED_CPU
    if not known and not setup.any_optimizer:
        raise ConfigError(
            "optimizer",
            name,
            "it is not known to treat each entry by itself, and ZeRO gives it flat partitions",
            'use torch.optim.AdamW, or set "zero_allow_untested_optimizer": true if you know that it does',
        )
    if optimizer.state and not is_new_adagrad(optimizer):
        raise ConfigError(
            "optimizer",
            name,
            f"it has states of {len(optimizer.state)} parameters already",
            "pass one that has not stepped, of a class that makes its state at the first step",
        )


def is_new_adagrad(optimizer: torch.optim.Optimizer) -> bool:
    """Says whether an optimizer has the states that Adagrad's constructor makes of all parameters, and no others."""
    steps = [state.get("step") for state in optimizer.state.values()]
    return type(optimizer) is torch.optim.Adagrad and not any(steps)
