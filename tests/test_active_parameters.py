"""A budget of parameters, over layers of unequal size, in one process."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from grass_dist import ConfigError, GrassConfig, GrassOptimizer, load_checkpoint, save_checkpoint
from tests.tiny import Block, loss_of, take_steps, tiny

SETTINGS = {"active_layers": 3, "probe_steps": 2, "sampling_interval": 2, "update_interval": 5}
STEPS = 20


class Wide(Block):
    """Twice as many parameters, and the same class to a search for blocks."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.more = nn.Linear(width, 2 * width)
        self.back = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.back(torch.tanh(self.more(x)))


def made(**settings) -> tuple[nn.Module, GrassOptimizer]:
    model = tiny()
    torch.manual_seed(1)
    for place in (1, 4, 6):
        model.layers[place] = Wide(8)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
    budget = {"active_parameters": 3 * min(sizes)}  # three small ones, or a large and a small one
    config = GrassConfig(**SETTINGS | budget | settings)
    return model, GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=config)


def drawn_in(optimizer: GrassOptimizer) -> list[tuple[int, ...]]:
    drawn: list[tuple[int, ...]] = []
    optimizer.grass.add_observer(lambda event: drawn.append(getattr(event, "active_layers", ())))
    return drawn


@pytest.mark.parametrize("mode", ["none", "interval", "stream"])
def test_a_draw_holds_the_budget_and_the_number(mode):
    model, optimizer = made(offload={"mode": mode})
    drawn = drawn_in(optimizer)
    take_steps(model, optimizer, range(STEPS))
    draws = [layers for layers in drawn if layers]
    sizes = [unit.numel for unit in optimizer.grass.layers]
    assert all(sum(sizes[i] for i in layers) <= optimizer.grass.config.active_parameters for layers in draws)
    assert {len(layers) for layers in draws} == {2, 3}
    plain, other = made(offload={"mode": "none"})
    take_steps(plain, other, range(STEPS))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("at", [1, 5, 8, 10])
def test_a_run_with_a_budget_goes_on_to_the_bit(at, tmp_path):
    model, optimizer = made()
    take_steps(model, optimizer, range(at))
    save_checkpoint(tmp_path, optimizer, at)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    complete = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    rest = range(at, STEPS)
    take_steps(model, optimizer, rest)

    def by_state_dict(other_model, other):
        other_model.load_state_dict(weights)
        other.load_state_dict(state)

    def by_torch(other_model, other):
        other_model.load_state_dict(weights)
        set_optimizer_state_dict(other_model, other, complete)

    def by_checkpoint(other_model, other):
        assert load_checkpoint(tmp_path, other)

    for load in (by_state_dict, by_torch, by_checkpoint):
        again, other = made()
        load(again, other)
        take_steps(again, other, rest)
        same = [torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)]
        assert all(same), load.__name__


def test_the_start_and_the_refusal_tell_the_budget(capsys):
    made(active_parameters=0.5)
    assert "up to 3 of 8 layers, with at most 50 % of their parameters, train" in "".join(capsys.readouterr())
    with pytest.raises(ConfigError, match=r"active_parameters=0.01: the largest layer has \d+ parameters"):
        made(active_parameters=0.01)


def test_another_budget_is_another_run(tmp_path):
    model, optimizer = made()
    loss_of(model, 0).backward()
    optimizer.step()
    state = optimizer.state_dict()
    with pytest.raises(Exception, match="active_parameters="):
        made(active_parameters=0.5)[1].load_state_dict(state)
