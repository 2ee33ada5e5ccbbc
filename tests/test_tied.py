"""What is said of weights that have several names."""

import torch
from torch import nn

from grass_dist import GrassConfig, GrassOptimizer
from grass_dist.backends.wrapping import shared_modules
from tests.families import made


def told(model: nn.Module, caplog, **settings) -> str:
    caplog.clear()
    GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-3}, config=GrassConfig(active_layers=1, **settings)).detach()
    return caplog.text


def test_blocks_that_share_weights_are_named(caplog):
    said = told(made("zamba")[0], caplog)
    assert "Tied: model.layers.3 has weights of model.layers.1, lm_head has weights of model.embed_tokens." in said


def test_tied_embeddings_are_named_where_they_train(caplog):
    model = made("t5")[0]
    assert "decoder.embed_tokens has weights of shared" in told(model, caplog)
    assert "Tied" not in told(model, caplog, always_active=[])


def test_a_model_without_tied_weights_says_nothing(caplog):
    assert "Tied" not in told(made("mixtral")[0], caplog)


def test_shared_modules_are_the_outermost_ones():
    model = made("zamba")[0]
    layers = list(model.model.layers)
    assert shared_modules(layers) == [[layers[1].shared_transf, layers[3].shared_transf]]
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    blocks = [nn.Sequential(first, nn.Linear(2, 2)), nn.Sequential(first, nn.Sequential(nn.ReLU(), second))]
    assert shared_modules(blocks) == [[first]]
    assert shared_modules(blocks[:1]) == []
