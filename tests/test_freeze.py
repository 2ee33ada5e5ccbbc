"""`GrassConfig.freeze`, and mixtures of experts."""

from __future__ import annotations

import pytest
import torch

from grass_dist import GrassConfig, GrassOptimizer
from grass_dist.errors import ConfigError
from grass_dist.model.discovery import find_layers
from grass_dist.model.experts import expert_blocks, idle_experts_move
from tests.routed import Routed, ids_for
from tests.tiny import take_steps, tiny

SETTINGS = {"active_layers": 2, "probe_steps": 1, "sampling_interval": 2, "update_interval": 2}


def trained(**settings):
    model = Routed()
    optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=GrassConfig(**SETTINGS, **settings))
    for step in range(9):
        model(torch.cat([ids_for(step, rank) for rank in range(2)])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, {
        n for n, p in model.named_parameters() if not torch.equal(p, dict(Routed().named_parameters())[n])
    }


def test_what_freeze_names_never_trains_and_is_said():
    optimizer, moved = trained(freeze=["*.router"])
    assert not any("router" in name for name in moved)
    assert any("experts" in name for name in moved)
    assert "layers.0.mlp.router" in optimizer.grass.started.frozen
    assert all("router" not in name for unit in optimizer.grass.layers for name, _ in unit.params)
    optimizer.detach()
    assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])


def test_routers_train_with_their_layer_if_nobody_freezes_them():
    assert any("router" in name for name in trained()[1])


def test_a_list_of_patterns_serves_several_models(caplog):
    _, moved = trained(freeze=["*.router", "*.mlp.gate", "*.block_sparse_moe.gate"])
    assert moved and not any("router" in name for name in moved)
    assert "freeze: '*.mlp.gate', '*.block_sparse_moe.gate' matches nothing in this model" in caplog.text
    with pytest.raises(ConfigError, match=r"freeze='\*.gate'.*no module or parameter"):
        trained(freeze=["*.gate", "*.block_sparse_moe"])


@pytest.mark.parametrize("given", ["lm_head", ["lm_head"]])
def test_a_role_that_is_active_by_default_gives_way(given):
    assert GrassConfig(freeze=given).freeze == ("lm_head",)


def test_a_frozen_layer_does_not_compete():
    optimizer, moved = trained(freeze=["layers.0", "embed.weight"])
    assert [unit.name for unit in optimizer.grass.layers] == ["layers.1", "layers.2", "layers.3"]
    assert not any(name.startswith(("layers.0.", "embed")) for name in moved)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"freeze": ["*.routr"]}, r"freeze='\*.routr'.*no module or parameter.*use"),
        ({"freeze": ["a", "a"]}, "listed twice"),
        ({"freeze": [""]}, "a name is empty"),
        ({"freeze": ["norm"], "always_active": ["norm"]}, "it is in always_active, too"),
    ],
)
def test_a_name_that_cannot_be_frozen_is_one_sentence(settings, said):
    with pytest.raises(ConfigError, match=said):
        trained(**settings)


def test_a_state_saved_without_freeze_is_not_gone_on_with():
    def optimizer(**more):
        config = GrassConfig(active_layers=2, probe_steps=0, **more)
        return GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=config)

    model = tiny()
    first = optimizer()
    take_steps(model, first, range(2))
    saved = first.state_dict()
    first.detach()
    assert "freeze" not in str(saved["grass"])  # a state of a release without it goes on
    with pytest.raises(Exception, match="freeze"):
        optimizer(freeze=["layers.3.norm"]).load_state_dict(saved)


def test_experts_are_found_by_their_router():
    model = Routed()
    blocks = expert_blocks(model, find_layers(model).layers)
    assert blocks == [layer.mlp for layer in model.layers]
    assert expert_blocks(tiny(), find_layers(tiny()).layers) == []
    assert "Experts (Experts) that no rank uses" in (idle_experts_move(model, find_layers(model).layers) or "")
    assert idle_experts_move(tiny(), find_layers(tiny()).layers) is None


def test_stacked_experts_are_one_module():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=3, **sizes))
    assert expert_blocks(model, find_layers(model).layers) == []
