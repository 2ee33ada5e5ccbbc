"""What a draw keeps from forward to backward: nothing below the lowest layer that trains, and no input for a frozen
weight's own gradient. Counted on a Llama, with activation checkpointing and without."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grass_dist import GrassConfig, GrassOptimizer

LAYERS, HIDDEN, INNER, TOKENS = 6, 16, 40, 12


def training(checkpointing: bool, **settings) -> tuple[LlamaForCausalLM, GrassOptimizer]:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    config = GrassConfig(active_layers=2, sampler="uniform", sampling_interval=1, seed=3, **settings)
    return model, GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=config)


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50, (1, TOKENS), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def steps(model, optimizer, number: int, watch=lambda: None):
    for step in range(number):
        watch()
        loss = model(**batch(step)).loss
        yield loss
        optimizer.step()
        optimizer.zero_grad()


def saved_in_layers(model, loss_of) -> tuple[Counter, list]:
    """Entries that each layer's forward saves for its backward, views of parameters aside, and the loss."""
    entries, inside = Counter(), []
    params = {p.untyped_storage().data_ptr() for p in model.parameters()}
    hooks = []
    for number, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_pre_hook(lambda *_, number=number: inside.append(number)))
        hooks.append(layer.register_forward_hook(lambda *_: inside.clear()))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if inside and tensor.untyped_storage().data_ptr() not in params:
            entries[inside[-1]] += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of()
    for hook in hooks:
        hook.remove()
    return entries, [loss]


def test_frozen_weights_save_no_input_and_below_nothing_is_kept():
    model, optimizer = training(checkpointing=False, always_active=())
    seen = set()
    for step in range(12):
        active = set(optimizer.grass.active_layers)
        entries, (loss,) = saved_in_layers(model, lambda step=step: model(**batch(step)).loss)
        lowest = min(active)
        assert all(entries[number] == 0 for number in range(lowest))
        above = [entries[number] for number in range(lowest + 1, LAYERS) if number not in active]
        trained = [entries[number] for number in active if number > lowest]
        assert len(set(above)) <= 1 and len(set(trained)) == 1
        if above:
            # Inputs of queries, keys and values together, of the output, and twice in the MLP; and the norms' weights'.
            assert trained[0] - above[0] >= TOKENS * (3 * HIDDEN + INNER)
            seen.add(trained[0] - above[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) == 1


@pytest.mark.parametrize("roles", [(), ("embeddings", "final_norm", "lm_head")])
def test_only_layers_of_the_backward_are_run_again(roles):
    model, optimizer = training(checkpointing=True, always_active=roles)
    runs = Counter()
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: runs.update([number]))
    lowest = set()
    for loss in steps(model, optimizer, 12, runs.clear):
        first = 0 if roles else min(optimizer.grass.active_layers)
        loss.backward()
        assert dict(runs) == {number: 1 if number < first else 2 for number in range(LAYERS)}
        lowest.add(first)
    assert len(lowest) > (0 if roles else 2)


def test_below_the_lowest_layer_checkpointing_holds_no_input():
    model, optimizer = training(checkpointing=True, always_active=())
    refs: dict[int, weakref.ref] = {}
    for number, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(
            lambda module, args, out, number=number: refs.__setitem__(number, weakref.ref(args[0]))
        )
    for loss in steps(model, optimizer, 12):
        first = min(optimizer.grass.active_layers)
        alive = [number for number in range(1, LAYERS) if refs[number]() is not None]
        assert all(number >= first for number in alive), (first, alive)
        assert set(range(max(first, 1), LAYERS)) <= set(alive), (first, alive)
        loss.backward()


def test_weights_are_those_without_checkpointing_to_the_bit():
    found = []
    for checkpointing in (False, True):
        model, optimizer = training(checkpointing, always_active=())
        for loss in steps(model, optimizer, 8):
            loss.backward()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
