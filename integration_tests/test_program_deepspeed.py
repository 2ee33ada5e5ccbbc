"""launch/finetune.py under DeepSpeed ZeRO: the same run as under FSDP2, by either launcher, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from grass_dist.finetune.config_file import load_config
from grass_dist.finetune.run_deepspeed import DeepSpeed
from grass_dist.job.world import World
from integration_tests.support.program import (
    AUTO,
    ROOT,
    check_refused,
    events,
    run_all,
    run_program,
)
from integration_tests.support.ranks import free_port, run_ranks

pytestmark = pytest.mark.timeout(300)

SETTINGS = ["train.eps=1e-6"]  # a gradient near nothing else moves its weight by its rounding error
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def fsdp2(config):
    return run_all(config, 2, "name=fsdp2", *SETTINGS)


def launch(launcher: list[str], config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [*launcher, str(ROOT / "launch" / "finetune.py"), "--config", str(config), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


def torchrun() -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def deepspeed() -> list[str]:
    return [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]


def weights(run: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(run / "model").state_dict()


@pytest.mark.parametrize(
    ("stage", "launcher"),
    [pytest.param(2, deepspeed, marks=pytest.mark.integration), (3, torchrun)],
    ids=["zero2", "zero3"],
)
def test_a_run_is_the_one_under_fsdp2(config, fsdp2, stage, launcher):
    parallel = ["parallel=deepspeed", f"parallel.config=zero{stage}.json"]
    done = launch(launcher(), config, f"name=zero{stage}", *parallel, *SETTINGS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report: ") == 1 and done.stdout.count("step 10/10") == 1  # one rank speaks
    run = config.parent / "runs" / f"zero{stage}"

    mine, theirs = events(run, "step"), events(fsdp2, "step")
    for name in ("active_layers", "phase", "tokens", "lr"):
        assert [s[name] for s in mine] == [s[name] for s in theirs], name
    assert [s["loss"] for s in mine] == pytest.approx([s["loss"] for s in theirs], abs=1e-5)
    norms = [[s["grad_norm"] for s in steps if s["phase"] == "train"] for steps in (mine, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and mine[0]["grad_norm"] is None
    for event, name in (("refresh", "importances"), ("sample", "probabilities")):
        pairs = zip(events(run, event), events(fsdp2, event), strict=True)
        assert all(a[name] == pytest.approx(b[name], rel=1e-4) and a["step"] == b["step"] for a, b in pairs)
    held_out = [[e["loss"] for e in events(folder, "eval")] for folder in (run, fsdp2)]
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-5) and len(held_out[0]) == 3
    answers = [[a["text"] for a in events(folder, "answer")] for folder in (run, fsdp2)]
    assert answers[0] == answers[1] and len(answers[0]) == 2

    trained, reference = weights(run), weights(fsdp2)
    assert trained.keys() == reference.keys()
    assert max((trained[name] - reference[name]).abs().max().item() for name in reference) < 5e-6

    accumulation = 2  # every micro-batch is reduced under ZeRO-2 and 3, and the last one under FSDP2
    reduced = [[s["bytes_reduced"] for s in steps[2:]] for steps in (mine, theirs)]
    assert reduced[0] == pytest.approx([accumulation * n for n in reduced[1]], rel=0.01)
    # A layer's states are on the device for its interval alone: they do not grow with the layers that have trained.
    for run_steps in (mine, theirs):
        assert run_steps[0]["host_state_bytes"] == 0 < run_steps[-1]["host_state_bytes"]
        trained = [s["state_bytes"] for s in run_steps if s["phase"] == "train"]
        assert max(trained) - min(trained) <= max(s["bytes_to_device"] for s in run_steps)

    assert (run / "report.html").stat().st_size > 50_000 and (run / "plots" / "cost.png").is_file()
    about = json.loads((run / "run.json").read_text())
    assert about["backend"] == f"DeepSpeed ZeRO-{stage}"
    assert {**about, "name": "", "backend": "", "started": ""} == {
        **json.loads((fsdp2 / "run.json").read_text()),
        "name": "",
        "backend": "",
        "started": "",
    }


def _load_zero3(rank: int, world_size: int, config: Path) -> dict[str, tuple[int, int, int]]:
    os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")
    from transformers.integrations import is_deepspeed_zero3_enabled

    world = World(rank, rank, world_size, torch.device("cpu"), dist.group.WORLD)
    overrides = ["parallel=deepspeed", "parallel.config=zero3.json"]
    model = DeepSpeed(load_config(config, overrides), world).load()
    held = {n: (p.numel(), getattr(p, "ds_numel", 0), p.ds_tensor.numel()) for n, p in model.named_parameters()}
    assert not is_deepspeed_zero3_enabled()  # the models that are loaded later are whole
    return held


def test_a_model_for_zero3_is_loaded_in_shards(config):
    whole = load_file(config.parent / "model" / "model.safetensors")
    for held in run_ranks(2, _load_zero3, config):
        assert held.keys() == whole.keys()  # tied: one parameter
        for name, (here, all_of_it, shard) in held.items():
            assert (here, all_of_it, shard) == (0, whole[name].numel(), -(-whole[name].numel() // 2)), name


BAD = {
    "no JSON": (["parallel=deepspeed"], r"parallel.config=None: backend=deepspeed needs one; give the path"),
    "a missing JSON": (
        ["parallel=deepspeed", "parallel.config=nowhere.json"],
        r"parallel.config='nowhere.json': there is no such file in ",
    ),
    "a JSON for FSDP2": (["parallel.config=zero2.json"], r"parallel.config='zero2.json': backend=fsdp2 reads no JSON"),
    "a value that contradicts ours": (
        ["parallel=deepspeed", "parallel.config=clip.json"],
        r"parallel.config.gradient_clipping=0.5: train.clip_grad_norm is 1.0; write \"auto\" there",
    ),
    "a value that contradicts ours on these ranks": (
        ["parallel=deepspeed", "parallel.config=accumulation.json"],
        r"parallel.config.gradient_accumulation_steps=1: train.global_batch_size=8 takes 2 here",
    ),
    "a block that contradicts ours": (
        ["parallel=deepspeed", "parallel.config=block.json"],
        r"grass.active_layers=2: the DeepSpeed JSON has 3; change one",
    ),
    "an option that GRASS cannot run with": (
        ["parallel=deepspeed", "parallel.config=offload.json"],
        r"parallel.config.zero_optimization.offload_param.device='nvme': ",
    ),
    "too many layers": (
        ["parallel=deepspeed", "parallel.config=zero3.json", "grass.active_layers=7"],
        r"grass.active_layers=7: the model has 6 layers; use 1 to 6",
    ),
    "a missing model": (
        ["parallel=deepspeed", "parallel.config=zero3.json", "model.name=/nowhere/at/all"],
        r"model.name='/nowhere/at/all': it cannot be loaded",
    ),
}
JSONS = {
    "clip": {**AUTO, "gradient_clipping": 0.5},
    "accumulation": {**AUTO, "gradient_accumulation_steps": 1},
    "block": {**AUTO, "grass": {"active_layers": 3}},
    "offload": {**AUTO, "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
}


@pytest.fixture(scope="module")
def bad(config):
    for name, ds_config in JSONS.items():
        (config.parent / f"{name}.json").write_text(json.dumps(ds_config))
    return config


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_every_rank_with_one_sentence(bad, case):
    overrides, message = BAD[case]
    check_refused(run_program([["--config", str(bad), "name=bad", *overrides]] * 2), message)
    assert not (bad.parent / "runs" / "bad").exists()


@pytest.mark.integration
def test_the_deepspeed_launcher_ends_with_it(bad):
    failed = launch(deepspeed(), bad, "name=bad", *BAD["a value that contradicts ours"][0])
    assert failed.returncode != 0
    assert failed.stderr.count("error: parallel.config.gradient_clipping=0.5") == 1, failed.stderr[-3000:]
