"""A configuration that was written to a file and read again does what it did before: it acts by its values alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grass_dist.backends.zero.ds_config import ZeroSetup
from grass_dist.config import GrassConfig, OffloadConfig
from grass_dist.errors import ConfigError
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.config_file import dump_config, load_config
from grass_dist.finetune.deepspeed_config import check, fill, read_ds_config
from grass_dist.finetune.run_torch import _early_updates
from grass_dist.ranks import Ranks
from grass_dist.states.plan import Plan, make_plan

CONFIGS = Path(__file__).parents[1] / "configs"
ZERO = sorted(CONFIGS.glob("zero*_grass.json"))
NOT_WRITTEN = object()
SIZES = [(2000, 1000)] * 4


def plan(grass: GrassConfig, fallback: str | None) -> Plan | str:
    """Of four layers whose states fit anywhere, or the error."""
    try:
        return make_plan(Ranks(), grass, SIZES, 500, torch.device("cpu"), fallback=fallback)
    except ConfigError as error:
        return str(error)


def deeds(config: RunConfig) -> dict[str, Any]:
    """The plans for states that can and cannot move, when layers are updated, and the settings of ZeRO."""
    setup: ZeroSetup | None = None
    grass = config.grass
    if (file := config.parallel.config) is None:
        grass = _early_updates(config)
    else:
        accumulation = config.train.global_batch_size // config.train.micro_batch_size
        setup = check(
            fill(read_ds_config(Path(file)), config.train, grass, accumulation=accumulation, dtype="bfloat16")
        )
        assert setup.grass == grass
    return {
        "plans": [plan(grass, fallback) for fallback in (None, "this class says nothing")],
        "in backward": bool(grass.offload.update_in_backward),
        "zero": setup,
    }


def reloaded(config: RunConfig, folder: Path) -> RunConfig:
    (folder / "dumped.yaml").write_text(dump_config(config))
    return load_config(folder / "dumped.yaml")


def sections(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Settings some of which are written, among them some by their defaults."""
    given = st.fixed_dictionaries({name: values | st.just(NOT_WRITTEN) for name, values in fields.items()})
    return given.map(lambda found: {name: value for name, value in found.items() if value is not NOT_WRITTEN})


OFFLOAD = sections(
    mode=st.sampled_from(["stream", "interval", "none", "auto", None]),
    prefetch_steps=st.integers(0, 3),
    slots=st.integers(2, 4),
    update_in_backward=st.sampled_from([None, False, True]),
    host_dtype=st.sampled_from([None, "bfloat16"]),
    folder=st.sampled_from([None, "/scratch"]),
)
GRASS = sections(
    active_layers=st.integers(1, 4),
    sampling_interval=st.integers(1, 60),
    draw_ahead=st.none() | st.integers(0, 2),
    probe_steps=st.none() | st.integers(0, 8),
    sampler=st.sampled_from(["grass", "uniform", "cyclic"]),
    always_active=st.sampled_from([[], ["lm_head"], ["embeddings", "final_norm", "lm_head"]]),
    offload=OFFLOAD,
)
TRAIN = sections(
    global_batch_size=st.sampled_from([8, 16]),
    micro_batch_size=st.sampled_from([1, 2]),
    clip_grad_norm=st.none() | st.sampled_from([0.5, 1.0]),
    betas=st.just([0.9, 0.95]),
    checkpoint=st.none() | sections(**{"every": st.integers(0, 9), "async": st.booleans()}),
)
BACKENDS = st.sampled_from(
    ["fsdp2", "ddp", "single", *({"backend": "deepspeed", "config": str(file)} for file in ZERO)]
)
RUNS = st.fixed_dictionaries({"grass": GRASS, "train": TRAIN, "parallel": BACKENDS})


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_a_shipped_file_does_the_same_dumped_and_reloaded(file, tmp_path):
    config = load_config(file)
    again = reloaded(config, tmp_path)
    assert again == config and deeds(again) == deeds(config)


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(run=RUNS)
def test_any_file_does_the_same_when_it_is_dumped_and_reloaded(run: dict[str, Any], tmp_path: Path):
    needed = {"model": {"name": "m"}, "data": {"name": "d", "text": "t"}}
    run = {**needed, **run, "train": {"max_steps": 100, **run["train"]}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    try:
        config = load_config(tmp_path / "run.yaml")
        before = deeds(config)
    except ConfigError:
        return  # settings that exclude each other
    again = reloaded(config, tmp_path)
    assert again == config and deeds(again) == before


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("mode", [None, "interval", "stream", "none", "auto"])
@pytest.mark.parametrize("asked", [None, False])
def test_streamed_states_are_updated_in_backward_unless_clipped(clip, mode, asked, tmp_path):
    offload = OffloadConfig(mode=mode, update_in_backward=asked)
    config = load_config(CONFIGS / "demo.yaml")
    train = config.train.model_copy(update={"clip_grad_norm": clip})
    config = config.model_copy(update={"train": train, "grass": GrassConfig(offload=offload)})
    early = mode == "stream" and clip is None and asked is None
    assert deeds(config)["in backward"] == deeds(reloaded(config, tmp_path))["in backward"] == early


def test_the_default_of_a_written_file_is_still_no_wish(tmp_path):
    config = reloaded(load_config(CONFIGS / "demo.yaml"), tmp_path)
    assert deeds(config)["plans"] == [Plan("interval", 500 + 4 * 2000, 4000), Plan("none", 500, 0)]
