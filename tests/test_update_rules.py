"""What is found out about an optimizer class, and that a class which is taken trains as it does alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from grass_dist import (
    ConfigError,
    GrassConfig,
    GrassError,
    GrassOptimizer,
    UnsupportedModel,
    load_checkpoint,
    save_checkpoint,
)
from grass_dist.model.groups import full_groups
from grass_dist.states.update_rule import ELEMENTWISE, UpdateRule, judge_class
from tests import update_rules as rules
from tests.tiny import Tiny, loss_of, take_steps, tiny

ALL: dict[str, Any] = {"active_layers": 8, "probe_steps": 0}


def grass(model: nn.Module, cls: Any, kwargs: Any = None, *, params: Any = None, **config: Any) -> GrassOptimizer:
    return GrassOptimizer(model, cls, kwargs, config=GrassConfig(**{**ALL, **config}), params=params)


def same_weights(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(map(torch.equal, ours.parameters(), theirs.parameters()))


# --- what a trial finds


def judged(cls: Any, model: nn.Module | None = None, matrices: bool = False, **kwargs: Any) -> UpdateRule:
    model = model or tiny(layers=2, width=128, vocab=160)
    params = [p for p in model.parameters() if p.ndim == 2 or not matrices]
    return judge_class(cls, kwargs, full_groups(model, params, cls, kwargs)[0])


SUBCLASSES = [type(f"Own{cls.__name__}", (cls,), {}) for cls in sorted(ELEMENTWISE, key=lambda cls: cls.__name__)]


@pytest.mark.parametrize("cls", [rules.Lion, rules.Halving, rules.Counting, *SUBCLASSES], ids=lambda cls: cls.__name__)
def test_a_class_that_works_entry_by_entry_is_found_to(cls):
    assert judged(cls).elementwise


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "SGD"])
def test_its_hyperparameters_keep_a_class_elementwise(name):
    kwargs = {"Adam": {"amsgrad": True}, "RMSprop": {"centered": True, "momentum": 0.5}, "SGD": {"momentum": 0.9}}
    assert judged(type("Own", (getattr(torch.optim, name),), {}), weight_decay=0.1, **kwargs[name]).elementwise


@pytest.mark.parametrize(
    "cls",
    [
        rules.Lamb,
        rules.Factored,
        rules.FactoredIfLarge,
        rules.Noisy,
        rules.NeedsEntries,
        torch.optim.Adafactor,
        torch.optim.SparseAdam,
    ],
    ids=lambda cls: cls.__name__,
)
def test_a_class_that_needs_whole_parameters_is_found_to(cls):
    assert not judged(cls).elementwise


@pytest.mark.parametrize("lr", [0.0, 1e-12, 1e6, torch.tensor(0.0)], ids=str)
def test_a_step_size_of_nothing_hides_no_rule(lr):
    assert not judged(rules.Lamb, lr=lr).elementwise
    with pytest.raises(ConfigError, match="depends on the other parameters"):
        judged(rules.Clipping, lr=lr)


def test_matrices_alone_are_judged_as_matrices():
    assert not judged(torch.optim.Muon, matrices=True).elementwise
    with pytest.raises(ValueError, match=r"Muon only supports 2D parameters .*torch\.Size\(\[128\]\)"):
        judged(torch.optim.Muon)


@pytest.mark.parametrize("cls", [rules.Adapting, rules.Clipping], ids=lambda cls: cls.__name__)
def test_a_rule_that_mixes_parameters_is_refused_by_name(cls):
    with pytest.raises(ConfigError) as refusal:
        grass(tiny(), cls)
    assert str(refusal.value) == (
        f"optimizer_class='{cls.__name__}': its update of a parameter depends on the other parameters of the "
        "optimizer, and here each layer has an optimizer of its own; use a class that updates each parameter from "
        "its own gradient and state, such as AdamW."
    )


def test_a_rule_that_cannot_step_alone_is_refused_by_name():
    class Sulking(rules.Lion):
        def begin(self, group):
            raise RuntimeError("call train() first")

    with pytest.raises(
        ConfigError, match=r"'Sulking': it cannot take a step .* \(RuntimeError: call train\(\) first\)"
    ):
        grass(tiny(), Sulking)
    with pytest.raises(ConfigError, match=r"'LBFGS': its step\(\) needs a closure"):
        grass(tiny(), torch.optim.LBFGS)
    with pytest.raises(ConfigError, match="'Warming': it writes its step size 'lr' itself"):
        grass(tiny(), rules.Warming)


def test_a_trial_leaves_generators_and_arguments_alone():
    lr = torch.tensor(0.1)
    given = {"seen": [0], "lr": lr}
    model = tiny()
    before = torch.get_rng_state()
    groups = [{"params": list(model.parameters()), **given}]
    rule = judge_class(rules.Counting, {}, groups)
    assert torch.equal(torch.get_rng_state(), before) and given["seen"] == [0] and lr == torch.tensor(0.1)
    judge_class(rules.Noisy, {}, [{"params": groups[0]["params"], "lr": 0.1}])
    assert torch.equal(torch.get_rng_state(), before)
    assert rule.kept == {"seen", "d"} and rule.initial[0]["seen"] == [0]
    assert all(p.grad is None for p in model.parameters()) and same_weights(model, tiny())


# --- classes that are taken


@pytest.mark.parametrize("offload", [{"mode": "none"}, {"mode": "interval"}, {"mode": "stream", "slots": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_elementwise_class_is_moved_as_those_of_torch(offload, dtype):
    def trained(**more: Any) -> Tiny:
        model = tiny(dtype)
        config = {"active_layers": 3, "sampling_interval": 2, "update_interval": 2, "seed": 3}
        optimizer = grass(model, rules.Lion, {"lr": 1e-2}, **config, **more)
        take_steps(model, optimizer, range(9))
        return model

    assert same_weights(trained(offload=offload), trained(offload={"mode": "none"}))
    if dtype == torch.float32:
        model, plain = tiny(), tiny()
        take_steps(model, grass(model, rules.Lion, offload=offload), range(6))
        take_steps(plain, rules.Lion(plain.parameters()), range(6))
        assert same_weights(model, plain)


@pytest.mark.parametrize("cls", [rules.Lamb, rules.Factored, rules.FactoredIfLarge], ids=lambda cls: cls.__name__)
def test_a_class_for_whole_parameters_trains_as_alone(cls):
    model, plain = tiny(), tiny()
    take_steps(model, grass(model, cls), range(5))
    take_steps(plain, cls(plain.parameters()), range(5))
    assert same_weights(model, plain)


def test_muon_trains_the_matrices_of_the_layers():
    def trained(ours: bool) -> Tiny:
        model = tiny()
        matrices = [p for p in model.layers.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
        muon = grass(model, torch.optim.Muon, params=matrices) if ours else torch.optim.Muon(matrices)
        adamw = torch.optim.AdamW(rest, lr=1e-2)
        for step in range(4):
            loss_of(model, step).backward()
            for optimizer in (muon, adamw):
                optimizer.step()
                optimizer.zero_grad()
        return model

    assert same_weights(trained(ours=True), trained(ours=False))


# --- what a class keeps in its parameter groups


@pytest.mark.parametrize("cls", [rules.Halving, rules.Counting, rules.Late], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("mode", ["none", "interval"])
def test_what_a_class_keeps_in_its_group_is_its_own(cls, mode):
    model, plain = tiny(), tiny()
    ours, stock = grass(model, cls, offload={"mode": mode}), cls(plain.parameters())
    for step in range(20):
        for group in (ours.param_groups[0], stock.param_groups[0]):
            group["lr"] = 0.5 - 0.02 * step  # and the rest is the user's
        take_steps(model, ours, range(step, step + 1))
        take_steps(plain, stock, range(step, step + 1))
    assert same_weights(model, plain)
    theirs = {k: v for k, v in stock.param_groups[0].items() if k != "params"}
    assert {k: v for k, v in ours.param_groups[0].items() if k != "params"} == theirs


def by_hand(cls: Any, draws: list[tuple[int, ...]]) -> Tiny:
    """An optimizer for each layer and for the rest, of which the drawn layers' and the rest's step."""
    model = tiny()
    rest = [p for name, p in model.named_parameters() if not name.startswith("layers.")]
    layers, roles = [cls(layer.parameters()) for layer in model.layers], [cls([p]) for p in rest]
    for step, active in enumerate(draws):
        loss_of(model, step).backward()
        for optimizer in [*(layers[index] for index in active), *roles]:
            optimizer.step()
        model.zero_grad()
    return model


@pytest.mark.parametrize("cls", [rules.Halving, rules.Counting], ids=lambda cls: cls.__name__)
def test_each_layer_keeps_its_own_and_saves_it(cls, tmp_path):
    config = {"active_layers": 2, "sampling_interval": 2, "update_interval": 2, "draw_ahead": 0}
    model, draws = tiny(), []
    optimizer = grass(model, cls, **config)

    def go(model: nn.Module, optimizer: GrassOptimizer, steps: range) -> None:
        for step in steps:
            draws.append(optimizer.grass.active_layers)
            take_steps(model, optimizer, range(step, step + 1))

    go(model, optimizer, range(9))
    save_checkpoint(tmp_path, optimizer, 9)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    kept = {index: state["group/d"] for index, state in saved["state"].items()}
    assert len(set(kept.values())) > 2  # layers have stepped more and less often
    go(model, optimizer, range(9, 16))
    assert same_weights(model, by_hand(cls, draws))
    for from_files in (True, False):
        again = tiny()
        resumed = grass(again, cls, **config)
        if from_files:
            load_checkpoint(tmp_path, resumed)
        else:
            again.load_state_dict(weights)
            resumed.load_state_dict(copy.deepcopy(saved))
        go(again, resumed, range(9, 16))
        assert same_weights(again, model)


# --- gradients of other kinds


class Looks(nn.Module):
    """A layer with a table, whose gradients may be sparse."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.lin, self.table = nn.Linear(4, 4), nn.Embedding(8, 4, sparse=sparse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.lin(x)) + self.table(torch.tensor([1, 3, 3, 6, 0, 1, 2, 5]))


def looking(sparse: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(*[Looks(sparse) for _ in range(4)])
    return nn.Sequential(nn.Embedding(8, 4), layers, nn.Linear(4, 8))


def steps(model: nn.Module, *optimizers: torch.optim.Optimizer, count: int = 5, micro: int = 1) -> None:
    for step in range(count):
        for batch in range(micro):
            (model((torch.arange(8) + step + batch) % 8).square().mean() / micro).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


FOUR: dict[str, Any] = {"active_layers": 4, "layers": "1", "offload": {"mode": "none"}}


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [(torch.optim.SGD, {"lr": 0.1}), (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.Adagrad, {})],
    ids=["sgd", "momentum", "adagrad"],
)
def test_sparse_gradients_train_as_with_the_stock_optimizer(cls, kwargs):
    model, plain = looking(), looking()
    steps(model, grass(model, cls, kwargs, **FOUR))
    steps(plain, cls(plain.parameters(), **kwargs))
    assert same_weights(model, plain)


def test_sparse_adam_trains_the_tables_of_the_layers():
    def trained(ours: bool) -> nn.Module:
        model = looking()
        tables = [layer.table.weight for layer in model[1]]
        rest = [p for p in model.parameters() if all(p is not table for table in tables)]
        sparse = torch.optim.SparseAdam
        first = grass(model, sparse, params=tables, **FOUR) if ours else sparse(tables)
        steps(model, first, torch.optim.SGD(rest, lr=0.1))
        return model

    assert same_weights(trained(ours=True), trained(ours=False))


@pytest.mark.parametrize("micro", [1, 2])
def test_a_sparse_gradient_has_the_importance_of_a_dense_one(micro):
    def measured(sparse: bool) -> tuple[float, ...]:
        model = looking(sparse)
        config = GrassConfig(active_layers=2, layers="1", probe_steps=2, offload={"mode": "none"})
        optimizer = GrassOptimizer(
            model, torch.optim.SGD, {"lr": 0.1}, config=config, gradient_accumulation_steps=micro
        )
        steps(model, optimizer, count=2, micro=micro)
        return optimizer.grass.importances

    assert measured(True) == pytest.approx(measured(False), rel=1e-7) and min(measured(True)) > 0


def test_sparse_gradients_and_states_that_move_are_refused(caplog):
    why = "1.0.table.weight has sparse gradients"
    grass(looking(), torch.optim.SGD, {"lr": 0.1}, **{**FOUR, "offload": {}})
    assert caplog.messages == [f"States stay on the device (grass.offload.mode='none'): {why}."]
    with pytest.raises(ConfigError, match=f"offload.mode='interval': states cannot move: {why}"):
        grass(looking(), torch.optim.SGD, {"lr": 0.1}, **{**FOUR, "offload": {"mode": "interval"}})
    model = looking(sparse=False)
    optimizer = grass(model, torch.optim.Adagrad, **{**FOUR, "offload": {"mode": "interval"}})
    for layer in model[1]:
        layer.table.sparse = True  # which nothing tells at the start
    with pytest.raises(GrassError, match=r"^1\.\d\.table\.weight has a sparse gradient: sparse gradients work in one"):
        steps(model, optimizer)


def test_complex_parameters_are_refused_by_name():
    model = tiny()
    model.layers[2].phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))
    with pytest.raises(
        UnsupportedModel, match=r"^layers\.2\.phase is of torch\.complex64, and .*: freeze it, leave it"
    ):
        grass(model, torch.optim.SGD, {"lr": 0.1})
    model.layers[2].phase.requires_grad_(False)
    take_steps(model, grass(model, torch.optim.SGD, {"lr": 0.1}), range(2))
