"""Describes what is planned: the machine, the batch and the sharding, and the methods that are compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import nn

from grass_dist.config import ROLES, GrassConfig, OffloadConfig, Role
from grass_dist.errors import ConfigError
from grass_dist.model.discovery import Unit
from grass_dist.model.sharding import Sharding
from grass_dist.plan.shape import ModelShape, check_whole, elements_in
from grass_dist.ranks import Ranks
from grass_dist.states.unit_optimizer import UnitOptimizer

PlannedBackend = Literal["single", "fsdp2", "hsdp", "ddp", "zero1", "zero2", "zero3"]
Offload = Literal["interval", "stream", "none"]
BACKENDS: tuple[PlannedBackend, ...] = get_args(PlannedBackend)
Weights = Literal["resident", "host"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
Logits = Literal["whole", "chunked"]
LOGITS: tuple[Logits, ...] = get_args(Logits)
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
WEIGHT_BYTES = {"bfloat16": 2, "float32": 4}
LARGEST = {"gpus": 2**20, "accumulation": 2**16}
"""Largest values that are accepted: the computation goes through all of them."""
LORA_RANK = 16

_SETTINGS: dict[str, Any] = {"lr": 1e-5, "foreach": True}
GROUP: dict[str, Any] = {"params": [], **torch.optim.AdamW([nn.Parameter(torch.zeros(1))], **_SETTINGS).defaults}
"""A parameter group of the AdamW that every plan counts with, with all defaults filled in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One way to run a fine-tune.

    Raises:
        ConfigError: a value cannot be used.
    """

    gpus: int
    gpus_per_host: int
    gpu_bytes: float
    """Memory of a GPU."""
    seq_len: int
    micro_batch: int = 1
    accumulation: int = 1
    """Micro-batches of a step."""
    backend: PlannedBackend = "fsdp2"
    replicate: int = 1
    """Replicas of the sharded model, for hsdp."""
    offload: Offload = "interval"
    weights: Weights = "resident"
    """Where the weights of layers rest that GRASS does not train now. `host` under zero3 is DeepSpeed's
    ``offload_param``, which takes all weights of every method there."""
    dtype: str = "bfloat16"
    checkpointing: bool = False
    """Activation checkpointing of each layer."""
    logits: Logits = "whole"
    """Whether the logits of all tokens are there at once."""
    roles: tuple[Role, ...] = ROLES
    """Roles that GRASS trains at every step. Full fine-tuning and LISA train all of them."""
    sampling_interval: int = 50
    state_bytes: int | None = None
    """Bytes of state of a trained element. None counts what `UnitOptimizer` keeps: two fp32 moments, and an fp32 master
    of 16-bit weights."""

    def __post_init__(self) -> None:
        for option in ("gpus", "gpus_per_host", "seq_len", "micro_batch", "accumulation", "sampling_interval"):
            check_whole(f"--{option.replace('_', '-')}", getattr(self, option), LARGEST.get(option) or 2**31)
        allowed = {
            "backend": BACKENDS,
            "offload": OFFLOADS,
            "weights": WEIGHTS,
            "logits": LOGITS,
            "dtype": tuple(WEIGHT_BYTES),
        }
        for option, known in allowed.items():
            if (value := getattr(self, option)) not in known:
                raise ConfigError(f"--{option}", value, "it is not known", f"use one of {', '.join(known)}")
        if not 1e6 <= self.gpu_bytes <= 1e15:
            raise ConfigError("--gpu-memory", self.gpu_bytes, "no GPU has so many bytes", "write e.g. 24GB")
        if self.seq_len * self.micro_batch > 2**31:
            raise ConfigError("--seq-len", self.seq_len, "with --micro-batch it makes too many tokens", "use fewer")
        if self.backend == "single" and self.gpus > 1:
            raise ConfigError("--backend", "single", f"it trains on one GPU, not {self.gpus}", "use fsdp2 or ddp")
        if self.weights == "host" and self.backend not in ("single", "ddp", "zero3"):
            fix = "use single, ddp or zero3"
            raise ConfigError("--weights", "host", f"it is not planned for {self.backend}", fix)
        if self.weights == "host" and self.offload == "none":
            problem = "states, which take more than weights, would stay on the GPU (--offload none)"
            raise ConfigError("--weights", "host", problem, "use --offload interval or stream")
        if self.backend == "hsdp" and (self.replicate < 2 or self.gpus % self.replicate):
            fix = "use a divisor of --gpus above 1 (the number of hosts, say), or --backend fsdp2"
            raise ConfigError("--replicate", self.replicate, f"hsdp on {self.gpus} GPUs cannot have so many", fix)

    @property
    def weight_bytes(self) -> int:
        return WEIGHT_BYTES[self.dtype]

    @property
    def reduce_bytes(self) -> int:
        """Bytes of a gradient's element while it is reduced: fp32 under fsdp2 and hsdp, else as wide as the weights."""
        return 4 if self.backend in ("fsdp2", "hsdp") else self.weight_bytes

    @property
    def bytes_of_state(self) -> int:
        """Bytes of state of a trained element."""
        if self.state_bytes is not None:
            return self.state_bytes
        # DeepSpeed's ZeRO-1 and 2 keep a master of fp32 weights, too.
        return state_bytes("bfloat16" if self.backend in ("zero1", "zero2") else self.dtype)

    @property
    def update_bytes(self) -> int:
        """Bytes of an entry under its update: a gradient as wide as its master, and what AdamW computes on the way."""
        if self.state_bytes is not None:
            return self.state_bytes // 2  # no master, and moments of half of it each
        return 8 if self.weight_bytes < 4 else 4

    @property
    def shards(self) -> int:
        """Number of ranks that the weights are divided among."""
        return {"fsdp2": self.gpus, "zero3": self.gpus, "hsdp": self.gpus // self.replicate}.get(self.backend, 1)

    @property
    def state_shards(self) -> int:
        """Number of ranks that the optimizer states are divided among."""
        return self.shards if self.backend in ("fsdp2", "hsdp") else self.gpus

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on a rank."""
        return self.seq_len * self.micro_batch

    @property
    def ranks_per_host(self) -> int:
        return min(self.gpus, self.gpus_per_host)

    @property
    def num_hosts(self) -> int:
        return -(-self.gpus // self.gpus_per_host)

    @property
    def named_checkpointing(self) -> str:
        return f"activation checkpointing {'on' if self.checkpointing else 'off'}"

    def rests(self, method: Method) -> bool:
        """Whether weights of layers rest in host memory while ``method`` trains."""
        return self.weights == "host" and (self.backend == "zero3" or method.name == "grass")

    def on(self, gpus: int) -> PlannedRun:
        """Returns the same run on another number of GPUs, where hsdp shards within each host."""
        hosts = -(-gpus // self.gpus_per_host)
        return replace(self, gpus=gpus, replicate=max(2, hosts) if self.backend == "hsdp" else 1)


@dataclass(frozen=True, slots=True)
class Method:
    """A method of training, and what it trains."""

    name: Literal["full", "lora", "lisa", "grass"]
    active_layers: int
    """Layers that train at a time (γ)."""
    roles: tuple[Role, ...] = ROLES

    @property
    def label(self) -> str:
        names = {"full": "full fine-tuning", "lora": f"LoRA r={LORA_RANK}", "lisa": "LISA", "grass": "GRASS"}
        return names[self.name] + (f" γ={self.active_layers}" if self.name in ("lisa", "grass") else "")


def methods_of(shape: ModelShape, run: PlannedRun) -> list[Method]:
    """Lists full fine-tuning, LoRA, LISA with 2 layers as published, and GRASS with γ = 1, 2, 4, ... and all layers."""
    most = shape.num_layers
    gammas = sorted({*(2**n for n in range(most.bit_length()) if 2**n <= most), most})
    lisa = min(2, most)
    return [
        Method("full", most),
        Method("lora", most, ()),
        Method("lisa", lisa),
        *(Method("grass", gamma, run.roles) for gamma in gammas),
    ]


def grass_config(run: PlannedRun, method: Method) -> GrassConfig:
    """Returns the configuration by which ``method`` trains in ``run``."""
    weights: Any = {"weights": "host"} if run.weights == "host" and run.backend != "zero3" else {}
    return GrassConfig(
        active_layers=method.active_layers,
        sampling_interval=run.sampling_interval,
        update_interval=run.sampling_interval,
        always_active=method.roles,
        offload=OffloadConfig(mode=run.offload, **weights),
    )


def trained_roles(shape: ModelShape, method: Method) -> dict[str, int]:
    """Elements of each role that trains. Tied embeddings train if either of their roles does."""
    wanted = set(method.roles)
    if shape.tied and "lm_head" in wanted:
        wanted.add("embeddings")
    return {name: elements_in(shapes) for name, shapes in shape.roles.items() if name in wanted}


def head_trains(shape: ModelShape, method: Method) -> bool:
    return ("embeddings" if shape.tied else "lm_head") in trained_roles(shape, method)


def lora_elements(shape: ModelShape) -> int:
    """Elements of the adapters of one layer: rank times (rows + columns) of each of its matrices."""
    return sum(LORA_RANK * sum(s) for s in max(shape.layers, key=elements_in) if len(s) == 2)


def traversed(shape: ModelShape, method: Method) -> float:
    """Mean share, over all draws, of the layers that a gradient passes through (f_above in docs/plan.md, Time)."""
    total, gamma = shape.num_layers, method.active_layers
    if method.name in ("full", "lora") or "embeddings" in trained_roles(shape, method):
        return 1.0
    return 1 - (total - gamma) / (gamma + 1) / total


def optimizer_of(unit: Unit, sharding: Sharding) -> UnitOptimizer:
    """Makes the optimizer that a run has for ``unit``."""
    return UnitOptimizer(unit, [0] * len(unit.params), torch.optim.AdamW, _SETTINGS, sharding)


@cache
def state_bytes(dtype: str) -> int:
    """Bytes that `UnitOptimizer` keeps for each element of weights of this dtype."""
    model = nn.Linear(2, 3, bias=False, dtype=getattr(torch, dtype))
    unit = Unit("linear", None, tuple(model.named_parameters()))
    fields = optimizer_of(unit, Sharding(Ranks())).fields([GROUP])
    return sum(field.nbytes for field in fields) // model.weight.numel()
