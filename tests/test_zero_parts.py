"""The parts of the DeepSpeed backend that need no ranks, and what fails when DeepSpeed's undocumented names change."""

from __future__ import annotations

import inspect
import os
import re
import sys
import time
import tomllib
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from grass_dist.backends.zero import jit, private
from grass_dist.backends.zero.ds_config import split_ds_config
from grass_dist.backends.zero.groups import GroupsOptimizer, groups_of
from grass_dist.backends.zero.states import GroupState, ZeroStates, capacity
from grass_dist.errors import ConfigError, GrassError
from grass_dist.model.discovery import Unit
from grass_dist.states.layer_state import LayerState
from grass_dist.states.moving import IntervalStates
from grass_dist.states.slots import SlotPool
from grass_dist.states.store import LayerStateStore
from grass_dist.states.transfer import TransferEngine

os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed")

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: E402


def units():
    a = Unit("a", 0, tuple((f"a.{i}", nn.Parameter(torch.ones(2) * i)) for i in range(3)))
    b = Unit("b", 1, (("b.0", nn.Parameter(torch.ones(3))),))
    return a, b


def test_the_table_of_private_names_holds_on_this_release():
    private.check_classes(DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, deepspeed.__version__)
    import deepspeed.runtime.engine as engine
    import deepspeed.runtime.zero.stage3 as stage3

    assert engine.DeepSpeedZeroOptimizer is DeepSpeedZeroOptimizer
    assert stage3.DeepSpeedZeroOptimizer_Stage3 is DeepSpeedZeroOptimizer_Stage3
    assert deepspeed.ops.__compatible_ops__.get("deepspeed_shm_comm") in (True, False)


def test_an_engine_being_made_takes_its_optimizer_from_us():
    """By the names that it calls, also where it then derives a class from the stock one."""
    import deepspeed.runtime.engine as engine
    import deepspeed.runtime.zero.stage3 as stage3

    def made():
        return [engine.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3]

    def fail():
        with private.zero_optimizers_from(lambda stock, arguments: (stock, arguments["init_optimizer"])):
            from deepspeed.runtime.superoffload.superoffload_stage3 import SuperOffloadOptimizer_Stage3

            assert SuperOffloadOptimizer_Stage3.__base__ is DeepSpeedZeroOptimizer_Stage3
            assert made()[0]("mine", [], None, {}) == (DeepSpeedZeroOptimizer, "mine")
            assert made()[1]("model", "mine", [], None, ds_config={}) == (DeepSpeedZeroOptimizer_Stage3, "mine")
            raise ValueError

    source = inspect.getsource(engine.DeepSpeedEngine._configure_zero_optimizer)
    assert " DeepSpeedZeroOptimizer" in source
    assert "from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3" in source
    with pytest.raises(ValueError):
        fail()
    assert made() == [DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3]


@pytest.mark.parametrize("name", private.STAGE_3.methods)
def test_a_release_that_lacks_a_method_is_refused_by_name(name):
    methods = {m: None for m in private.STAGE_3.methods if m != name}
    with pytest.raises(GrassError, match=rf"DeepSpeed 9\.9: Later has no {name}; grass_dist works with DeepSpeed"):
        private.check_classes(DeepSpeedZeroOptimizer, type("Later", (), methods), "9.9")


def test_deepspeed_tells_in_what_it_reduces_and_refuses_states():
    from deepspeed.runtime import engine, torch_autocast

    param = torch.nn.Parameter(torch.zeros(2))
    assert private.comm_dtype_of(param) is None
    setattr(param, torch_autocast.PARAM_COMM_DTYPE_ATTR_NAME, torch.bfloat16)
    assert private.comm_dtype_of(param) is torch.bfloat16
    source = inspect.getsource(engine.DeepSpeedEngine._load_zero_checkpoint)
    assert f"raise {private.refused_states().__name__}(" in source and "world size" in source


@pytest.mark.parametrize("version", ["0.17.0", "0.17.6", "0.18.9", "0.19.0", "0.19.4", "0.19.6"])
def test_a_release_with_faults_below_stage_3_is_refused_there(version):
    for stage in (0, 1, 2):
        with pytest.raises(
            GrassError, match=rf"{version} is not supported at ZeRO stage {stage}, .* install DeepSpeed 0.19.8"
        ):
            private.check_reduction(stage, version, on_cpu=False)
    private.check_reduction(3, version, on_cpu=True)


def test_a_release_that_drops_gradients_is_refused_on_a_cpu():
    with pytest.raises(GrassError, match=r"0.19.7 does not add up .* stage 2, .* install DeepSpeed 0.19.8"):
        private.check_reduction(2, "0.19.7", on_cpu=True)
    private.check_reduction(3, "0.19.7", on_cpu=True)
    private.check_reduction(2, "0.19.7", on_cpu=False)
    for fine in ("0.16.9", "0.19.8", "0.20.0"):
        private.check_reduction(1, fine, on_cpu=True)


@pytest.mark.parametrize("name", [*private.STAGE_1_AND_2.attributes, private.STAGE_1_AND_2.masters])
def test_a_release_that_lacks_an_attribute_is_refused_by_name(name):
    names = private.STAGE_1_AND_2
    wanted = {*names.attributes, *names.shapes} - {name}
    zero = type("Zero", (), {**dict.fromkeys(wanted), names.masters: [1, 2]})()
    if name == names.masters:
        zero = type("Zero", (), {**dict.fromkeys(wanted), names.masters: [1]})()
    with pytest.raises(GrassError, match=name):
        private.check_instance(zero, names, 2)


@pytest.mark.parametrize("version", ["0.15.4", "0.16.0"])
def test_a_release_that_failed_the_tests_is_refused(version):
    with pytest.raises(GrassError, match=f"DeepSpeed {version} is not supported; grass_dist works with"):
        private.check_classes(DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, version)


@pytest.mark.parametrize("version", ["0.16.9", "0.17.6", "0.18.4", "0.19.8", "0.19.9+cu128", "0.20.0.dev1"])
def test_a_release_that_passed_or_is_newer_is_let_in(version):
    private.check_classes(DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, version)


@pytest.mark.parametrize("name", [*private.LINKED, private.MAPPING])
def test_a_release_that_binds_other_methods_is_refused_by_name(name):
    param = nn.Parameter(torch.ones(1))
    for other in {*private.LINKED, private.MAPPING} - {name}:
        setattr(param, other, None)
    with pytest.raises(GrassError, match=f"Parameter has no {name};"):
        private.check_linked(param)
    setattr(param, name, None)
    private.check_linked(param)
    setattr(param, private.MAPPING, object())
    with pytest.raises(GrassError, match=r"Parameter has no _hp_mapping\.hp_fragment;"):
        private.check_linked(param)


def test_deepspeeds_public_functions_call_what_is_answered_here():
    """Each of them asks at a parameter's attribute or at a method of the ZeRO-3 optimizer that the tables have."""
    source = inspect.getsource(sys.modules[deepspeed.utils.safe_get_full_grad.__module__])
    called = set(re.findall(r"param\._z3_optimizer\.(\w+)|\]\._z3_optimizer\.(\w+)", source))
    assert {name for pair in called for name in pair if name} <= set(private.STAGE_3.methods)
    bound = set(re.findall(r"(?:param|p)\.([gs]et_full_hp_\w+)\(", source))
    assert bound == set(private.LINKED)


def test_the_engine_has_the_hooks_and_exports_of_the_table():
    from deepspeed.runtime.engine import DeepSpeedEngine

    source = inspect.getsource(DeepSpeedEngine.__init__)
    assert all(f"self.{name} = self._create_" in source for name in private.ENGINE_HOOKS)
    assert all(hasattr(DeepSpeedEngine, name) for name in private.ENGINE_EXPORTS)


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


def test_the_users_optimizer_steps_the_groups_of_the_interval():
    a, b = units()
    user = torch.optim.SGD(
        [{"params": [p for _, p in a.params]}, {"params": [p for _, p in b.params], "lr": 5.0}], lr=1.0
    )
    own, updated = user.param_groups, []

    @contextmanager
    def around(masters):
        updated.append((list(masters), b.params[0][1].tolist()))
        yield
        updated.append(b.params[0][1].tolist())

    narrowed = GroupsOptimizer(user, groups_of([b], own), around)
    for _, p in (*a.params, *b.params):
        p.grad = torch.ones_like(p)
    own[1]["lr"] = 2.0  # a scheduler's doing
    narrowed.follow_user()
    narrowed.step()
    assert b.params[0][1].tolist() == [-1.0] * 3 and a.params[0][1].tolist() == [0.0] * 2
    narrowed.step_nothing()
    assert b.params[0][1].tolist() == [-1.0] * 3 and user.param_groups is own
    assert updated == [([b.params[0][1]], [1.0] * 3), [-1.0] * 3]  # ``around`` is there for the step, and for no other


CPU = torch.device("cpu")


def states_of_units(*, has_master=True):
    """States of `units` for two ranks: a of 91 elements at most (6 / 2 + 8 for each parameter + 64), b of 74."""
    kept = [("exp_avg", torch.Size([1]), torch.float32), ("exp_avg_sq", torch.Size([1]), torch.float32)]
    found = units()
    groups = groups_of(found, [{"params": [p for unit in found for _, p in unit.params]}])
    return [LayerState(g.unit.name, [GroupState(g, kept, {}, 2, has_master=has_master)]) for g in groups]


def made(numel, start, *, born=True):
    """A master as DeepSpeed makes it, and the base optimizer's state of it."""
    param = nn.Parameter(torch.arange(numel) + float(start))
    state = defaultdict(dict)
    if born:
        state[param] = {"exp_avg": param.data * 2, "exp_avg_sq": param.data * 3, "step": torch.tensor(4.0)}
    return param, state


def numbers(own):
    """What a group's state is, in the order of master, exp_avg, exp_avg_sq."""
    return [own.master.tolist(), *(own.state[key].tolist() for key in ("exp_avg", "exp_avg_sq"))]


def stands_in(param, numel):
    """Whether DeepSpeed sees a master of the right form that takes no memory, and that shows if it is used."""
    form = param.shape, param.dtype, param.untyped_storage().nbytes()
    return form == ((numel,), torch.float32, 4) and bool(param.isnan().all())


def test_a_new_group_is_adopted_and_a_known_one_gets_its_state():
    [a, _] = states_of_units()
    [own] = a.targets
    param, state = made(3, 10)
    own.adopt(param, state)
    assert own.state is state[param] and own.master.data_ptr() == param.data_ptr() and own.resident
    assert numbers(own) == [[10, 11, 12], [20, 22, 24], [30, 33, 36]]

    later, later_state = made(3, 50, born=False)
    own.adopt(later, later_state)
    assert later_state[later] is own.state and later.data_ptr() == param.data_ptr() and later.tolist() == [10, 11, 12]
    assert own.state["step"] == 4 and own.param is later


@pytest.mark.parametrize("has_master", [True, False])
def test_a_group_is_where_it_was_bound_last(has_master):
    [a, _] = states_of_units(has_master=has_master)
    [own] = a.targets
    assert [field.name for field in own.fields] == ["a/master", "a/exp_avg", "a/exp_avg_sq"][not has_master :]
    assert a.layout.device_bytes == len(own.fields) * 384  # 91 x 4 bytes, aligned
    param, state = made(3, 10)
    own.adopt(param, state)
    host, slot = (torch.full((a.layout.device_bytes,), 0xFF, dtype=torch.uint8) for _ in range(2))
    a.bind(a.layout.host_views(host), resident=False)
    own.replace(3, torch.tensor([1.0, 2.0, 3.0]), {"exp_avg": torch.tensor([4.0, 5.0, 6.0]), "step": torch.tensor(7.0)})
    assert list(own.state) == ["exp_avg", "step"] and state[param] is own.state
    slot.copy_(host)
    for flat, resident in ((host, False), (slot, True), (host, False)):
        a.bind(a.layout.device_views(flat), resident=resident)
        assert own.state["exp_avg"].tolist() == [4, 5, 6] and own.state["step"] == 7
        assert own.state["exp_avg"].untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
        if has_master:
            assert own.master.tolist() == [1, 2, 3]
            assert param.tolist() == [1, 2, 3] if resident else stands_in(param, 3)
        else:
            assert own.master is None and param.tolist() == [10, 11, 12]  # these are the weights


def test_padding_that_a_checkpoint_lacks_is_zero():
    [_, b] = states_of_units()
    [own] = b.targets
    flat = torch.full((b.layout.host_bytes,), 0xFF, dtype=torch.uint8)
    b.bind(b.layout.host_views(flat), resident=False)
    own.replace(4, torch.tensor([1.0, 2.0]), {"exp_avg": torch.tensor([3.0, 4.0, 5.0]), "exp_avg_sq": torch.ones(4)})
    assert numbers(own) == [[1, 2, 0, 0], [3, 4, 5, 0], [1, 1, 1, 1]]
    assert all(home[4:].eq(0).all() and home.numel() == 74 for home in own.homes.values())


def test_a_partition_padded_further_than_foreseen_is_refused():
    [a, b] = states_of_units()
    assert [capacity(unit.targets[0].group, 2) for unit in (a, b)] == [91, 74]
    a.targets[0].adopt(*made(91, 0))
    with pytest.raises(GrassError, match="partition of a has 92 elements where at most 91 were expected"):
        a.targets[0].adopt(*made(92, 0))


def zero_states():
    layers = states_of_units()
    transfers = TransferEngine(CPU)
    pool = SlotPool(1, max(layer.layout.device_bytes for layer in layers), CPU, transfers.allocated)
    store = LayerStateStore([layer.layout.host_bytes for layer in layers], CPU)
    moving = IntervalStates(layers, pool, store, transfers, last_first=False, prefetch_steps=0)
    return ZeroStates(layers, [], moving, CPU), [layer.targets[0] for layer in layers]


def narrow(states, own, param, state, layer):
    """What happens at a switch to ``layer``, in the place of which DeepSpeed has made ``param``."""
    for group in states.of.values():
        group.param = None
    states.leave((layer,))
    own.adopt(param, state)
    states.enter((layer,))


def test_a_layer_leaves_its_state_behind_and_finds_it_again():
    states, (a, b) = zero_states()
    first, state = made(3, 10)
    narrow(states, a, first, state, 0)
    assert (states.device_bytes, states.host_bytes) == (3 * 384, 0)
    with states.updating([first], state):
        assert first.tolist() == [10, 11, 12] and state[first]["exp_avg"].tolist() == [20, 22, 24]
        first.data.add_(1)
        state[first]["exp_avg"].add_(1)
    assert numbers(a) == [[11, 12, 13], [21, 23, 25], [30, 33, 36]]
    states.end_step()

    other, other_state = made(2, 0, born=False)
    narrow(states, b, other, other_state, 1)
    with states.updating([other], other_state):
        for key in ("exp_avg", "exp_avg_sq"):
            other_state[other][key] = torch.zeros_like(other)
            assert other_state[other][key].untyped_storage().data_ptr() == b.homes[key].untyped_storage().data_ptr()
        other.data.sub_(5)
    states.end_step()
    states.settle()
    assert numbers(a) == [[11, 12, 13], [21, 23, 25], [30, 33, 36]] and not a.resident
    assert numbers(b) == [[-5, -4], [0, 0], [0, 0]] and b.resident
    assert states.host_bytes == 3 * 384 and states.device_bytes == 3 * 384

    again, again_state = made(3, 70, born=False)
    narrow(states, a, again, again_state, 0)
    with states.updating([again], again_state):
        assert again.tolist() == [11, 12, 13] and again_state[again]["exp_avg"].tolist() == [21, 23, 25]
        assert a.resident and again_state[again]["step"] == 4
    states.end_step()
    states.leave(())
    states.settle()
    assert stands_in(again, 3) and numbers(a) == [[11, 12, 13], [21, 23, 25], [30, 33, 36]]
    assert numbers(b) == [[-5, -4], [0, 0], [0, 0]]


def test_an_update_of_several_layers_at_once_is_refused():
    states, (a, b) = zero_states()
    (first, state), (other, _) = made(3, 0), made(2, 0)
    a.param, b.param = first, other
    with pytest.raises(GrassError, match="updates several groups in one step"), states.updating([first, other], state):
        pass


def test_states_are_thrown_away_and_replaced():
    states, (a, b) = zero_states()
    param, state = made(3, 10)
    narrow(states, a, param, state, 0)
    states.forget()
    assert (a.numel, b.numel, a.master, a.state) == (0, 0, None, {}) and states.host_bytes == 0
    moments = {"exp_avg": torch.tensor([4.0, 5.0]), "exp_avg_sq": torch.tensor([6.0, 7.0])}
    states.replace({("a", 0): (2, torch.tensor([1.0, 2.0]), moments), ("b", 0): (2, torch.tensor([8.0]), moments)})
    assert numbers(a) == [[1, 2], [4, 5], [6, 7]] and numbers(b) == [[8, 0], [4, 5], [6, 7]]
    assert states.host_bytes == 3 * (384 + 320)


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


def test_on_a_cpu_nothing_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    [told] = jit.spare_the_compiler(config)
    assert config["optimizer"]["params"]["torch_adam"] is True and "torch_adam" in told
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_deepspeeds_enums_and_models_are_read_by_their_meaning():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
        OffloadDeviceEnum,
    )

    def split(**zero):
        return split_ds_config({"train_batch_size": 2, "zero_optimization": zero, "grass": {}})

    for kind in (dict, DeepSpeedZeroOffloadParamConfig):
        with pytest.raises(ConfigError, match=r"offload_param.device='nvme': DeepSpeed moves .*; use 'cpu'"):
            split(stage=3, offload_param=kind(device=OffloadDeviceEnum.nvme))
        on_host = kind(device=OffloadDeviceEnum.cpu)
        assert split(stage=3, offload_param=on_host).ds_config["zero_optimization"]["offload_param"]["device"] == "cpu"
        with pytest.raises(ConfigError, match=r"offload_param.device='cpu': below stage 3 .* whole weights; use stage"):
            split(stage=2, offload_param=on_host)
    for section in ({"device": OffloadDeviceEnum.cpu}, DeepSpeedZeroOffloadOptimizerConfig(device="cpu")):
        told = split(stage=ZeroStageEnum.gradients, offload_optimizer=section)
        assert told.ds_config["zero_optimization"] == {"stage": 2} and "live in (pinned) host memory" in told.said[0]
    on_disk = split(stage=2, offload_optimizer={"device": OffloadDeviceEnum.nvme, "nvme_path": "/fast"})
    assert on_disk.grass.offload.folder == "/fast"

    written = DeepSpeedZeroConfig(stage=3, stage3_prefetch_bucket_size=7)
    told = split_ds_config({"train_batch_size": 2, "zero_optimization": written, "grass": {}})
    assert told.stage == 3 and told.ds_config["zero_optimization"].items() >= {"stage3_prefetch_bucket_size": 7}.items()
    assert DeepSpeedZeroConfig(**told.ds_config["zero_optimization"]) == written
    written = DeepSpeedZeroConfig(stage=3, zero_quantized_weights=True)
    with pytest.raises(ConfigError, match="zero_optimization.zero_quantized_weights=True"):
        split_ds_config({"train_batch_size": 2, "zero_optimization": written, "grass": {}})
