"""Reentrant activation checkpointing, which runs a layer's backward by itself: what works, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from grass_dist import GrassConfig, GrassOptimizer
from grass_dist.errors import GrassError
from tests.tiny import Tiny, tiny


class Checkpointed(Tiny):
    """The layers of another model, checkpointed; above embeddings that may be frozen."""

    def forward(self, ids: torch.Tensor, *, reentrant: bool) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return self.head(self.norm(x)).square().mean()


def trained(*, reentrant: bool, probe: int, forwards: int, inputs: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Checkpointed(layers=4)
    model.load_state_dict(tiny(layers=4).state_dict())
    config = GrassConfig(active_layers=2, probe_steps=probe, sampling_interval=2, update_interval=2, sampler="uniform")
    if probe:
        config = config.model_copy(update={"sampler": "grass"})
    optimizer = GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=config)
    if inputs:
        model.embed.register_forward_hook(lambda module, args, out: out.requires_grad_())
    for step in range(4):
        ids = torch.arange(6).repeat(2, 1) + step
        sum(model(ids + n, reentrant=reentrant) for n in range(forwards)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize(("probe", "forwards"), [(0, 1), (0, 2), (2, 1)])
def test_what_works_is_what_the_other_checkpointing_does(probe, forwards):
    ours = trained(reentrant=True, probe=probe, forwards=forwards, inputs=probe > 0)
    expected = trained(reentrant=False, probe=probe, forwards=forwards)
    assert max((ours[name] - weight).abs().max().item() for name, weight in expected.items()) <= 1e-7


def test_a_probe_above_frozen_embeddings_is_refused_in_words():
    with pytest.raises(GrassError, match=r"use_reentrant=False .*enable_input_require_grads"):
        trained(reentrant=True, probe=2, forwards=1)


def test_two_forwards_before_one_backward_are_refused_in_a_probe():
    with pytest.raises(GrassError, match=r"a layer runs twice before one backward .* use_reentrant=False"):
        trained(reentrant=True, probe=2, forwards=2, inputs=True)
