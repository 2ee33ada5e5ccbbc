"""The parts of the DeepSpeed backend that need no ranks, and what fails when DeepSpeed's undocumented names change."""

from __future__ import annotations

import os
import time
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from grass_dist.backends.zero import private
from grass_dist.backends.zero.groups import GroupsOptimizer, groups_of
from grass_dist.backends.zero.store import HostStore
from grass_dist.discovery import Unit
from grass_dist.errors import GrassError
from grass_dist.zero import jit

os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed")

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: E402


def units():
    a = Unit("a", 0, tuple((f"a.{i}", nn.Parameter(torch.ones(2) * i)) for i in range(3)))
    b = Unit("b", 1, (("b.0", nn.Parameter(torch.ones(3))),))
    return a, b


def test_the_table_of_private_names_holds_on_the_installed_release():
    private.check_classes(DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, deepspeed.__version__)
    import deepspeed.runtime.engine as engine
    import deepspeed.runtime.zero.stage3 as stage3

    assert engine.DeepSpeedZeroOptimizer is DeepSpeedZeroOptimizer
    assert stage3.DeepSpeedZeroOptimizer_Stage3 is DeepSpeedZeroOptimizer_Stage3
    assert deepspeed.ops.__compatible_ops__.get("deepspeed_shm_comm") in (True, False)


@pytest.mark.parametrize("name", private.STAGE_3.methods)
def test_a_release_that_lacks_a_method_is_refused_by_name(name):
    methods = {m: None for m in private.STAGE_3.methods if m != name}
    with pytest.raises(GrassError, match=rf"DeepSpeed 9\.9: Later has no {name}; grass_dist works with DeepSpeed"):
        private.check_classes(DeepSpeedZeroOptimizer, type("Later", (), methods), "9.9")


@pytest.mark.parametrize("name", [*private.STAGE_1_AND_2.attributes, private.STAGE_1_AND_2.masters])
def test_a_release_that_lacks_an_attribute_is_refused_by_name(name):
    names = private.STAGE_1_AND_2
    wanted = {*names.attributes, *names.shapes} - {name}
    zero = type("Zero", (), {**dict.fromkeys(wanted), names.masters: [1, 2]})()
    if name == names.masters:
        zero = type("Zero", (), {**dict.fromkeys(wanted), names.masters: [1]})()
    with pytest.raises(GrassError, match=name):
        private.check_instance(zero, names, 2)


@pytest.mark.parametrize("version", ["0.15.4", "0.16.0", "0.17.6", "0.18.9"])
def test_a_release_that_failed_the_tests_is_refused(version):
    with pytest.raises(GrassError, match=f"DeepSpeed {version} is not supported; grass_dist works with"):
        private.check_classes(DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, version)


@pytest.mark.parametrize("version", ["0.16.9", "0.19.8", "0.19.9+cu128", "0.20.0.dev1"])
def test_a_release_that_passed_or_is_newer_is_let_in(version):
    private.check_classes(DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, version)


def test_the_package_asks_for_the_releases_that_it_takes():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["deepspeed"] == [f"deepspeed{private.SUPPORTED}"]


def test_a_state_without_the_known_keys_is_refused():
    with pytest.raises(GrassError, match="no fp32_flat_groups"):
        private.check_state({"optimizer_state_dict": {}}, private.STAGE_3)


def test_one_group_for_each_unit_and_group_of_the_user():
    a, b = units()
    user = [{"params": [a.params[1][1], b.params[0][1]]}, {"params": [a.params[0][1], a.params[2][1]]}]
    groups = groups_of([a, b], user)
    assert [(g.key, g.user_group, len(g.params)) for g in groups] == [
        (("a", 0), 0, 1),
        (("a", 1), 1, 2),
        (("b", 0), 0, 1),
    ]


def test_the_users_optimizer_steps_over_the_groups_of_the_interval_and_keeps_its_own():
    a, b = units()
    user = torch.optim.SGD(
        [{"params": [p for _, p in a.params]}, {"params": [p for _, p in b.params], "lr": 5.0}], lr=1.0
    )
    own = user.param_groups
    narrowed = GroupsOptimizer(user, groups_of([b], own))
    for _, p in (*a.params, *b.params):
        p.grad = torch.ones_like(p)
    own[1]["lr"] = 2.0  # a scheduler's doing
    narrowed.follow_user()
    narrowed.step()
    assert b.params[0][1].tolist() == [-1.0] * 3 and a.params[0][1].tolist() == [0.0] * 2
    narrowed.step_nothing()
    assert b.params[0][1].tolist() == [-1.0] * 3 and user.param_groups is own


def test_the_host_store_gives_back_what_it_took_in_one_buffer():
    store = HostStore(pin=False)
    master, moment = torch.arange(4.0), torch.arange(4.0) * 2
    record = {"fp32": master, "padding": 1, "state": {"exp_avg": moment, "step": torch.tensor(3.0)}}
    store.put(("a", 0), record)
    held = store[("a", 0)]
    master.zero_(), moment.zero_(), record["state"]["step"].zero_()
    assert held["fp32"].tolist() == [0, 1, 2, 3] and held["state"]["exp_avg"].tolist() == [0, 2, 4, 6]
    assert held["state"]["step"] == 3 and held["padding"] == 1 and store.nbytes == 32
    assert held["fp32"].untyped_storage().data_ptr() == held["state"]["exp_avg"].untyped_storage().data_ptr()
    before = held["fp32"].data_ptr()
    store.drop(("a", 0))
    assert ("a", 0) not in store and store.nbytes == 0
    store.put(("a", 0), record)
    assert store[("a", 0)]["fp32"].data_ptr() == before  # the buffer is used again


def test_a_killed_build_is_cleared_and_one_under_way_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name, age in (("killed", jit.STALE_SECONDS + 60), ("running", 5)):
        (tmp_path / name).mkdir()
        lock = tmp_path / name / "lock"
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    told = jit.spare_the_compiler({})
    assert not (tmp_path / "killed" / "lock").exists() and (tmp_path / "running" / "lock").exists()
    assert len(told) == 2 and "killed 31 minutes ago" in " ".join(told) and "delete" in " ".join(told)


def test_a_build_that_comes_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    [told] = jit.spare_the_compiler({"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}})
    assert "compile its operator fused_lion" in told and str(tmp_path) in told


def test_on_a_cpu_nothing_is_compiled():
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    [told] = jit.spare_the_compiler(config)
    assert config["optimizer"]["params"]["torch_adam"] is True and "torch_adam" in told
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
