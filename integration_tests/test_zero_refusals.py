"""Under DeepSpeed too, what cannot work ends on every rank with one sentence, before any work, and never hangs."""

from __future__ import annotations

import json
from pathlib import Path

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


def pipeline() -> nn.Module:
    from deepspeed.pipe import PipelineModule

    return PipelineModule([nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=1)


def experts() -> nn.Module:
    model = small_llama()
    model.model.layers[0].mlp = MoE(64, model.model.layers[0].mlp, num_experts=2, ep_size=2)
    return model


def changed_after_initialize() -> str:
    engine = make_engine(ds_config(2, SETTINGS))
    for p in engine.module.parameters():
        p.requires_grad_(True)
    return refused(lambda: train_step(engine, 0, torch.distributed.get_rank(), 2, 1))


def saved_within_an_accumulation(rank: int, folder: str) -> str:
    engine = make_engine(ds_config(2, SETTINGS, 2))
    x = torch.ones(1, 8, dtype=torch.long)
    engine.backward(engine(input_ids=x, labels=x).loss)
    engine.step()
    told = refused(lambda: engine.save_checkpoint(folder))
    assert not list(Path(folder).iterdir())
    return told


def loaded_with_other_groups(folder: str) -> str:
    engine = make_engine(ds_config(2, SETTINGS))
    engine.save_checkpoint(folder, tag="t")
    other = make_engine(ds_config(2, {**SETTINGS, "always_active": []}))
    return refused(lambda: other.load_checkpoint(folder, tag="t"))


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


def tell(rank: int, world_size: int, folder: str) -> dict[str, str]:
    fine = ds_config(2, SETTINGS)
    without = {k: v for k, v in fine.items() if k != "train_micro_batch_size_per_gpu"}
    nested = {**ds_config(2, None), "zero_optimization": {"stage": 2, "grass": SETTINGS}}
    misspelt = {**ds_config(2, None), "gras": SETTINGS}
    broken = Path(folder) / f"broken{rank}.json"
    broken.write_text("{")
    good = Path(folder) / f"good{rank}.json"
    good.write_text(json.dumps(fine))
    path = Path(folder) / "of_rank_1_missing.json" if rank == 1 else good
    model = small_llama()
    twice = make_engine(fine).module
    return {
        "misspelt block": started(misspelt),
        "block inside zero_optimization": started(nested),
        "unknown field": started({**fine, "grass": {"activ_layers": 2}}),
        "too many layers": started({**fine, "grass": {**SETTINGS, "active_layers": 9}}),
        "no micro-batch": started(without),
        "nvme": started(ds_config(3, SETTINGS, zero={"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}})),
        "ZeRO++": started(ds_config(3, SETTINGS, zero={"zero_quantized_weights": True})),
        "not JSON": started(str(broken)),
        "file missing on one rank": started(str(path)),
        "one rank's configuration differs": started({**fine, "grass": {**SETTINGS, "seed": rank}}),
        "one rank's clipping differs": started({**fine, "gradient_clipping": 1.0 + rank}),
        "pipeline": started(fine, model=pipeline(), optimizer=torch.optim.AdamW([nn.Parameter(torch.ones(1))])),
        "experts": started(fine, model=experts()),
        "no stack": started(fine, model=nn.Linear(4, 4), optimizer=torch.optim.AdamW([nn.Parameter(torch.ones(1))])),
        "twice": started(fine, model=twice),
        "Adagrad": started(fine, model=model, optimizer=torch.optim.Adagrad(model.parameters())),
        "has states": started(fine, model=(m := small_llama()), optimizer=stepped_adamw(m)),
        "LBFGS": started(fine, model=model, optimizer=torch.optim.LBFGS(model.parameters())),
        "LBFGS made by a callable": refused(
            lambda: grass_dist.initialize(model=small_llama(), optimizer=torch.optim.LBFGS, config=fine)
        ),
        "no optimizer": refused(lambda: grass_dist.initialize(model=model, config=fine)),
        "changed after initialize": changed_after_initialize(),
        "saved within an accumulation": saved_within_an_accumulation(rank, _made(folder, f"a{rank}")),
        "loaded with other groups": loaded_with_other_groups(_made(folder, "b")),
        "cut off in a round": cut_off(rank, 3, {**SETTINGS, "always_active": ["final_norm", "lm_head"]}),
        "cut off in a probe": cut_off(rank, 2, {"active_layers": 2, "probe_steps": 2}),
    }


def _made(folder: str, name: str) -> str:
    (Path(folder) / name).mkdir(exist_ok=True)
    return str(Path(folder) / name)


WORDS = {
    "misspelt block": "gras",
    "block inside zero_optimization": "top level",
    "unknown field": "grass.activ_layers",
    "too many layers": "grass.active_layers=9",
    "no micro-batch": "train_micro_batch_size_per_gpu",
    "nvme": "zero_optimization.offload_optimizer",
    "ZeRO++": "zero_optimization.zero_quantized_weights",
    "not JSON": "config",
    "file missing on one rank": "of_rank_1_missing.json",
    "one rank's configuration differs": "grass.seed",
    "one rank's clipping differs": "ds_config.gradient_clipping",
    "pipeline": "PipelineModule",
    "experts": "MoE",
    "no stack": "Linear",
    "twice": "already",
    "Adagrad": "Adagrad",
    "has states": "states",
    "LBFGS": "LBFGS",
    "LBFGS made by a callable": "LBFGS",
    "no optimizer": "optimizer=None",
    "changed after initialize": "requires_grad",
    "saved within an accumulation": "1 of 2 micro-batches",
    "loaded with other groups": "parameter groups",
    "cut off in a round": "2 active layers (model.layers.",
    "cut off in a probe": "8 active layers (model.layers.0, ",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return run_ranks(2, tell, str(tmp_path_factory.mktemp("refusals")), timeout=200)


@pytest.mark.parametrize("case", WORDS)
def test_refused_on_every_rank_with_one_sentence(told, case):
    for rank in told:
        sentence = rank[case]
        assert sentence != "not refused" and WORDS[case] in sentence, sentence
        assert "\n" not in sentence and sentence.endswith("."), sentence


def test_without_a_block_it_is_deepspeed(tmp_path):
    assert run_ranks(1, stock) == [True]


def stock(rank: int, world_size: int) -> bool:
    engine = make_engine(ds_config(2, None))
    return type(engine.optimizer).__module__.startswith("deepspeed") and not hasattr(engine, "grass")
