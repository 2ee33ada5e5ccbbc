"""The DeepSpeed JSON of launch/finetune.py: what of it is filled in, and what is refused because our YAML differs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from grass_dist.config import GrassConfig
from grass_dist.errors import ConfigError
from grass_dist.finetune.config import RunConfig, TrainConfig
from grass_dist.finetune.config_file import dump_config, load_config
from grass_dist.finetune.deepspeed_config import check, fill, merge_grass, read_ds_config

TRAIN = TrainConfig(
    max_steps=10, global_batch_size=8, micro_batch_size=2, learning_rate=1e-4, weight_decay=0.01, clip_grad_norm=1.0
)
AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "zero_optimization": {"stage": 2},
    "grass": "auto",
}
FILLED: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale": 0},
    "zero_optimization": {"stage": 2},
}


def filled(ds_config: dict[str, Any], train: TrainConfig = TRAIN, dtype: str = "bfloat16") -> dict[str, Any]:
    """The JSON as DeepSpeed gets it, without the block of GRASS; ``ds_config`` itself must stay as it was."""
    before = copy.deepcopy(ds_config)
    try:
        result = fill(ds_config, train, GrassConfig(active_layers=3), accumulation=2, dtype=dtype)
    finally:
        assert ds_config == before
    assert check(result).grass == GrassConfig(active_layers=3)
    return {key: value for key, value in result.items() if key != "grass"}


def refusal(call: Any, *args: Any, **kwargs: Any) -> str:
    """The one sentence with which ``call`` is refused."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 400
    return text


def merged(*keys: str, **changes: Any) -> dict[str, Any]:
    """`AUTO` without ``keys`` and with ``changes``."""
    return {k: v for k, v in copy.deepcopy(AUTO).items() if k not in keys} | changes


def test_auto_is_the_value_of_the_yaml():
    assert filled(AUTO) == FILLED


def test_what_is_left_out_is_the_value_of_the_yaml():
    assert filled({}) == {k: v for k, v in FILLED.items() if k not in ("fp16", "zero_optimization")} | {
        "fp16": {"enabled": False}
    }


def test_equal_values_may_stand_in_both():
    assert filled(merged(gradient_clipping=1, train_batch_size=8, bf16={"enabled": True})) == FILLED | {
        "gradient_clipping": 1
    }


def test_no_clipping_is_zero_and_fp32_is_neither():
    train = TRAIN.model_copy(update={"clip_grad_norm": None})
    off = {"bf16": {"enabled": False}, "gradient_clipping": 0.0}
    assert filled(AUTO, train, "float32") == FILLED | off


def test_the_older_name_of_bf16():
    assert filled(merged("bf16", bfloat16={"enabled": "auto"}))["bfloat16"] == {"enabled": True}


def test_any_other_auto_is_left_to_deepspeed():
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "overlap_comm": True}
    assert filled(merged(zero_optimization=zero, steps_per_print="auto")) == FILLED | {
        "zero_optimization": {"stage": 3, "overlap_comm": True}
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gradient_clipping": 0.5},
            "parallel.config.gradient_clipping=0.5: train.clip_grad_norm is 1.0; "
            'write "auto" there, or make the two equal.',
        ),
        ({"train_batch_size": 16}, "parallel.config.train_batch_size=16: train.global_batch_size is 8; "),
        (
            {"train_micro_batch_size_per_gpu": 1},
            "parallel.config.train_micro_batch_size_per_gpu=1: train.micro_batch_size is 2; ",
        ),
        (
            {"gradient_accumulation_steps": 4},
            "parallel.config.gradient_accumulation_steps=4: train.global_batch_size=8 takes 2 here; ",
        ),
        ({"bf16": {"enabled": False}}, "parallel.config.bf16.enabled=False: the weights are bfloat16 (model.dtype); "),
        ({"fp16": {"enabled": True}}, "parallel.config.fp16.enabled=True: the weights are bfloat16 (model.dtype); "),
        ({"bf16": True}, 'parallel.config.bf16=True: it must be a section; write {"enabled": "auto"}.'),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}},
            "parallel.config.optimizer.params.lr=0.0003: train.learning_rate is 0.0001; ",
        ),
        (
            {"optimizer": {"type": "Lion", "params": {}}},
            "parallel.config.optimizer.type='Lion': this program trains with AdamW; ",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}},
            "parallel.config.optimizer.params.amsgrad=True: the optimizer is torch.optim.AdamW, ",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            "parallel.config.scheduler={'type': 'WarmupLR'}: the learning rate follows train.schedule ",
        ),
        ({"zero_optimization": {"stage": 4}}, "parallel.config.zero_optimization.stage=4: there is no such stage"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "parallel.config.zero_optimization.offload_param.device='nvme': DeepSpeed moves what trains to host memory",
        ),
    ],
)
def test_neither_wins_without_a_word(changes, message):
    assert refusal(filled, merged(**changes)).startswith(message)


@pytest.mark.parametrize(
    "section",
    [
        {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        {"type": "adamw", "params": {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}},
        {"type": "AdamW", "params": {"torch_adam": True, "adam_w_mode": True}},
        {"type": "auto"},
        "auto",
    ],
)
def test_an_optimizer_that_is_ours_is_taken_out(section):
    assert filled(merged(optimizer=section)) == FILLED


# The block


@pytest.mark.parametrize(
    ("block", "given", "result"),
    [
        (None, None, None),
        (None, {"active_layers": 2}, {"active_layers": 2}),
        ({"active_layers": 2}, None, {"active_layers": 2}),
        ({}, None, {}),
        ({"active_layers": 2, "probe_steps": "auto"}, {"probe_steps": 3}, {"active_layers": 2, "probe_steps": 3}),
        ({"active_layers": 2, "always_active": []}, {"active_layers": 2, "always_active": ()}, None),
    ],
)
def test_the_block_may_stand_in_either(block, given, result):
    got = merge_grass({} if block is None else {"grass": block}, given)
    assert got == (given if result is None else result)


def test_the_block_must_not_say_two_things():
    assert refusal(merge_grass, {"grass": {"active_layers": 4}}, {"active_layers": 2}) == (
        'grass.active_layers=2: the DeepSpeed JSON has 4; change one, or write "active_layers": "auto" there.'
    )


def write(folder: Path, ds_config: Any, **settings: Any) -> Path:
    (folder / "ds.json").write_text(ds_config if isinstance(ds_config, str) else json.dumps(ds_config))
    run = {"model": {"name": "m"}, "data": {"name": "d.jsonl", "prompt": "q", "completion": "a"}}
    run |= {"train": {"max_steps": 30}, "parallel": {"backend": "deepspeed", "config": "ds.json"}, **settings}
    (folder / "run.yaml").write_text(json.dumps(run))  # YAML too
    return folder / "run.yaml"


@pytest.mark.parametrize("grass", ["auto", None])
def test_a_json_without_block(tmp_path, grass):
    file = write(tmp_path, {"grass": grass}, grass={"active_layers": 2})
    assert "grass" not in read_ds_config(tmp_path / "ds.json")
    assert load_config(file).grass == GrassConfig(active_layers=2)
    assert refusal(load_config, write(tmp_path, {"grass": grass})).startswith("grass=None: this setting is required")


@pytest.mark.parametrize(
    ("ds_config", "message"),
    [
        ({"grass": False}, "parallel.config.grass=False: this program trains by GRASS"),
        ({"grass": 4}, "parallel.config.grass=4: this program trains by GRASS"),
        ({"grss": {}}, "parallel.config.grss={}: "),
        ({"zero_optimization": {"grass": {}}}, "parallel.config.zero_optimization.grass={}: the block stands inside"),
        ({"grass": {"active_layer": 2}}, "grass.active_layer=2: there is no such setting; did you mean"),
        ("{", "parallel.config='"),
        ("[]", "parallel.config='"),
    ],
)
def test_a_json_that_cannot_be_meant(tmp_path, ds_config, message):
    assert refusal(load_config, write(tmp_path, ds_config)).startswith(message)


# The YAML


def test_three_ways_to_name_it(tmp_path):
    long = load_config(write(tmp_path, {"grass": {}}))
    assert long.parallel.config == str(tmp_path / "ds.json")
    dotted = {"parallel": "deepspeed", "parallel.config": "ds.json"}
    assert load_config(write(tmp_path, {"grass": {}}, **dotted)) == long
    file = write(tmp_path, {"grass": {}}, parallel="fsdp2")
    assert load_config(file, ["parallel=deepspeed", "parallel.config=ds.json"]) == long
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "config.yaml").write_text(dump_config(long))
    assert load_config(tmp_path / "again" / "config.yaml") == long


def test_it_lies_beside_the_yaml_or_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "yaml").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    file = write(tmp_path / "yaml", {"grass": {"active_layers": 1}})
    (tmp_path / "here" / "ds.json").write_text('{"grass": {"active_layers": 2}}')
    assert load_config(file).grass.active_layers == 1
    (tmp_path / "yaml" / "ds.json").unlink()
    assert load_config(file).grass.active_layers == 2
    (tmp_path / "here" / "ds.json").unlink()
    assert refusal(load_config, file).startswith("parallel.config='ds.json': there is no such file in ")


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ("deepspeed", "parallel.config=None: backend=deepspeed needs one; give the path of a DeepSpeed JSON"),
        ({"backend": "fsdp2", "config": "ds.json"}, "parallel.config='ds.json': backend=fsdp2 reads no JSON"),
        ({"backend": "deepspeed", "config": 3}, "parallel.config=3: this value cannot be used"),
        (
            {"backend": "deepspeed", "config": "ds.json", "mesh": {"replicate": 2}},
            "parallel.mesh={'replicate': 2}: backend=deepspeed does not use it; leave it out",
        ),
    ],
)
def test_the_setting_is_for_deepspeed_alone(tmp_path, parallel, message):
    file = write(tmp_path, {"grass": {}}, parallel=parallel, grass={})
    assert refusal(load_config, file).startswith(message)


def test_a_run_without_deepspeed_is_what_it_was(tmp_path):
    file = write(tmp_path, "no JSON", parallel="ddp", grass={"active_layers": 2})
    config = load_config(file)
    assert isinstance(config, RunConfig) and config.parallel.model_dump() == {
        "backend": "ddp",
        "mesh": {"replicate": 1, "shard": None},
        "config": None,
    }
