"""The methods: each a model and an optimizer that one loop drives. What is published is used as it is published."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import grass_dist
from benchmarks.peers.regimes import Regime

ADAMW: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
ACTIVE = 4
"""Layers that train at a time."""


@dataclass
class Method:
    """A model in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    clip: Callable[[float], object]
    states: Callable[[], int]
    """Bytes of optimizer states on the device."""
    host: Callable[[], int] = lambda: 0
    """Bytes of states in host memory."""
    extra: Callable[[], int] = lambda: 0
    """Bytes of copies of weights that it keeps beside them."""
    measured: Callable[[], int] = lambda: 0
    """Entries of gradients that ranks would have reduced in this step and that are gone again, as in a probe."""
    notes: dict[str, Any] = field(default_factory=dict)


class Maker(Protocol):
    def __call__(self, model: nn.Module, lr: float, regime: Regime, seed: int) -> Method:
        """
        Args:
            model: as it was loaded; under more than one rank the method wraps it in DistributedDataParallel.
            seed: of what the method draws.
        """
        ...


def wrap(model: nn.Module, *, freezes: bool = False) -> nn.Module:
    """
    Args:
        freezes: the method freezes weights by itself, for whose gradients DDP would wait.
    """
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, find_unused_parameters=freezes)


def nbytes(tensors: Iterable[Any]) -> int:
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """All tensors of its states, those of objects that it keeps there (GaLore's projections) included."""
    found = []
    for state in optimizer.state.values():
        for value in state.values():
            found.append(value)
            if not isinstance(value, torch.Tensor) and hasattr(value, "__dict__"):
                found += vars(value).values()
    return nbytes(found)


def plain(model: nn.Module, lr: float, regime: Regime, seed: int) -> Method:
    model = wrap(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, **ADAMW)
    return Method(
        model,
        optimizer,
        lambda norm: nn.utils.clip_grad_norm_(trained, norm),
        lambda: state_bytes(optimizer),
    )


def lora(rank: int, *, dora: bool = False) -> Maker:
    def make(model: nn.Module, lr: float, regime: Regime, seed: int) -> Method:
        import peft

        settings = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", use_dora=dora
        )
        adapted = peft.get_peft_model(model, settings)  # type: ignore[arg-type]
        return plain(adapted, lr, regime, seed)

    return make


def grass(sampler: str, **settings: Any) -> Maker:
    def make(model: nn.Module, lr: float, regime: Regime, seed: int) -> Method:
        model = wrap(model)
        every = {"sampling_interval": regime.interval, "update_interval": regime.interval}
        own = {"active_layers": ACTIVE, **every, "sampler": sampler, "seed": seed}
        if sampler.startswith("grass"):
            own["probe_steps"] = regime.probe
        config = grass_dist.GrassConfig(**(own | settings))
        optimizer = grass_dist.GrassOptimizer(model, torch.optim.AdamW, {"lr": lr, **ADAMW}, config=config)
        return Method(
            model,
            optimizer,
            optimizer.clip_grad_norm_,
            lambda: optimizer.state_bytes,
            lambda: optimizer.host_state_bytes,
            measured=lambda: (
                sum(unit.numel for unit in optimizer.grass.layers) if optimizer.grass.phase == "probe" else 0
            ),
            notes=config.model_dump(mode="json"),
        )

    return make


def beside(sampler: str, rank: int, ratio: float, **settings: Any) -> Maker:
    """Layers that are drawn and adapters on all of them, without embeddings and head.

    Args:
        ratio: learning rate of the adapters over that of the layers.
    """

    def make(model: nn.Module, lr: float, regime: Regime, seed: int) -> Method:
        adapters = {"rank": rank, "alpha": 2.0 * rank, "learning_rate": ratio * lr}
        return grass(sampler, always_active=(), adapters=adapters, **settings)(model, lr, regime, seed)

    return make


def badam(model: nn.Module, lr: float, regime: Regime, seed: int) -> Method:
    from badam import BlockOptimizer

    blocks = sum(1 for _ in model.get_submodule("model.layers").children())
    model = wrap(model, freezes=True)
    inner = torch.optim.AdamW(model.parameters(), lr=lr, **ADAMW)
    every = max(1, regime.steps // blocks)  # so that nearly every block trains once, as it does in many epochs
    optimizer = BlockOptimizer(
        base_optimizer=inner, named_parameters_list=list(model.named_parameters()), switch_block_every=every, verbose=0
    )
    return Method(
        model,
        optimizer,
        lambda norm: nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], norm),
        lambda: state_bytes(inner),
        extra=lambda: nbytes(optimizer.param_idx2hp.values()),
        notes={"switch_block_every": every, "switch_mode": "descending"},
    )


def galore(model: nn.Module, lr: float, regime: Regime, seed: int) -> Method:
    from galore_torch import GaLoreAdamW

    settings = {"rank": 128, "update_proj_gap": 20, "scale": 0.25, "proj_type": "std"}
    projected = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name)
    ]
    model = wrap(model)
    ids = {id(p) for p in projected}
    groups: list[Mapping[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in ids]},
        {"params": projected, **settings},
    ]
    optimizer = GaLoreAdamW(groups, lr=lr, **ADAMW)
    return Method(
        model,
        optimizer,
        lambda norm: nn.utils.clip_grad_norm_(model.parameters(), norm),
        lambda: state_bytes(optimizer),
        notes=settings,
    )


THIRD = {"effective_layers": 10}
"""Draws as uneven as uniform ones among a third of the 30 layers."""
METHODS: dict[str, tuple[Maker, tuple[float, float, float]]] = {
    # and the three learning rates that are tried, a factor of some three apart
    "full": (plain, (3e-5, 1e-4, 3e-4)),
    "lisa": (grass("uniform"), (1e-4, 3e-4, 1e-3)),
    "grass": (grass("grass"), (1e-4, 3e-4, 1e-3)),
    "grass-layers": (grass("grass", always_active=()), (3e-4, 1e-3, 3e-3)),
    "grass-static": (grass("grass-static"), (1e-4, 3e-4, 1e-3)),
    "grass-third": (grass("grass", temperature=THIRD), (1e-4, 3e-4, 1e-3)),
    "cyclic": (grass("cyclic"), (1e-4, 3e-4, 1e-3)),
    "random-cyclic": (grass("random-cyclic"), (1e-4, 3e-4, 1e-3)),
    "grass-adapters16": (beside("grass", 16, 10 / 3, temperature=THIRD), (1e-4, 3e-4, 1e-3)),
    "grass-adapters64": (beside("grass", 64, 5 / 3, temperature=THIRD), (1e-4, 3e-4, 1e-3)),
    "lisa-adapters16": (beside("uniform", 16, 10 / 3), (1e-4, 3e-4, 1e-3)),
    "lisa-adapters64": (beside("uniform", 64, 5 / 3), (1e-4, 3e-4, 1e-3)),
    "badam": (badam, (3e-4, 1e-3, 3e-3)),
    "lora16": (lora(16), (3e-4, 1e-3, 3e-3)),
    "lora64": (lora(64), (1.5e-4, 5e-4, 1.5e-3)),
    "lora128": (lora(128), (1e-4, 3e-4, 1e-3)),
    "dora16": (lora(16, dora=True), (3e-4, 1e-3, 3e-3)),
    "galore": (galore, (3e-4, 1e-3, 3e-3)),
}
TRIED: dict[str, Maker] = {
    "grass-sharp": grass("grass", temperature=0.3),
    "grass-unscaled": grass("grass", importance_scale="none"),
    "grass-each-step": grass("grass", sampling_interval=1, update_interval=1),
    "grass-short-probe": grass("grass", probe_steps=1),
}
"""Other settings of GRASS, tried at its best rate."""
MAKERS = {name: make for name, (make, _) in METHODS.items()} | TRIED
