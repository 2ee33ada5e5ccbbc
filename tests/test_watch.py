"""Active layers that get no gradient: found in the first step of a probe and of each round, and what is no mistake."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import grass_dist
from grass_dist import GrassConfig, GrassError, GrassOptimizer
from tests.tiny import Tiny, loss_of, take_steps, tiny

WAYS_OUT = "use_reentrant=False .* or call model.enable_input_require_grads"


def optimizer_of(model: nn.Module, **settings: Any) -> GrassOptimizer:
    """With a probe, unless a sampler is named."""
    probe = 0 if "sampler" in settings else 2
    defaults = {"active_layers": 2, "sampling_interval": 2, "update_interval": 2, "probe_steps": probe}
    return GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2}, config=GrassConfig(**{**defaults, **settings}))


def wrapped(impl: CheckpointImpl, model: Tiny | None = None) -> nn.Module:
    model = tiny() if model is None else model
    model.layers = nn.ModuleList(checkpoint_wrapper(layer, impl) for layer in model.layers)
    return model


class CallsCheckpoint(Tiny):
    """A model that checkpoints its layers by itself, as those of transformers do."""

    reentrant = True

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


@pytest.mark.parametrize("make", [lambda: wrapped(CheckpointImpl.REENTRANT), CallsCheckpoint], ids=["wrapper", "call"])
def test_layers_that_reentrant_checkpointing_cuts_off_end_a_run(make):
    model = make()
    optimizer = optimizer_of(model, sampler="uniform", always_active=["final_norm", "lm_head"])
    before = [p.detach().clone() for p in model.parameters()]
    names = " and ".join(f"layers.{layer}" for layer in optimizer.grass.active_layers).replace(" and ", ", ")
    said = rf"^2 active layers \({names}\) have no gradient after the backward of step 1, .*{WAYS_OUT}"
    loss_of(model, 0).backward()
    with pytest.raises(GrassError, match=said):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_clipping_says_it_first():
    model = wrapped(CheckpointImpl.REENTRANT)
    optimizer = optimizer_of(model, sampler="uniform", always_active=["lm_head"])
    loss_of(model, 0).backward()
    with pytest.raises(GrassError, match=WAYS_OUT):
        optimizer.clip_grad_norm_(1.0)


@pytest.mark.parametrize("make", [lambda: wrapped(CheckpointImpl.REENTRANT), CallsCheckpoint], ids=["wrapper", "call"])
@pytest.mark.parametrize("settings", [{}, {"sampler": "uniform", "always_active": []}], ids=["probe", "layers only"])
def test_without_any_gradient_the_sentence_precedes_torchs_error(make, settings):
    model = make().train()
    held = optimizer_of(model, **settings)
    with pytest.raises(GrassError, match=rf"active layers \(layers\..* have run, and nothing .*{WAYS_OUT}"):
        loss_of(model, 0).backward()
    assert held.grass.step == 0


def needs_gradients(module: nn.Module, _: object, output: torch.Tensor) -> None:
    output.requires_grad_(True)


@pytest.mark.parametrize("how", ["not reentrant", "inputs need gradients", "embeddings train"])
def test_checkpointing_that_cuts_nothing_off_trains_as_without(how):
    model = wrapped(CheckpointImpl.NO_REENTRANT if how == "not reentrant" else CheckpointImpl.REENTRANT)
    settings: dict[str, Any] = {"always_active": ["final_norm", "lm_head"]}
    if how == "inputs need gradients":
        model.embed.register_forward_hook(needs_gradients)
    if how == "embeddings train":
        settings = {"sampler": "uniform"}
    plain = tiny()
    ours, theirs = optimizer_of(model, **settings), optimizer_of(plain, **settings)
    take_steps(model, ours, range(12))
    take_steps(plain, theirs, range(12))
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert ours.grass.unused == {}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_transformers(reentrant):
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16}

    def trained(checkpointing: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, use_cache=False, **sizes)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        optimizer = optimizer_of(model, always_active=["final_norm", "lm_head"])
        for step in range(8):
            ids = torch.randint(0, 16, (2, 8), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, trained(True), trained(False)))


class Leaves(Tiny):
    """Leaves layers out of its forward."""

    out: tuple[int, ...] = ()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for index, layer in enumerate(self.layers):
            x = x if index in self.out else layer(x)
        return self.head(self.norm(x))


def test_a_layer_that_the_model_leaves_out_is_reported_once(caplog):
    torch.manual_seed(0)
    model = Leaves()
    optimizer = optimizer_of(model, sampler="fixed", fixed_layers=[1, 5])
    model.out = (5,)
    take_steps(model, optimizer, range(6))
    assert optimizer.grass.unused == {5: 3}  # once in each round
    told = [message for message in caplog.messages if "left it out" in message]
    assert told == [
        "layers.5 is active and has no gradient in step 1, since the model left it out; such steps are counted in "
        "`unused`."
    ]
    again = optimizer_of(Leaves(), sampler="fixed", fixed_layers=[1, 5])
    again.load_state_dict(optimizer.state_dict())
    assert again.grass.unused == {5: 3}


class SkipsItself(nn.Module):
    """Stochastic depth within a layer: it does not compute, or its result is not used."""

    def __init__(self, block: nn.Module, how: str) -> None:
        super().__init__()
        self.block, self.how = block, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "skips":
            return x
        result = self.block(x)
        return x if self.how == "drops" else result


@pytest.mark.parametrize("how", ["skips", "drops"])
def test_a_layer_that_leaves_itself_out_is_counted(how):
    model = tiny()
    model.layers = nn.ModuleList(SkipsItself(layer, how if i == 5 else "") for i, layer in enumerate(model.layers))
    optimizer = optimizer_of(model, sampler="fixed", fixed_layers=[1, 5])
    take_steps(model, optimizer, range(2))
    assert optimizer.grass.unused == {5: 1}


def test_a_model_whose_active_layers_lead_nowhere_ends_the_run():
    model = tiny()
    model.layers = nn.ModuleList(SkipsItself(layer, "drops") for layer in model.layers)
    optimizer = optimizer_of(model, sampler="uniform", always_active=["lm_head"])
    with pytest.raises(GrassError, match="have no gradient after the backward of step 1"):
        take_steps(model, optimizer, range(1))


def test_a_model_in_eval_mode_that_is_cut_off_is_told_as_well():
    model = wrapped(CheckpointImpl.REENTRANT).eval()
    held = optimizer_of(model, sampler="uniform", always_active=[])
    with pytest.raises(GrassError, match=WAYS_OUT):
        loss_of(model, 0).backward()
    assert held.grass.step == 0


def test_each_round_is_looked_at():
    torch.manual_seed(0)
    model = CallsCheckpoint()
    model.reentrant = False
    optimizer = optimizer_of(model, sampler="uniform", always_active=["lm_head"])
    take_steps(model, optimizer, range(3))
    model.reentrant = True
    take_steps(model, optimizer, range(3, 4))  # it is the first step that is looked at
    with pytest.raises(GrassError, match=rf"of step 5, .*{WAYS_OUT}"):
        take_steps(model, optimizer, range(4, 5))


def test_a_step_without_a_backward_is_not_the_one_watched():
    model = wrapped(CheckpointImpl.REENTRANT)
    optimizer = optimizer_of(model, sampler="uniform", always_active=["lm_head"])
    with torch.no_grad():
        loss_of(model, 0)
    model.eval()
    optimizer.step()
    model.train()
    loss_of(model, 0).backward()
    with pytest.raises(GrassError, match=rf"of step 2, .*{WAYS_OUT}"):
        optimizer.step()


def test_an_evaluation_says_nothing():
    model = wrapped(CheckpointImpl.REENTRANT)
    optimizer = optimizer_of(model, sampler="uniform", always_active=[])
    for training in (True, False):
        with torch.no_grad():
            loss_of(model.train(training), 0)
    assert optimizer.grass.step == 0


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_hooks_are_on_the_modules_in_watched_steps_alone():
    model = tiny()
    optimizer = optimizer_of(model)
    counts = []
    for step in range(8):
        counts.append(hooks_on(model))
        take_steps(model, optimizer, range(step, step + 1))
    # Two on the model, and one on each of the three modules of a layer: of all layers in the probe, then of two.
    assert counts == [2 + 3 * 8, 0, 2 + 3 * 2, 0, 2 + 3 * 2, 0, 2 + 3 * 2, 0]


def test_a_copy_of_the_model_has_hooks_that_do_nothing():
    model = wrapped(CheckpointImpl.REENTRANT)
    optimizer = optimizer_of(model, sampler="uniform", always_active=[])
    twin = copy.deepcopy(model)
    loss_of(twin.train(), 0)
    assert not any(isinstance(hook, GrassOptimizer) for hook in vars(twin).values()) and optimizer.grass.step == 0


@pytest.mark.parametrize("how", ["layers", "model"])
def test_compiled_layers_are_cut_off_if_twice_without_gradient(how, caplog):
    model = CallsCheckpoint()
    compiled = torch.compile(model, backend="eager") if how == "model" else model
    if how == "layers":
        for layer in model.layers:
            layer.compile(backend="eager")
    optimizer = optimizer_of(compiled, sampler="uniform", always_active=["lm_head"])
    assert hooks_on(model) == (0 if how == "model" else 2)
    take_steps(model, optimizer, range(2))  # what runs compiled is another test's matter
    told = [message for message in caplog.messages if "left out or cut off" in message]
    assert len(told) == 2 and all("use_reentrant=False" in message for message in told)
    loss_of(model, 2).backward()
    with pytest.raises(GrassError, match=WAYS_OUT):
        optimizer.step()


def test_compiled_layers_left_out_once_do_not_end_the_run():
    model = Leaves()
    for layer in model.layers:
        layer.compile(backend="eager")
    optimizer = optimizer_of(model, sampler="fixed", fixed_layers=[1, 5])
    model.out = (1, 5)
    take_steps(model, optimizer, range(1))
    model.out = ()
    take_steps(model, optimizer, range(1, 3))
    model.out = (1, 5)
    take_steps(model, optimizer, range(3, 4))
    assert optimizer.grass.unused == {1: 1, 5: 1}


def test_what_was_left_out_is_in_a_checkpoint(tmp_path):
    model = Leaves()
    optimizer = optimizer_of(model, sampler="fixed", fixed_layers=[1, 5])
    model.out = (5,)
    take_steps(model, optimizer, range(3))
    grass_dist.save_checkpoint(tmp_path, optimizer, 3)
    again = optimizer_of(Leaves(), sampler="fixed", fixed_layers=[1, 5])
    found = grass_dist.load_checkpoint(tmp_path, again)
    assert found is not None and found[0] == 3 and again.grass.unused == optimizer.grass.unused == {5: 2}


def test_an_older_release_did_not_note_which_layers_trained():
    optimizer = optimizer_of(tiny(), sampler="cyclic", active_layers=3)
    take_steps(optimizer._model, optimizer, range(4))
    state = optimizer.state_dict()
    del state["grass"]["trained"]
    again = optimizer_of(tiny(), sampler="cyclic", active_layers=3)
    again.load_state_dict(state)
    assert again.grass.never_trained == ()


def test_layers_that_have_not_trained_are_known():
    model = tiny()
    optimizer = optimizer_of(model, sampler="cyclic", active_layers=3)
    take_steps(model, optimizer, range(4))
    assert optimizer.grass.never_trained == (6, 7)
    again = optimizer_of(tiny(), sampler="cyclic", active_layers=3)
    assert again.grass.never_trained == tuple(range(8))
    again.load_state_dict(optimizer.state_dict())
    assert again.grass.never_trained == (6, 7)
