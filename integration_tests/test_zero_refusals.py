"""Under DeepSpeed too, what cannot work ends on every rank with one sentence, before any work, and never hangs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe.layer import MoE
from torch import nn

import grass_dist
from integration_tests.support.model import ADAMW, decay_groups, small_llama
from integration_tests.support.ranks import refused, run_ranks
from integration_tests.support.zero import ds_config, make_engine, train_step

SETTINGS = {"active_layers": 2, "sampling_interval": 2, "probe_steps": 0, "sampler": "uniform"}


def started(config, model=None, optimizer=None, **kwargs) -> str:
    model = model or small_llama()
    optimizer = optimizer or torch.optim.AdamW(decay_groups(model), **ADAMW)
    return refused(lambda: grass_dist.initialize(model=model, optimizer=optimizer, config=config, **kwargs))


def stepped_adamw(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return optimizer


def stepped_adagrad(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adagrad(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return optimizer


def pipeline() -> nn.Module:
    from deepspeed.pipe import PipelineModule

    return PipelineModule([nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=1)


def experts() -> nn.Module:
    model = small_llama()
    model.model.layers[0].mlp = MoE(64, model.model.layers[0].mlp, num_experts=2, ep_size=2)
    return model


def changed_after_initialize(rank: int, folder: Path) -> str:
    engine = make_engine(ds_config(2, SETTINGS))
    for p in engine.module.parameters():
        p.requires_grad_(True)
    return refused(lambda: train_step(engine, 0, rank, 2, 1))


def saved_within_an_accumulation(folder: str) -> str:
    engine = make_engine(ds_config(2, SETTINGS, 2))
    x = torch.ones(1, 8, dtype=torch.long)
    engine.backward(engine(input_ids=x, labels=x).loss)
    engine.step()
    told = refused(lambda: engine.save_checkpoint(folder))
    assert not list(Path(folder).iterdir())
    return told


def loaded_by(other: dict[str, Any], folder: str, **kwargs) -> str:
    """What a run with the configuration ``other`` says to a checkpoint of one with SETTINGS."""
    make_engine(ds_config(2, SETTINGS)).save_checkpoint(folder, tag="t")
    engine = (
        grass_dist.initialize(config=ds_config(2, other), **kwargs)[0] if kwargs else make_engine(ds_config(2, other))
    )
    return refused(lambda: engine.load_checkpoint(folder, tag="t"))


def loaded_with_one_group(folder: str) -> str:
    model = small_llama()
    return loaded_by(SETTINGS, folder, model=model, optimizer=torch.optim.AdamW(model.parameters(), **ADAMW))


def not_started(rank: int) -> str:
    """A model is as it was after a start that failed late, and can be given again."""
    model = small_llama()
    config = ds_config(2, {**SETTINGS, "always_active": [], "seed": rank})
    told = started(config, model)
    assert all(p.requires_grad for p in model.parameters())
    late = started(ds_config(2, SETTINGS, scheduler={"type": "NoSuchLR"}), model)
    assert late.startswith("ConfigError: scheduler.type='NoSuchLR'"), late
    make_engine(ds_config(2, SETTINGS), model=model).destroy()
    return told


class Checkpointed(nn.Module):
    """A layer under DeepSpeed's own activation checkpointing, which is reentrant."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return deepspeed.checkpointing.checkpoint(lambda x: self.layer(x, **kwargs), x)


def cut_off(rank: int, stage: int, settings: dict[str, object]) -> str:
    """A step whose layers get no gradient, with the embeddings frozen."""
    model = small_llama().train()
    model.model.layers = nn.ModuleList(map(Checkpointed, model.model.layers))
    engine = make_engine(ds_config(stage, settings), model=model)
    told = refused(lambda: train_step(engine, 0, rank, 2, 1))
    engine.destroy()
    return told


def file_with(text: str, folder: Path, name: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def made(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    return str(folder)


def started_with(optimizer: Callable[[nn.Module], Any]) -> str:
    model = small_llama()
    return started(FINE, model, optimizer(model))


FINE = ds_config(2, SETTINGS)
WITHOUT_GRASS = ds_config(2, None)


def grass(**settings: Any) -> str:
    return started({**FINE, "grass": settings})


def zero3(**options: Any) -> str:
    return started(ds_config(3, SETTINGS, zero=options))


CASES: dict[str, tuple[Callable[[int, Path], str], str]] = {
    "misspelt block": (lambda rank, folder: started({**WITHOUT_GRASS, "gras": SETTINGS}), "gras"),
    "block inside zero_optimization": (
        lambda rank, folder: started({**WITHOUT_GRASS, "zero_optimization": {"stage": 2, "grass": SETTINGS}}),
        "top level",
    ),
    "unknown field": (lambda rank, folder: grass(activ_layers=2), "grass.activ_layers"),
    "too many layers": (lambda rank, folder: grass(**{**SETTINGS, "active_layers": 9}), "grass.active_layers=9"),
    "no micro-batch": (
        lambda rank, folder: started({k: v for k, v in FINE.items() if k != "train_micro_batch_size_per_gpu"}),
        "train_micro_batch_size_per_gpu",
    ),
    "nvme": (
        lambda rank, folder: zero3(offload_optimizer={"device": "nvme"}),
        "zero_optimization.offload_optimizer.nvme_path",
    ),
    "ZeRO++": (lambda rank, folder: zero3(zero_quantized_weights=True), "zero_optimization.zero_quantized_weights"),
    "a factor that is the number of ranks": (
        lambda rank, folder: started(
            ds_config(3, SETTINGS, zero={"reduce_scatter": False}, gradient_predivide_factor=2.0)
        ),
        "gradient_predivide_factor=2.0",
    ),
    "not JSON": (lambda rank, folder: started(file_with("{", folder, f"broken{rank}.json")), "config"),
    "file missing on one rank": (
        lambda rank, folder: started(
            str(folder / "of_rank_1_missing.json") if rank == 1 else file_with(json.dumps(FINE), folder, "good.json")
        ),
        "of_rank_1_missing.json",
    ),
    "one rank's configuration differs": (lambda rank, folder: not_started(rank), "grass.seed"),
    "one rank's clipping differs": (
        lambda rank, folder: started({**FINE, "gradient_clipping": 1.0 + rank}),
        "ds_config.gradient_clipping",
    ),
    "pipeline": (
        lambda rank, folder: started(FINE, pipeline(), torch.optim.AdamW([nn.Parameter(torch.ones(1))])),
        "PipelineModule",
    ),
    "experts": (lambda rank, folder: started(FINE, experts()), "MoE"),
    "no stack": (
        lambda rank, folder: started(FINE, nn.Linear(4, 4), torch.optim.AdamW([nn.Parameter(torch.ones(1))])),
        "Linear",
    ),
    "twice": (lambda rank, folder: started(FINE, make_engine(FINE).module), "already"),
    "stepped Adagrad": (lambda rank, folder: started_with(stepped_adagrad), "states"),
    "has states": (lambda rank, folder: started_with(stepped_adamw), "states"),
    "LBFGS": (lambda rank, folder: started_with(lambda model: torch.optim.LBFGS(model.parameters())), "LBFGS"),
    "LBFGS made by a callable": (lambda rank, folder: started_with(lambda model: torch.optim.LBFGS), "LBFGS"),
    "no optimizer": (
        lambda rank, folder: refused(lambda: grass_dist.initialize(model=small_llama(), config=FINE)),
        "optimizer=None",
    ),
    "changed after initialize": (changed_after_initialize, "requires_grad"),
    "saved within an accumulation": (
        lambda rank, folder: saved_within_an_accumulation(made(folder / f"a{rank}")),
        "1 of 2 micro-batches",
    ),
    "loaded with other layers always active": (
        lambda rank, folder: loaded_by({**SETTINGS, "always_active": []}, made(folder / "b")),
        "always_active=[",
    ),
    "loaded with other groups": (lambda rank, folder: loaded_with_one_group(made(folder / "c")), "parameter groups"),
    "cut off in a round": (
        lambda rank, folder: cut_off(rank, 3, {**SETTINGS, "always_active": ["final_norm", "lm_head"]}),
        "2 active layers (model.layers.",
    ),
    "cut off in a probe": (
        lambda rank, folder: cut_off(rank, 2, {"active_layers": 2, "probe_steps": 2}),
        "8 active layers (model.layers.0, ",
    ),
}
"""What a rank does with a folder that all share, and words of the sentence that it hears."""


def every_case(rank: int, world_size: int, folder: str) -> dict[str, str]:
    return {case: said(rank, Path(folder)) for case, (said, _) in CASES.items()}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return run_ranks(2, every_case, str(tmp_path_factory.mktemp("refusals")), timeout=200)


@pytest.mark.parametrize("case", CASES)
def test_refused_on_every_rank_with_one_sentence(told, case):
    for rank in told:
        sentence = rank[case]
        assert sentence != "not refused" and CASES[case][1] in sentence, sentence
        assert "\n" not in sentence and sentence.endswith("."), sentence


def stock(rank: int, world_size: int) -> bool:
    engine = make_engine(ds_config(2, None))
    return type(engine.optimizer).__module__.startswith("deepspeed") and not hasattr(engine, "grass")


def test_without_a_block_it_is_deepspeed(tmp_path):
    assert run_ranks(1, stock) == [True]
