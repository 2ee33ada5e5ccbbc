"""How `GrassOptimizer.step` is called: seen by hooks once, and never compiled."""

from __future__ import annotations

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from grass_dist import GrassConfig, GrassError, GrassOptimizer
from tests.tiny import loss_of, take_steps, tiny

OFFLOADS = [{"mode": "none"}, {"mode": "interval"}, {"mode": "stream", "slots": 2, "update_in_backward": True}]


def made(**config):
    model = tiny()
    settings = {"active_layers": 2, "probe_steps": 2, "sampling_interval": 2, "update_interval": 2, **config}
    return model, GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=GrassConfig(**settings))


@pytest.mark.parametrize("offload", OFFLOADS, ids=str)
def test_hooks_of_all_optimizers_see_each_step_once(offload):
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: seen.append(("before", optimizer))),
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: seen.append(("after", optimizer))),
    ]
    try:
        model, optimizer = made(offload=offload)
        assert seen == []
        optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append(("its own", optimizer)))
        take_steps(model, optimizer, range(7))
        assert seen == [(when, optimizer) for when in ("before", "its own", "after")] * 7
        optimizer.load_state_dict(optimizer.state_dict())
        assert len(seen) == 3 * 7
    finally:
        for handle in handles:
            handle.remove()


def test_a_class_that_was_never_made_steps_unhooked_too():
    class Once(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = tiny()
    config = GrassConfig(active_layers=8, probe_steps=0)
    take_steps(model, GrassOptimizer(model, Once, {"lr": 0.1}, config=config), range(3))
    reference = tiny()
    take_steps(reference, torch.optim.SGD(reference.parameters(), lr=0.1), range(3))
    assert all(map(torch.equal, model.parameters(), reference.parameters()))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_a_step_that_is_compiled_is_refused_in_words(within, whole):
    torch._dynamo.reset()
    model, optimizer = made()

    def both():
        optimizer.step()
        optimizer.zero_grad()

    compiled = torch.compile(both if within else optimizer.step, backend="eager", fullgraph=whole)
    loss_of(model, 0).backward()
    said = "GrassOptimizer.step: it moves states|GrassOptimizer._step"  # with fullgraph, torch says what it left out
    with pytest.raises(Exception, match=said) as refusal:
        compiled()
    assert whole or isinstance(refusal.value, GrassError)
    assert optimizer.grass.step == 0
    optimizer.step()
    assert optimizer.grass.step == 1
