"""What trains outside of the layers: the role others, names and patterns in always_active, and what is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from grass_dist import (
    CheckpointError,
    ConfigError,
    GrassConfig,
    GrassOptimizer,
    Started,
    UnsupportedModel,
    load_checkpoint,
    save_checkpoint,
)
from tests.tiny import loss_of, tiny

LR = {"lr": 1e-2}
ROLES = ("embeddings", "final_norm", "lm_head")
ALL: dict[str, Any] = {"active_layers": 8, "probe_steps": 0}
SOME: dict[str, Any] = {"active_layers": 2, "probe_steps": 1}


class WithHeads(nn.Module):
    """A tagger beside the language model, with a scale that is in no module."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lm = tiny()
        self.tagger = nn.ModuleDict({"dense": nn.Linear(8, 8), "out": nn.Linear(8, width)})
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.lm.embed(ids)
        for layer in self.lm.layers:
            x = layer(x)
        x = self.lm.norm(x)
        return self.lm.head(x) + self.tagger["out"](self.tagger["dense"](x)).sum(-1, keepdim=True) * self.scale


def grass(model: nn.Module, **settings: Any) -> GrassOptimizer:
    return GrassOptimizer(model, torch.optim.AdamW, LR, config=GrassConfig(**{**SOME, **settings}))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def always(optimizer: GrassOptimizer) -> dict[str, list[str]]:
    return {unit.name: [name for name, _ in unit.params] for unit in optimizer.grass.roles}


def test_what_has_no_role_trains_as_in_plain_adamw():
    model, plain = WithHeads(), WithHeads()
    optimizer = grass(model, **ALL)
    train(model, optimizer)
    train(plain, torch.optim.AdamW(plain.parameters(), **LR))
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert not torch.equal(model.tagger["out"].weight, WithHeads().tagger["out"].weight)
    tagger = [f"tagger.{name}.{kind}" for name in ("dense", "out") for kind in ("weight", "bias")]
    assert always(optimizer)["others"] == ["scale", *tagger]


def test_without_others_they_are_frozen_and_it_is_said(caplog):
    model = WithHeads()
    seen: list[Started] = []

    class Watcher:
        def started(self, started: Started) -> None:
            seen.append(started)

        def __call__(self, event: object) -> None:
            assert not isinstance(event, Started)

    config = GrassConfig(**SOME, always_active=ROLES)
    with caplog.at_level(logging.INFO, "grass_dist"):
        optimizer = GrassOptimizer(model, torch.optim.AdamW, LR, config=config, observers=[Watcher()])
    [first] = [message for message in caplog.messages if message.startswith("GRASS: 2 of 8")]
    assert first.endswith("frozen for good: scale, tagger (together 3.6 %).")
    train(model, optimizer)
    assert torch.equal(model.tagger["out"].weight, WithHeads().tagger["out"].weight)
    [started] = seen
    assert started == optimizer.grass.started and started.frozen == ("scale", "tagger")
    assert started.layers == tuple(f"lm.layers.{i}" for i in range(8)) and started.stacks == ("lm.layers",)
    assert set(started.roles) == set(ROLES) and started.roles["lm_head"] == ("lm.head.weight",)


def test_the_start_says_what_the_others_are(caplog):
    with caplog.at_level(logging.INFO, "grass_dist"):
        grass(WithHeads())
    assert any(
        "lm_head, others (scale, tagger.dense, tagger.out); frozen for good: nothing" in m for m in caplog.messages
    )


def test_large_others_are_refused_with_their_sizes():
    model = WithHeads(width=99)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ConfigError) as error:
        grass(model)
    told = str(error.value)
    assert error.value.field == "always_active" and "964 elements (tagger.out.weight 99x8, tagger.out.bias 99" in told
    assert (
        "0.00771 MB with AdamW" in told and "as many elements as the 2 largest layers have (592) do so unasked" in told
    )
    assert "freeze them or leave them out of params=" in told and "'tagger')" in told
    assert before == [p.requires_grad for p in model.parameters()]
    for name in ("tagger", "module.tagger", "tagger.*", "tagger.out.weight", "*out"):
        optimizer = grass(WithHeads(width=99), always_active=[*ROLES, "others", name])
        assert "tagger.out.weight" in always(optimizer)["others"]
    model.tagger.requires_grad_(False)
    assert always(grass(model))["others"] == ["scale"]


def test_a_refusal_names_as_much_as_is_needed():
    model = WithHeads(width=60)
    model.more = nn.Linear(8, 70)
    model.small = nn.Linear(8, 2)
    with pytest.raises(ConfigError, match=r"e\.g\. 'more' and 'tagger'\)"):
        grass(model, active_layers=1)
    grass(model, active_layers=1, always_active=[*ROLES, "others", "more", "tagger"])
    assert "others" in always(grass(WithHeads(width=30)))  # more than the largest layer, and less than two


def test_names_take_what_they_name_and_no_more():
    assert always(grass(WithHeads(), always_active=["lm.norm.bias", "tagger.d*"])) == {
        "final_norm": ["lm.norm.bias"],
        "others": ["tagger.dense.weight", "tagger.dense.bias"],
    }
    tied = WithHeads()
    tied.lm.head.weight = tied.lm.embed.weight
    assert always(grass(tied, always_active=["lm.head"])) == {"embeddings": ["lm.embed.weight"]}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tager", "no role, module or parameter .* use 'tagger'"),
        ("embedding", "no role, module or parameter .* use 'embeddings'"),
        ("dense", "no role, module or parameter .* use 'tagger.dense'"),
        ("lm.layers.3", "it matches parameters of the layer lm.layers.3, and layers train when they are drawn"),
        ("*norm*", "it matches parameters of the layer lm.layers.0"),
        ("scale", "nothing that it names has requires_grad"),
    ],
)
def test_names_that_cannot_work_are_refused(name, told):
    model = WithHeads()
    model.scale.requires_grad_(False)
    with pytest.raises(ConfigError, match=f"^always_active='{name.replace('*', '[*]')}': {told}"):
        grass(model, always_active=[*ROLES, name])


def test_a_checkpoint_without_others_is_refused_in_words(tmp_path):
    model = WithHeads()
    optimizer = grass(model, always_active=ROLES)
    train(model, optimizer)
    save_checkpoint(tmp_path, optimizer, 4)
    other = grass(WithHeads())
    with pytest.raises(CheckpointError, match=r"always_active=\['embeddings', .* in the saved state, and .*'others'\]"):
        load_checkpoint(tmp_path, other)
    load_checkpoint(tmp_path, grass(WithHeads(), always_active=ROLES))


@pytest.mark.parametrize("saved", [ROLES, (*ROLES, "others")])
def test_an_empty_role_is_no_difference(saved, tmp_path):
    model = tiny()
    optimizer = grass(model, always_active=saved)
    train(model, optimizer)
    save_checkpoint(tmp_path, optimizer, 4)
    state = optimizer.state_dict()
    for roles in (ROLES, (*ROLES, "others")):
        other = grass(tiny(), always_active=roles)
        load_checkpoint(tmp_path, other)
        other.load_state_dict(state)
        assert other.grass.step == 4


def test_quantised_layers_are_refused_by_name():
    model = tiny()
    for layer in model.layers:
        for name in ("up", "down"):
            linear = getattr(layer, name)
            linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(
        UnsupportedModel, match=r"quantised: layers\.0\.up\.weight is of torch\.int8.* only norm\.weight"
    ):
        grass(model)
    model.layers.register_parameter("adapter", None)
    for layer in model.layers:
        layer.adapter = nn.Linear(8, 2, bias=False)  # matrices that train: adapters over frozen weights
    grass(model)
