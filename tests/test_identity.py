"""Two models or data sets that differ have identities that differ, and the same ones have the same."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from grass_dist.finetune.data.batches import Examples
from grass_dist.finetune.identity import SAMPLE, data_identity, model_identity, versions
from tests.tiny import Tiny, tiny

CONFIG, WEIGHTS = "configuration of the model", "weights of the model (a sample)"
NUMBER, SHAPES = "number of parameters", "names, shapes and dtypes of the parameters"


class Config:
    """As of Hugging Face: what `to_dict` gives."""

    def __init__(self, **settings) -> None:
        self.settings = settings

    def to_dict(self) -> dict:
        return dict(self.settings)


def with_config(**settings) -> Tiny:
    model = tiny()
    model.config = Config(**settings)
    return model


def differs(one: nn.Module, other: nn.Module) -> set[str]:
    """The entries in which their identities differ."""
    first, second = model_identity(one), model_identity(other)
    assert first.keys() == second.keys() == {NUMBER, SHAPES, CONFIG, WEIGHTS}
    return {name for name in first if first[name] != second[name]}


def test_a_model_equals_itself_wherever_it_was_loaded_from():
    inner = {"width": 8, "_name_or_path": "elsewhere"}
    one = with_config(hidden=8, labels={0: "no"}, text_config=inner, _name_or_path="here", transformers_version="5.1")
    other = with_config(text_config={"width": 8}, labels={0: "no"}, hidden=8, _commit_hash="12ab")
    assert differs(one, other) == set()
    assert int(model_identity(one)[NUMBER]) == sum(p.numel() for p in one.parameters())


def test_another_seed_is_found_in_the_weights_alone():
    torch.manual_seed(1)
    assert differs(tiny(), Tiny()) == {WEIGHTS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_changed_weight_of_the_sample_is_found(dtype):
    one, other = tiny(dtype, width=64), tiny(dtype, width=64)
    weight = other.layers[3].up.weight
    stride = weight.numel() // SAMPLE
    assert stride > 1
    with torch.no_grad():
        weight.view(-1)[1] += 1
        assert differs(one, other) == set()  # a sample, not all of them
        weight.view(-1)[7 * stride] = torch.nextafter(weight.view(-1)[7 * stride], torch.tensor(9.0, dtype=dtype))
    assert differs(one, other) == {WEIGHTS}


def test_the_sign_of_a_zero_is_found():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    for model, value in ((one, 0.0), (other, -0.0)):
        nn.init.constant_(model.weight, value)
        nn.init.zeros_(model.bias)
    assert differs(one, other) == {WEIGHTS}


def test_another_dtype_and_another_shape_are_found():
    assert differs(tiny(), tiny(torch.bfloat16)) == {SHAPES, WEIGHTS}
    assert differs(tiny(), tiny(layers=7)) == {NUMBER, SHAPES, WEIGHTS}
    one, other = nn.Linear(4, 8), nn.Linear(8, 4)
    assert SHAPES in differs(one, other)


def test_tied_weights_count_once_and_are_told_from_untied_ones():
    tied = tiny()
    tied.head.weight = tied.embed.weight
    untied = tiny()
    with torch.no_grad():
        untied.head.weight.copy_(untied.embed.weight)
    assert differs(tied, untied) == {NUMBER, SHAPES, WEIGHTS}
    again = tiny()
    again.head.weight = again.embed.weight
    assert differs(tied, again) == set()


def test_another_configuration_is_found():
    assert differs(with_config(rope_theta=1e4), with_config(rope_theta=1e6)) == {CONFIG}
    assert differs(with_config(text={"layers": [1, 2]}), with_config(text={"layers": [1, 3]})) == {CONFIG}
    assert differs(tiny(), with_config(hidden=8)) == {CONFIG}


def test_settings_unknown_to_json_are_the_same_in_every_process():
    one = with_config(dtype=torch.bfloat16, names={"b", "a", "c"}, extra=object())
    assert differs(one, with_config(dtype=torch.bfloat16, names={"c", "a", "b"}, extra=object())) == set()
    assert differs(one, with_config(dtype=torch.float16, names={"a", "b", "c"}, extra=object())) == {CONFIG}


def test_a_real_configuration():
    from transformers import LlamaConfig

    one, other = tiny(), tiny()
    one.config, other.config = LlamaConfig(name_or_path="here"), LlamaConfig(name_or_path="there")
    assert differs(one, other) == set()
    other.config.rms_norm_eps = 1e-3
    assert differs(one, other) == {CONFIG}


def test_parameters_that_zero3_shards_are_counted_but_not_read():
    whole, sharded = tiny(), tiny()
    for parameter in sharded.parameters():
        parameter.ds_id, parameter.ds_shape, parameter.ds_numel = 1, parameter.shape, parameter.numel()
        parameter.data = torch.empty(0)
    assert differs(whole, sharded) == {WEIGHTS}
    again = tiny(torch.float32)
    for parameter in again.parameters():
        parameter.ds_id, parameter.ds_shape, parameter.ds_numel = 1, parameter.shape, parameter.numel()
        parameter.data = torch.ones(3)
    assert differs(sharded, again) == set()


def test_weights_of_any_layout_and_size_can_be_read():
    model = nn.Module()
    model.turned = nn.Parameter(torch.arange(1200.0).reshape(30, 40).t())
    model.scalar, model.empty = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.empty(0, 3))
    model.meta = nn.Parameter(torch.empty(5, device="meta"))
    same = nn.Module()
    same.turned = nn.Parameter(torch.arange(1200.0).reshape(30, 40).t().contiguous())
    same.scalar, same.empty = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.empty(0, 3))
    same.meta = nn.Parameter(torch.empty(5, device="meta"))
    assert differs(model, same) == set()


def test_a_large_model_takes_milliseconds():
    model = nn.ModuleList(nn.Linear(1000, 1000) for _ in range(60))
    began = time.perf_counter()
    model_identity(model)
    assert time.perf_counter() - began < 1  # 240 MB; some ms on an idle machine


def test_data_are_told_apart_by_tokens_order_and_bounds():
    one, two = {"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3], "labels": [3]}
    data = Examples([one, two])
    assert data_identity(data) == data_identity(Examples([one, two])) and len(data.digest()) == 64
    assert set(data_identity(data)) == {"number of training examples", "training examples"}
    others = [
        Examples([two, one]),
        Examples([one]),
        Examples([{"input_ids": [1], "labels": [-100]}, {"input_ids": [2, 3], "labels": [2, 3]}]),
        Examples([{"input_ids": [1, 2], "labels": [2, -100]}, two]),
        Examples([{**e, "position_ids": list(range(len(e["input_ids"])))} for e in (one, two)]),
        Examples(),
    ]
    assert len({e.digest() for e in [data, *others]}) == 7
    assert data_identity(others[0], "held-out examples")["number of held-out examples"] == "2"


def test_versions():
    found = versions()
    assert found["version of torch"].startswith(torch.__version__.split("+")[0])
    assert "version of deepspeed" not in found and "version of deepspeed" in versions(deepspeed=True)
    names = {name.removeprefix("version of ") for name in found}
    assert names == {"torch", "transformers", "datasets", "numpy", "safetensors", "grass-dist", "python"}


def test_prompts_with_the_day_in_them_are_no_other_examples():
    def examples(day: int, answer: int, dated: bool) -> Examples:
        made = Examples([{"input_ids": [1, *[day] * day, answer, 2], "labels": [-100] * (day + 1) + [answer, 2]}])
        made.dated = dated
        return made

    monday, tuesday = (data_identity(examples(day, 7, True)) for day in (3, 4))
    assert monday == tuesday != data_identity(examples(4, 8, True))
    assert data_identity(examples(3, 7, False)) != data_identity(examples(4, 7, False))
