"""The files of a trained model: a tied head once, and readable by whom the umask lets."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from grass_dist.finetune.export import gather_torch, save_pretrained
from grass_dist.job.world import World
from grass_dist.regular_files import give_usual_modes
from tests.test_data import make_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 40}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture
def world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    patient: Any = dist.group.WORLD
    yield World(0, 0, 1, torch.device("cpu"), patient)
    dist.destroy_process_group()


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **SIZES, **HEADS))


def sharded(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    return model


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("wrapper", [sharded, DistributedDataParallel, lambda model: model])
def test_a_tied_head_is_written_once(world, tmp_path, wrapper, tied):
    whole = {name: each.clone() for name, each in llama(tied).state_dict().items()}
    model = llama(tied)
    gathered = gather_torch(wrapper(model))
    assert (gathered["lm_head.weight"] is gathered["model.embed_tokens.weight"]) == tied
    save_pretrained(model, gathered, make_tokenizer(), tmp_path / "model", world)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (not tied)  # noqa: SIM118
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)


def test_every_file_of_a_model_has_the_mode_of_any_other(world, tmp_path, umask):
    model = llama(tied=True)
    save_pretrained(model, gather_torch(model), make_tokenizer(), tmp_path / "model", world)
    assert modes(tmp_path / "model") == {0o666 & ~umask} and len(list((tmp_path / "model").iterdir())) > 3


def test_what_is_no_file_keeps_its_mode(tmp_path):
    (tmp_path / "folder").mkdir(mode=0o700)
    (tmp_path / "outside").touch(mode=0o600)
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "folder" / "within").mkdir(mode=0o700)
    give_usual_modes(tmp_path / "folder")
    assert stat.S_IMODE((tmp_path / "outside").stat().st_mode) == 0o600
    assert modes(tmp_path / "folder") == {0o600, 0o700}
