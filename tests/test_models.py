"""Models of transformers with their task heads: with all layers active GRASS is plain AdamW, nothing is left out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from grass_dist import (
    GrassConfig,
    GrassError,
    GrassOptimizer,
    StateError,
    UnsupportedModel,
    find_layers,
    load_checkpoint,
    save_checkpoint,
)
from grass_dist.checkpoint.inspect import inspect_run
from tests.families import BERT, MODELS, Batch, loss_of, made, of_image, of_text

T = pytest.importorskip("transformers")

LR = {"lr": 1e-3}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, steps: int) -> None:
    for step in range(steps):
        loss_of(model(**batch(step))).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", MODELS)
def test_with_all_layers_it_is_plain_adamw(name):
    model, batch, watched = made(name)
    plain, before = copy.deepcopy(model), dict(copy.deepcopy(model).named_parameters())
    config = GrassConfig(active_layers=len(find_layers(model).layers), probe_steps=0)
    optimizer = GrassOptimizer(model, torch.optim.AdamW, LR, config=config)
    assert optimizer.grass.started is not None
    told = tuple(f"{name}." for name in optimizer.grass.started.frozen)
    assert all(f"{n}.".startswith(told) != p.requires_grad for n, p in plain.named_parameters())
    train(model, optimizer, batch, 3)
    train(plain, torch.optim.AdamW(plain.parameters(), **LR), batch, 3)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in plain.named_parameters())
    assert not torch.equal(after[watched], before[watched])


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_are_not_drawn_are_the_same_to_the_bit(name):
    model, batch, _ = made(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = GrassConfig(active_layers=2, probe_steps=1, sampling_interval=9, update_interval=9)
    optimizer = GrassOptimizer(model, torch.optim.AdamW, LR, config=config)
    train(model, optimizer, batch, 4)
    for index, unit in enumerate(optimizer.grass.layers):
        moved = [not torch.equal(p, before[n]) for n, p in unit.params]
        assert any(moved) if index in optimizer.grass.active_layers else not any(moved), unit.name
    assert all(not is_same(unit, before) for unit in optimizer.grass.roles)


def is_same(unit: Any, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[n]) for n, p in unit.params)


def test_both_sides_compete_and_one_is_left_when_asked(caplog):
    two, _, _ = made("whisper")
    optimizer = GrassOptimizer(two, torch.optim.AdamW, LR, config=GrassConfig(active_layers=2))
    assert "The layers of model.encoder.layers (0 to 7) and model.decoder.layers (8 to 9) compete" in caplog.text
    assert optimizer.grass.layers[8].name == "model.decoder.layers.0"
    del optimizer
    one = GrassOptimizer(two, torch.optim.AdamW, LR, config=GrassConfig(active_layers=2, layers="model.decoder.layers"))
    assert one.grass.started is not None and one.grass.started.frozen == ("model.encoder",)
    assert {unit.name for unit in one.grass.roles} == {"embeddings", "final_norm"}
    assert "compete as one" not in caplog.messages[-1]


def test_the_blocks_of_all_stages_of_swin_compete(caplog):
    optimizer = GrassOptimizer(made("swin")[0], torch.optim.AdamW, LR, config=GrassConfig(active_layers=2))
    assert (
        "The layers of swin.encoder.layers.0.blocks (0 to 1) and swin.encoder.layers.1.blocks (2 to 3)" in caplog.text
    )
    others = {unit.name: [n for n, _ in unit.params] for unit in optimizer.grass.roles}["others"]
    assert {name.partition(".")[0] for name in others} == {"swin", "classifier"}
    assert all("downsample" in name for name in others if name.startswith("swin.encoder"))


def test_what_zambas_layers_share_is_of_the_first():
    found = find_layers(made("zamba")[0])
    shared = [unit.name for unit in found.layers if any("shared_transf" in name for name, _ in unit.params)]
    assert len(found.layers) == 4 and shared == ["model.layers.1"] and not found.other


def test_a_batch_without_the_layers_is_a_sentence_in_a_probe():
    model, _, _ = made("llava")
    tower = GrassConfig(active_layers=2, probe_steps=2, layers="model.vision_tower.encoder.layers")
    optimizer = GrassOptimizer(model, torch.optim.AdamW, LR, config=tower)
    assert optimizer.grass.phase == "probe"
    with pytest.raises(GrassError, match=r"run none of its 2 active layers .* on this batch.* by layers="):
        model(**of_text(0))
    model(**of_image(0)).loss.backward()


def test_a_checkpoint_names_the_layers_of_both_sides(tmp_path):
    def optimizer_of(model: nn.Module, **settings: Any) -> GrassOptimizer:
        config = GrassConfig(active_layers=2, probe_steps=0, sampler="cyclic", **settings)
        return GrassOptimizer(model, torch.optim.AdamW, LR, config=config)

    model, batch, _ = made("t5")
    train(model, optimizer := optimizer_of(model), batch, 2)
    save_checkpoint(tmp_path / "checkpoints", optimizer, 2)
    layers = inspect_run(tmp_path)["newest_good"]["layers"]
    assert [layer["name"] for layer in layers] == [unit.name for unit in optimizer.grass.layers]
    assert [layer["times_trained"] for layer in layers] == [2, 2, 0, 0, 0]
    other = optimizer_of(made("t5")[0])
    load_checkpoint(tmp_path / "checkpoints", other)
    assert other.grass.active_layers == optimizer.grass.active_layers
    state = optimizer.state_dict()
    state["grass"]["names"] = [f"encoder.block.{i}" for i in range(5)]
    with pytest.raises(StateError, match="In the saved state the layers are .* and here"):
        other.load_state_dict(state)


@pytest.mark.parametrize("by_params", [False, True])
def test_a_frozen_vision_tower_does_not_compete(by_params):
    model: Any = made("llava")[0]
    params = None
    if by_params:
        params = [p for n, p in model.named_parameters() if "vision_tower" not in n]
    else:
        model.model.vision_tower.requires_grad_(False)
    optimizer = GrassOptimizer(model, torch.optim.AdamW, LR, config=GrassConfig(active_layers=2), params=params)
    assert [unit.name for unit in optimizer.grass.layers] == [f"model.language_model.layers.{i}" for i in range(3)]
    assert "others" in {unit.name for unit in optimizer.grass.roles}


def test_the_trunk_of_esmfold_is_found_beside_its_frozen_model():
    small = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 64}
    names = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>")
    more = {"position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 32, "vocab_list": names}
    with torch.device("meta"):
        config = T.EsmConfig(vocab_size=33, **small, **more, is_folding_model=True, esmfold_config={"trunk": {}})
        model = T.EsmForProteinFolding(config)
    assert find_layers(model).stacks == ("trunk.blocks",)


def test_albert_is_refused_with_what_works_instead():
    config = T.AlbertConfig(**{**BERT, "embedding_size": 8})
    with pytest.raises(UnsupportedModel, match='one block.* layers="albert.encoder.albert_layer_groups"'):
        find_layers(T.AlbertForMaskedLM(config))
    torch.manual_seed(0)
    model = T.AlbertForMaskedLM(config).train()
    plain = copy.deepcopy(model)
    one = GrassConfig(active_layers=1, layers="albert.encoder.albert_layer_groups", probe_steps=0)
    train(model, GrassOptimizer(model, torch.optim.AdamW, LR, config=one), of_text, 2)
    train(plain, torch.optim.AdamW(plain.parameters(), **LR), of_text, 2)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
