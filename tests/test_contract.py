"""An optimizer that trains all layers at every step is the stock one, to the bit, or is refused: in one process.

`python -m pytest tests/test_contract.py -s` prints the counts of each class.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from grass_dist import GrassOptimizer
from tests.contract_cases import (
    BESIDE,
    CASES,
    CLASSES,
    MODES,
    Case,
    Weights,
    all_layers,
    arguments_of,
    attempt,
    cases_of,
    counted,
    outcome,
    refusal_of,
    unexpected,
)
from tests.tiny import Tiny, loss_of, take_steps, tiny

STEPS = 4


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> Weights:
    take_steps(model, optimizer, range(STEPS))
    return [p.detach() for p in model.parameters()]


def test_every_class_and_every_flag_of_torch_is_a_case():
    assert {case.name for case in CASES} == set(CLASSES) and len(CLASSES) >= 14
    for name, kind in CLASSES.items():
        flags = set(arguments_of(kind))
        assert flags <= BESIDE.keys(), f"{name} has arguments without a value beside the default"
        assert {key for case in cases_of(name) for key in case.arguments} == flags
    assert all(str(case) not in map(str, CASES[:i]) for i, case in enumerate(CASES))


@pytest.mark.parametrize("name", CLASSES)
def test_all_layers_are_the_stock_optimizer_or_refused(name):
    outcomes: dict[tuple[str, str], str] = {}
    faults, met = [], set()
    for case in cases_of(name):

        def plain(case: Case = case) -> tuple[nn.Module, torch.optim.Optimizer]:
            model = case.model(layers=3)
            return model, case.stock(model)

        stock = attempt(plain, train)
        for mode in MODES:

            def ours(case: Case = case, mode: str = mode) -> tuple[nn.Module, torch.optim.Optimizer]:
                model = case.model(layers=3)
                return model, case.ours(model, mode)

            found = outcomes[str(case), mode] = outcome(ours, train, stock)
            faults.append(unexpected(case, found, moves=mode != "none"))
            if found.startswith("refused"):
                met.add(refusal_of(case))
    print(f"{name}: {counted(list(outcomes.values()))}")
    assert not list(filter(None, faults))
    assert len(outcomes) == len(list(cases_of(name))) * len(MODES)
    assert met == {row for case in cases_of(name) if (row := refusal_of(case))}
    assert name == "LBFGS" or "equal" in outcomes.values()


def by_hand(case: Case, model: nn.Module) -> Weights:
    """Trains 16-bit weights through fp32 masters."""
    weights = [p for p in model.parameters() if p.requires_grad]
    masters = [nn.Parameter(p.detach().float()) for p in weights]
    optimizer = case.kind(masters, **case.kwargs())
    for step in range(STEPS):
        loss_of(model, step).backward()
        for master, param in zip(masters, weights, strict=True):
            assert param.grad is not None
            master.grad, param.grad = param.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for master, param in zip(masters, weights, strict=True):
                param.copy_(master)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "LBFGS"])
def test_16_bit_weights_train_as_with_masters_by_hand(name):
    chosen: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.2, "foreach": True, "maximize": True}
    known = arguments_of(CLASSES[name])
    of = next(cases_of(name)).of
    flags = {key: value for key, value in chosen.items() if key in known}
    for dtype, given in ((torch.bfloat16, {}), (torch.bfloat16, flags), (torch.float16, flags)):
        case = Case(name, given, of)
        reference = by_hand(case, case.model(dtype, layers=3))
        for mode in ["none"] if of == "tables" else MODES:
            model = case.model(dtype, layers=3)
            assert all(map(torch.equal, train(model, case.ours(model, mode)), reference)), (case, mode, dtype)


# --- schedulers, with a save and a resume in the middle

ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
MOMENTUM: dict[str, Any] = {"lr": 1e-2, "momentum": 0.9}

lrs = torch.optim.lr_scheduler
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.3, 3), lrs.ExponentialLR(o, 0.9)], o),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.3, 3),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 1e-3, 1e-1, step_size_up=3),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.7),
    "LambdaLR": lambda o: lrs.LambdaLR(o, [lambda step: 0.9**step] * len(o.param_groups)),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, total_iters=6),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 5]),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.8),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.05, total_steps=8),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 8, 2.0),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, factor=0.3, patience=0, threshold=0.5),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.1, anneal_epochs=4),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, 1.0, 3), lrs.CosineAnnealingLR(o, 5)], [3]),
    "StepLR": lambda o: lrs.StepLR(o, 2, 0.5),
}


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with step sizes of their own, which cut through the layers."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if "norm" not in name]},
        {"params": [p for name, p in named if "norm" in name], "lr": 3e-2, "weight_decay": 0.0},
    ]


def made(mode: str | None, cls: Any, kwargs: dict[str, Any], *, groups: bool = False) -> tuple[Tiny, Any]:
    """A model and its optimizer: the stock one, if ``mode`` is None."""
    model = tiny(layers=3)
    params = grouped(model) if groups else None
    if mode is None:
        return model, cls(params or model.parameters(), **kwargs)
    return model, GrassOptimizer(model, cls, kwargs, config=all_layers(3, mode), params=params)


def through_a_file(given: Any) -> Any:
    file = io.BytesIO()
    torch.save(given, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def scheduled(
    mode: str | None,
    make: Callable[[Any], Any],
    cls: Any,
    kwargs: Any,
    resume: bool,
    made: Any = made,
    loss_of: Any = loss_of,
    through: Any = through_a_file,
) -> list[Any]:
    """Weights and step sizes after each of eight steps, of which the last four may be those of another process."""
    model, optimizer = made(mode, cls, kwargs, groups=True)
    scheduler, told = make(optimizer), []
    for step in range(8):
        if step == 4 and resume:
            saved = through([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
            model, optimizer = made(mode, cls, kwargs, groups=True)
            scheduler = make(optimizer)
            for part, state in zip((model, optimizer, scheduler), saved, strict=True):
                part.load_state_dict(state)
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(*[loss.item()] * isinstance(scheduler, lrs.ReduceLROnPlateau))
        told.append([[group[key] for key in ("lr", "betas", "momentum") if key in group] for group in shown(optimizer)])
    return [told, [p.detach() for p in model.parameters()]]


def shown(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: copy.deepcopy(v) for key, v in g.items() if key != "params"} for g in optimizer.param_groups]


def test_every_scheduler_of_torch_is_a_case():
    kinds = {name for name, kind in vars(lrs).items() if isinstance(kind, type) and issubclass(kind, lrs.LRScheduler)}
    assert set(SCHEDULERS) == kinds - {"LRScheduler", "_LRScheduler"} | {"SWALR"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_as_stock_and_resume(name):
    for cls, kwargs in ((torch.optim.AdamW, ADAMW), (torch.optim.SGD, MOMENTUM)):
        told, weights = scheduled(None, SCHEDULERS[name], cls, kwargs, resume=False)
        for mode in MODES:
            ours = scheduled(mode, SCHEDULERS[name], cls, kwargs, resume=mode != "none")
            assert ours[0] == told and all(map(torch.equal, ours[1], weights)), (cls, mode)


# --- loops that do more than a step


def inner(model: Any) -> Any:
    """What a wrapper holds."""
    return getattr(model, "module", model)


class Loop:
    """A loop of a user's, written once for both optimizers; a subclass changes what it does."""

    kwargs: dict[str, Any] = ADAMW
    modes = tuple(MODES)
    made, loss_of, through = staticmethod(made), staticmethod(loss_of), staticmethod(through_a_file)
    """Those of one process; an instance may have others."""

    def begin(self, model: Any, optimizer: Any) -> None:
        self.told: list[Any] = []

    def after_backward(self, model: Any, optimizer: Any) -> None:
        return

    def step(self, model: Any, optimizer: Any, step: int) -> None:
        self.loss_of(model, step).backward()
        self.after_backward(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()

    def end(self, model: Any, optimizer: Any) -> list[Any]:
        return []

    def run(self, mode: str | None) -> list[Any]:
        model, optimizer = self.made(mode, torch.optim.AdamW, copy.deepcopy(self.kwargs), groups=True)
        self.begin(model, optimizer)
        for step in range(6):
            self.step(model, optimizer, step)
        return [*self.end(model, optimizer), *self.told, *(p.detach() for p in model.parameters())]


class StepHooks(Loop):
    """A hook before each step clips, and one after it changes weights."""

    modes = ("none", "interval", "stream")

    def begin(self, model, optimizer):
        super().begin(model, optimizer)

        def before(optimizer, args, kwargs):
            self.told.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))

        def after(optimizer, args, kwargs):
            with torch.no_grad():
                inner(model).head.weight.mul_(0.9)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        optimizer.register_step_post_hook(lambda *_: self.told.append("removed")).remove()


class HooksOnGradients(Loop):
    """Hooks on parameters scale gradients, and count those that are there."""

    def begin(self, model, optimizer):
        super().begin(model, optimizer)
        for param in inner(model).layers[1].parameters():
            param.register_hook(lambda grad: grad * 0.5)
            param.register_post_accumulate_grad_hook(lambda p: self.told.append(tuple(p.shape)))


class Closure(Loop):
    def step(self, model, optimizer, step):
        def closure():
            optimizer.zero_grad()
            loss = self.loss_of(model, step)
            loss.backward()
            return loss

        self.told.append(optimizer.step(closure).detach())


class Clipping(Loop):
    """torch's clipping, by each of its ways."""

    modes = ("none", "interval", "stream")

    def after_backward(self, model, optimizer):
        way = len(self.told) % 4
        if way < 2:
            self.told.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=bool(way)))
        elif way == 2:
            self.told.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=float("inf")))
        else:
            self.told.append(0)
            nn.utils.clip_grad_value_(model.parameters(), 1e-3)


class OwnClipping(Clipping):
    def after_backward(self, model, optimizer):
        if isinstance(optimizer, GrassOptimizer):
            self.told.append(optimizer.clip_grad_norm_(0.1))
        else:
            self.told.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))


class Scaler(Loop):
    """A `GradScaler`, that skips the step of a gradient which is not finite."""

    modes = ("none", "interval", "stream")

    def begin(self, model, optimizer):
        super().begin(model, optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)

    def step(self, model, optimizer, step):
        loss = self.loss_of(model, step) * (float("inf") if step == 2 else 1)
        self.scaler.scale(loss).backward()
        if step % 2:
            self.scaler.unscale_(optimizer)
            self.told.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
        self.told.append(self.scaler.get_scale())


class Accumulation(Loop):
    """Two micro-batches a step, and gradients that are zeroed in place."""

    modes = ("none", "interval", "stream")

    def step(self, model, optimizer, step):
        for micro in range(2):
            (self.loss_of(model, 2 * step + micro) / 2).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


class Edits(Loop):
    """Hyperparameters that are written between steps, and a step size that is a tensor, changed in place."""

    kwargs = {"lr": torch.tensor(1e-2), "weight_decay": 0.1}

    def step(self, model, optimizer, step):
        first, second = optimizer.param_groups
        first["lr"].mul_(0.8)
        second["lr"] = 1e-2 / (step + 1)
        first["weight_decay"], second["betas"] = 0.1 * step, (0.8, 0.9 + 0.01 * step)
        second["maximize"] = step == 3
        super().step(model, optimizer, step)


class StateDicts(Loop):
    """A round trip through a file after every step."""

    def step(self, model, optimizer, step):
        super().step(model, optimizer, step)
        optimizer.load_state_dict(self.through(optimizer.state_dict()))


class Swa(Loop):
    """The average of the last steps' weights and its schedule, and batch statistics of that."""

    def begin(self, model, optimizer):
        super().begin(model, optimizer)
        self.average = swa_utils.AveragedModel(model)
        self.scheduler = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)

    def step(self, model, optimizer, step):
        super().step(model, optimizer, step)
        if step >= 2:
            self.average.update_parameters(model)
            self.scheduler.step()

    def end(self, model, optimizer):
        normed = nn.Sequential(self.average, nn.BatchNorm1d(6))
        swa_utils.update_bn([torch.arange(24).view(4, 6) % 16, torch.arange(24).view(4, 6) % 7], normed)
        optimizer.zero_grad()
        return [t.detach() for t in normed.state_dict().values()]


class Ema(Loop):
    """A moving average, and that of the whole training with buffers."""

    def begin(self, model, optimizer):
        super().begin(model, optimizer)
        make = swa_utils.get_ema_multi_avg_fn(0.9)
        self.averages = [
            swa_utils.AveragedModel(model, multi_avg_fn=make),
            swa_utils.AveragedModel(model, avg_fn=swa_utils.get_ema_avg_fn(0.5), use_buffers=True),
        ]

    def step(self, model, optimizer, step):
        super().step(model, optimizer, step)
        for average in self.averages:
            average.update_parameters(model)

    def end(self, model, optimizer):
        return [p.detach() for average in self.averages for p in average.parameters()]


class Copies(Loop):
    """A copy of the model after each step, which another optimizer trains, and whose hooks do nothing to the first."""

    copied = staticmethod(copy.deepcopy)

    def step(self, model, optimizer, step):
        super().step(model, optimizer, step)
        other = self.copied(model)
        again = torch.optim.SGD(other.parameters(), lr=0.1)
        if isinstance(optimizer, GrassOptimizer) and step % 2:
            again = GrassOptimizer(other, torch.optim.SGD, {"lr": 0.1}, config=all_layers(3, "interval"))
        take_steps(other, again, range(2))
        self.told += [p.detach() for p in other.parameters()]


class Pickles(Copies):
    """The same with a copy that has gone through a pickle of the whole model."""

    copied = staticmethod(lambda model: pickle.loads(pickle.dumps(model)))


class Evaluation(Loop):
    """Forwards without a backward between all others."""

    def step(self, model, optimizer, step):
        super().step(model, optimizer, step)
        model.eval()
        with torch.no_grad():
            self.told.append(self.loss_of(model, 50 + step))
        with torch.inference_mode():
            self.told.append(self.loss_of(model, 60 + step).clone())
        model.train()


class Reloaded(Loop):
    """Weights that are loaded, or written by hand, between steps."""

    def step(self, model, optimizer, step):
        super().step(model, optimizer, step)
        if step == 2:
            self.kept = copy.deepcopy(model.state_dict())
        if step == 4:
            model.load_state_dict(self.kept)
        with torch.no_grad():
            nn.init.zeros_(inner(model).layers[0].up.bias)


LOOPS = [kind for kind in vars().copy().values() if isinstance(kind, type) and issubclass(kind, Loop)]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_loop_of_a_user_is_that_of_stock(loop):
    reference = loop().run(None)
    for mode in loop.modes:
        for ours, theirs in zip(loop().run(mode), reference, strict=True):
            assert torch.equal(ours, theirs) if torch.is_tensor(theirs) else ours == theirs, mode


# --- fewer layers than all


def test_fewer_layers_are_an_optimizer_for_each():
    """γ = 2 of 5 is a stock optimizer for each layer and role, of which the drawn layers' step."""
    for name, given in {"AdamW": {"lr": 1e-2}, "Adagrad": {}, "Adafactor": {}, "Muon": {}, "NAdam": {}}.items():
        case = Case(name, given, next(cases_of(name)).of)
        for mode in MODES:
            model, plain = case.model(layers=5), case.model(layers=5)
            config = all_layers(5, mode).model_copy(update={"active_layers": 2})
            params = [p for p in model.parameters() if p.requires_grad]
            optimizer = GrassOptimizer(model, case.kind, case.kwargs(), config=config, params=params)
            modules = [*plain.layers, plain.embed, plain.norm, plain.head]
            own = [[p for p in module.parameters() if p.requires_grad] for module in modules]
            each = [case.kind(params, **case.kwargs()) if params else None for params in own]
            drawn = []
            for step in range(8):
                drawn.append(optimizer.grass.active_layers)
                take_steps(model, optimizer, range(step, step + 1))
                loss_of(plain, step).backward()
                for index, stock in enumerate(each):
                    if stock is not None and (index >= 5 or index in drawn[-1]):
                        stock.step()
                plain.zero_grad()
            assert len(set(drawn)) > 2
            assert all(map(torch.equal, model.parameters(), plain.parameters())), (name, mode)
