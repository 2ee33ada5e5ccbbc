"""Adapters as a role, in one process: beside the layers that are drawn, against a run that is written out by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from grass_dist import (
    ConfigError,
    GrassConfig,
    GrassError,
    GrassOptimizer,
    UnsupportedModel,
    adapter_groups,
    add_adapters,
    merge_adapters,
)
from grass_dist.cli import app
from grass_dist.config import AdapterConfig
from grass_dist.model.adapters import adapter_parameters, lora_layers, merged_weights
from grass_dist.plan.choose import estimate
from grass_dist.plan.memory import states_of, weights_of
from grass_dist.plan.runs import PlannedRun, grass_config, methods_of, traversed, with_adapters
from grass_dist.plan.shape import shape_of_config
from grass_dist.plan.simulate import can_simulate
from grass_dist.plan.speeds import Speeds
from integration_tests.support.lora import LINEAR, SETTINGS, STEPS, lora, with_lora
from integration_tests.support.model import ADAMW, decay_groups, global_batch, small_llama
from integration_tests.support.parity import check_parity
from integration_tests.support.reference import run_reference
from integration_tests.support.training import train_grass
from tests.test_export import IDS, train
from tests.test_quantised import InBuffers
from tests.test_quantised import quantised as quantised_model
from tests.tiny import take_steps, tiny

peft = pytest.importorskip("peft")

ADAPTERS = SETTINGS["adapters"]
FEW = {"active_layers": 2, "probe_steps": 1, "sampling_interval": 2, "update_interval": 2}


@pytest.fixture(scope="module")
def reference():
    return run_reference(SETTINGS, STEPS, make=with_lora)


def optimizer_of(model: nn.Module, **settings: Any) -> GrassOptimizer:
    config = GrassConfig(**{**FEW, **settings})
    return GrassOptimizer(model, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}, config=config)


def randomized(model: nn.Module) -> nn.Module:
    """With adapters that add something."""
    for name, param in adapter_parameters(model):
        if "lora_B" in name:
            nn.init.normal_(param, std=0.2)
    return model


# Training.


def test_one_process_is_an_adamw_a_layer_and_one_of_adapters(reference):
    assert len(set(reference["active"][3:])) >= 3
    check_parity([train_grass(0, 1, "single", SETTINGS, STEPS)], reference)
    start = dict(with_lora().named_parameters())
    moved = [n for n, p in reference["params"].items() if "lora_" in n and not torch.equal(p, start[n])]
    assert len(moved) == 2 * 7 * 8  # both factors of each of the matrices


@pytest.mark.parametrize("offload", [{"mode": "stream"}, {"mode": "none"}, {"weights": "host"}], ids=str)
def test_wherever_states_and_weights_rest_the_run_is_the_same(reference, offload):
    check_parity([train_grass(0, 1, "single", {**SETTINGS, "offload": offload}, STEPS)], reference)


def test_layers_may_be_updated_in_the_backward():
    def run(early: bool) -> dict[str, torch.Tensor]:
        model = tiny()
        offload = {"mode": "stream", "update_in_backward": early}
        take_steps(model, optimizer_of(model, adapters={"rank": 2, "alpha": 4}, offload=offload), range(6))
        return model.state_dict()

    one, other = run(False), run(True)
    assert all(torch.equal(other[name], value) for name, value in one.items())


def test_the_optimizer_adds_them_as_a_group_of_their_own():
    model = tiny()
    optimizer = optimizer_of(model, adapters={"rank": 2, "alpha": 4, "learning_rate": 0.5})
    base, own = optimizer.param_groups
    assert (base["lr"], own["lr"], own["weight_decay"]) == (1e-2, 0.5, 0.1)
    assert list(map(id, own["params"])) == [id(p) for _, p in adapter_parameters(model)]
    assert len(own["params"]) == 2 * 2 * 8 and not {*map(id, own["params"])} & {*map(id, base["params"])}
    assert optimizer.grass.started.roles["adapters"][0] == "layers.0.up.lora_A.grass.weight"
    assert optimizer.grass.layers[0].numel == sum(p.numel() for p in tiny().layers[0].parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    take_steps(model, optimizer, range(1))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # the probe moves nothing
    take_steps(model, optimizer, range(1, 5))
    assert all(not torch.equal(p, before[n]) for n, p in adapter_parameters(model))


def test_groups_that_hold_adapters_alone_are_left_as_they_are():
    model = add_adapters(tiny(), config := GrassConfig(**FEW, adapters={"rank": 2, "alpha": 4, "learning_rate": 0.5}))
    groups = adapter_groups(model, config, decay_groups(model))
    assert [group.get("lr") for group in groups] == [None, None, 0.5] and groups[2]["weight_decay"] == 0.1
    assert adapter_groups(model, config, groups) == groups
    own = [{"params": [p], "lr": 0.25} for _, p in adapter_parameters(model)]
    rest = [p for p in model.parameters() if id(p) not in {id(group["params"][0]) for group in own}]
    assert adapter_groups(model, config, [{"params": rest}, *own]) == [{"params": rest}, *own]


def test_a_refused_model_is_left_without_adapters():
    model, before = tiny(), [n for n, _ in tiny().named_parameters()]
    with pytest.raises(ConfigError, match="active_layers"):
        optimizer_of(model, active_layers=9, adapters={"rank": 2, "alpha": 4})
    assert [n for n, _ in model.named_parameters()] == before and all(p.requires_grad for p in model.parameters())
    optimizer_of(model, adapters={"rank": 2, "alpha": 4})


def test_adapters_begin_alike_and_have_the_dtype_of_the_weights():
    config = GrassConfig(**FEW, adapters={"rank": 2, "alpha": 4})
    torch.manual_seed(1)
    one = add_adapters(small_llama(torch.bfloat16), config)
    drawn = torch.rand(1)
    torch.manual_seed(2)
    other = add_adapters(small_llama(torch.bfloat16), config)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16} and all(p.requires_grad for p in one.parameters())
    small_llama()  # seeds
    assert torch.equal(drawn, torch.rand(1))  # and adding them has drawn nothing from the generator of the process
    assert add_adapters(one, config) is one and len(list(lora_layers(one))) == 7 * 8


def test_a_target_names_modules_of_the_layers_alone():
    def targets(target: Any) -> set[str]:
        config = GrassConfig(**FEW, adapters={"rank": 2, "alpha": 4, "target": target})
        return {name for name, _ in lora_layers(add_adapters(small_llama(), config))}

    layers = range(8)
    assert targets("all-linear") == {n for n, m in small_llama().named_modules() if n.endswith("proj")}
    assert targets(["q_proj"]) == {f"model.layers.{i}.self_attn.q_proj" for i in layers}
    assert targets(["mlp.*", "self_attn.o_proj"]) == {
        f"model.layers.{i}.{n}"
        for i in layers
        for n in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")
    }


# A model that has adapters.


def peft_model(**more: Any) -> Any:
    torch.manual_seed(SETTINGS["seed"])
    model = small_llama()
    torch.manual_seed(SETTINGS["seed"])
    return peft.get_peft_model(model, lora(**more))


def groups_of(model: nn.Module) -> list[dict]:
    """As the reference has them."""
    first, second = decay_groups(model)
    added = {id(p) for _, p in adapter_parameters(model)}
    base = [p for p in first["params"] if id(p) not in added]
    own = [p for p in first["params"] if id(p) in added]
    return [{**first, "params": base}, second, {**first, "params": own, "lr": ADAPTERS["learning_rate"]}]


BESIDE = {
    **{name: value for name, value in SETTINGS.items() if name != "adapters"},
    "always_active": ("adapters", "embeddings", "final_norm", "lm_head"),
}


def test_a_peft_model_trains_its_weights_beside_its_adapters(reference, caplog):
    run = train_grass(0, 1, "single", BESIDE, STEPS, make=lambda *_: peft_model(), groups=groups_of)
    assert caplog.text.count("75 parameters that peft had frozen have requires_grad again") == 1
    plain = [(n.removeprefix("base_model.model.").replace(".default.", ".grass."), p) for n, p in run["params"].items()]
    run["params"] = dict(plain)
    check_parity([run], reference)


def test_without_the_role_adapters_are_what_is_drawn():
    model = peft_model()
    optimizer = optimizer_of(model)
    drawn = {id(p) for unit in optimizer.grass.layers for _, p in unit.params}
    assert drawn == {id(p) for _, p in adapter_parameters(model)} and not optimizer.grass.roles


def test_what_somebody_has_unfrozen_since_stays_as_it_is():
    model = peft_model()
    for layer in (1, 4, 5):
        model.base_model.model.model.layers[layer].requires_grad_(True)
    optimizer = optimizer_of(model, always_active=("adapters",))
    assert optimizer.grass.numbers == (1, 4, 5)


def test_modules_to_save_train_with_the_adapters():
    model = peft_model(modules_to_save=["lm_head"])
    optimizer = optimizer_of(model, always_active=("adapters", "lm_head"))
    assert [unit.name for unit in optimizer.grass.roles] == ["adapters"]
    assert any("modules_to_save" in name for name in optimizer.grass.started.roles["adapters"])
    (head,) = [p for n, p in model.named_parameters() if "original_module" in n]
    assert not head.requires_grad


@pytest.mark.parametrize("more", [{"use_dora": True}, {"use_rslora": True}], ids=str)
def test_dora_and_rslora_pass_through(more):
    model = peft_model(**more)
    optimizer = optimizer_of(model, always_active=("adapters",))
    for step in range(5):
        x = global_batch(step)
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        wanted = model(input_ids=x).logits
        plain = model.merge_and_unload()
        torch.testing.assert_close(plain(input_ids=x).logits, wanted, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name, _ in plain.named_parameters())


# Merging.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_is_what_peft_does(dtype):
    model = randomized(add_adapters(small_llama(dtype), GrassConfig(**FEW, adapters={"rank": 4, "alpha": 12})))
    x = global_batch(0)
    with torch.no_grad():
        wanted = model(input_ids=x).logits
        ours = merged_weights(model, model.state_dict())
        theirs = merge_adapters(copy.deepcopy(model))
        assert list(ours) == list(small_llama().state_dict()) == list(theirs.state_dict())
        close = {"atol": 1e-6, "rtol": 0} if dtype is torch.float32 else {"atol": 1e-2, "rtol": 0}
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours[name], value, **close)
        torch.testing.assert_close(
            theirs(input_ids=x).logits, wanted, atol=0.1 if dtype != torch.float32 else 1e-5, rtol=0
        )
    assert not hasattr(theirs, "peft_config")


def test_transposed_weights_are_merged_too():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=4, n_head=2, n_positions=32)).eval()
    names = list(model.state_dict())
    randomized(add_adapters(model, GrassConfig(**FEW, adapters={"rank": 4, "alpha": 8})))
    x = global_batch(0)
    with torch.no_grad():
        wanted = model(input_ids=x).logits
        whole = merged_weights(model, model.state_dict())
        merge_adapters(model)
        torch.testing.assert_close(model(input_ids=x).logits, wanted, atol=1e-5, rtol=0)
    assert list(whole) == names == list(model.state_dict())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(whole[name], value, atol=1e-6, rtol=0)


def test_a_checkpoint_is_exported_merged_or_apart(tmp_path):
    from transformers import AutoModelForCausalLM

    grass = GrassConfig(**FEW, adapters={"rank": 4, "alpha": 12, "learning_rate": 1e-2})
    run = train(tmp_path, (4,), grass=grass)
    for out, flags in (("merged", []), ("apart", ["--adapters"])):
        done = CliRunner().invoke(
            app, ["export", str(run.folder), str(tmp_path / out), "--max-shard-size", "50KB", *flags]
        )
        assert done.exit_code == 0, done.output
    with torch.no_grad():
        wanted = run.logits()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-5, rtol=0)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "apart")
        assert (base(input_ids=IDS).logits - wanted).abs().max() > 1e-2
        both = peft.PeftModel.from_pretrained(base, tmp_path / "apart" / "adapter")
        torch.testing.assert_close(both(input_ids=IDS).logits, wanted, atol=1e-6, rtol=0)
    files = load_file(tmp_path / "apart" / "adapter" / "adapter_model.safetensors")
    assert len(files) == 2 * len(list(lora_layers(run.model))) and not list((tmp_path / "merged").glob("adapter*"))


def test_a_checkpoint_without_adapters_keeps_none_apart(tmp_path):
    run = train(tmp_path, (2,))
    done = CliRunner().invoke(app, ["export", str(run.folder), str(tmp_path / "out"), "--adapters"])
    assert done.exit_code == 1 and "has no adapters (grass.adapters); leave --adapters out" in " ".join(
        done.output.split()
    )


# What is refused.


REFUSED = {
    "a rank above the smaller dimension": (
        {"rank": 9},
        r"adapters\.rank=9: layers\.0\.up has a weight of 16 x 8; use 8 or less",
    ),
    "a target that matches nothing": (
        {"target": ["q_proj"]},
        r"adapters\.target='q_proj': no linear module of the layers has that name",
    ),
    "an embedding": ({"target": ["embed"]}, r"adapters\.target='embed': no linear module of the layers"),
    "no target": ({"target": []}, r"adapters\.target=\[\]: it names no linear module"),
    "a rank of nothing": ({"rank": 0}, r"adapters\.rank=0"),
    "a rate that is none": ({"learning_rate": float("nan")}, r"adapters\.learning_rate=nan: it must be finite"),
    "dropout of all": ({"dropout": 1.0}, r"adapters\.dropout=1"),
    "an unknown setting": ({"ranks": 3}, r"adapters\.ranks=3: there is no such setting; did you mean 'rank'"),
}


@pytest.mark.parametrize(("given", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_section_that_cannot_work_is_one_sentence(given, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        optimizer_of(tiny(), adapters={"rank": 2, "alpha": 4, **given})
    assert "\n" not in str(caught.value)


def two_adapters() -> Any:
    model = peft_model()
    model.add_adapter("second", lora())
    return model


def quantised() -> Any:
    model = peft_model()
    for name, layer in lora_layers(model):
        if name.endswith("up_proj"):
            weight = layer.get_base_layer().weight
            layer.get_base_layer().weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    return model


def ia3() -> Any:
    given = {"target_modules": LINEAR, "feedforward_modules": []}
    return peft.get_peft_model(small_llama(), peft.IA3Config(**given))


MODELS = {
    "no adapters": (small_llama, ConfigError, "'adapters': the model has no adapters of peft; give a PeftModel"),
    "two adapters": (two_adapters, UnsupportedModel, r"has 2 adapters \(default, second\), and one can be a role"),
    "not LoRA": (ia3, UnsupportedModel, "The adapter default is IA3, and adapters that train beside"),
    "a quantised base": (
        quantised,
        UnsupportedModel,
        r"weights under the adapters are quantised \(.*up_proj is of torch.int8",
    ),
}


@pytest.mark.parametrize(("make", "kind", "sentence"), MODELS.values(), ids=MODELS)
def test_models_whose_adapters_cannot_be_a_role_are_refused(make, kind, sentence):
    with pytest.raises(kind, match=sentence):
        optimizer_of(make(), always_active=("adapters",))


def test_a_quantised_base_under_new_adapters_is_refused():
    gptq = quantised_model(InBuffers, torch.int32)
    with pytest.raises(UnsupportedModel, match=r"layers are quantised \(layers\.0\.up\.qweight is of torch\.int32\)"):
        optimizer_of(gptq, adapters={"rank": 2, "alpha": 4})
    model = tiny()
    model.layers[3].down.weight = nn.Parameter(model.layers[3].down.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModel, match=r"layers are quantised \(layers\.3\.down\.weight is of torch\.int8\)"):
        optimizer_of(model, adapters={"rank": 2, "alpha": 4})


def test_adapters_are_not_added_to_a_model_that_has_some():
    with pytest.raises(ConfigError, match=r"adapters of peft already \(default\); leave grass\.adapters out and list"):
        optimizer_of(peft_model(), adapters={"rank": 2, "alpha": 4})


def test_a_model_with_adapters_of_another_rank_is_refused():
    model = add_adapters(tiny(), GrassConfig(**FEW, adapters={"rank": 2, "alpha": 4}))
    with pytest.raises(ConfigError, match=r"adapters\.rank=4: the model was given adapters of rank=2 by add_adapters"):
        optimizer_of(model, adapters={"rank": 4, "alpha": 4})


def test_base_weights_that_are_not_passed_are_missed():
    model = peft_model()
    mine = [p for p in model.parameters() if p.requires_grad]
    config = GrassConfig(**FEW, always_active=("adapters",))
    with pytest.raises(GrassError, match="has a parameter to train; leave requires_grad on"):
        GrassOptimizer(model, torch.optim.AdamW, ADAMW, config=config, params=mine)


# What is planned.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_counts_weights_and_states_of_a_run(dtype):
    model = small_llama(getattr(torch, dtype))
    config = {**FEW, "adapters": {"rank": 4, "alpha": 8}, "offload": {"mode": "none"}}
    optimizer = optimizer_of(model, **config)
    for step in range(6):  # the layers of three rounds
        x = global_batch(step)
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    run = PlannedRun(
        gpus=1, gpus_per_host=1, gpu_bytes=1e9, seq_len=16, backend="single", dtype=dtype, offload="none", adapters=4
    )
    plain = shape_of_config("small", small_llama().config)
    method = next(m for m in methods_of(plain, run) if (m.name, m.active_layers) == ("grass", 2))
    shape = with_adapters(plain, run, method)
    assert method.label == "GRASS γ=2 + adapters r=4"
    assert weights_of(shape, run, method) == sum(p.nbytes for p in model.parameters())
    never = [unit for i, unit in enumerate(optimizer.grass.layers) if i in optimizer.grass.never_trained]
    lacking = sum(unit.numel for unit in never) * run.bytes_of_state
    steps = 4 * sum(1 for p in model.parameters())
    assert 0 <= optimizer.state_bytes - (states_of(shape, run, method)[0] - lacking) <= steps
    assert traversed(shape, method) == 1.0 and not can_simulate(run, method)
    assert grass_config(run, method).adapters == AdapterConfig(rank=4, alpha=8)
    plans = [estimate(plain, r, m, Speeds()) for r in (run, replace(run, adapters=0)) for m in methods_of(plain, r)]
    half = len(plans) // 2
    for with_, without in zip(plans[:half], plans[half:], strict=True):
        more = with_.method.name == "grass"
        assert (with_.memory.total > without.memory.total, with_.time.compute > without.time.compute) == (more, more)


def test_a_planned_rank_that_fits_no_weight_is_refused():
    run = PlannedRun(gpus=1, gpus_per_host=1, gpu_bytes=1e9, seq_len=16, backend="single", adapters=33)
    shape = shape_of_config("small", small_llama().config)
    with pytest.raises(ConfigError, match=r"--adapters=33: small has a weight of 32 x 64 in a layer; use 32 or less"):
        estimate(shape, run, methods_of(shape, run)[-1], Speeds())
