"""Cases of the contract: an optimizer that trains all layers at every step is the stock one, to the bit, or is refused.

A case is a class of `torch.optim` with some of its arguments and a kind of model. Its outcome is one of "equal",
"refused: SENTENCE" (by a `GrassError` when the optimizer is made) and "fails as stock" (an error of the same type).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from grass_dist import GrassConfig, GrassError, GrassOptimizer
from tests.tiny import Block, Tiny, tiny

CLASSES = {
    name: kind
    for name, kind in sorted(vars(torch.optim).items())
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}

MODES: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "interval": {"mode": "interval"},
    "stream": {"mode": "stream", "slots": 2},
    "in the backward": {"mode": "stream", "slots": 2, "update_in_backward": True},
}

BESIDE: dict[str, Any] = {
    "adjust_lr_fn": "match_rms_adamw",
    "alpha": 0.6,
    "amsgrad": True,
    "beta2_decay": -0.5,
    "betas": (0.8, 0.95),
    "capturable": True,
    "centered": True,
    "d": 2.0,
    "dampening": 0.1,
    "decoupled_weight_decay": True,
    "differentiable": True,
    "eps": 1e-3,
    "etas": (0.4, 1.3),
    "foreach": True,
    "fused": True,
    "history_size": 5,
    "initial_accumulator_value": 0.5,
    "lambd": 0.1,
    "line_search_fn": "strong_wolfe",
    "lr": 0.02,
    "lr_decay": 0.1,
    "max_eval": 5,
    "max_iter": 3,
    "maximize": True,
    "momentum": 0.7,
    "momentum_decay": 0.1,
    "nesterov": True,
    "ns_coefficients": (3.0, -4.0, 2.0),
    "ns_steps": 3,
    "rho": 0.7,
    "step_sizes": (1e-4, 0.1),
    "t0": 1.0,
    "tolerance_change": 1e-5,
    "tolerance_grad": 1e-3,
    "weight_decay": 0.2,
}
"""A value beside the default of each argument that a class of torch takes."""

OF_A_CLASS = {("Adafactor", "eps"): (1e-6, 1e-2), ("Muon", "nesterov"): False}

TENSOR_LR = torch.tensor(0.02)

TOGETHER: list[dict[str, Any]] = [
    {"lr": -1.0},
    {"lr": TENSOR_LR},
    {"lr": TENSOR_LR, "foreach": False},
    {"lr": TENSOR_LR, "foreach": True},
    {"lr": TENSOR_LR, "fused": True},
    {"betas": (torch.tensor(0.8), torch.tensor(0.95)), "foreach": False},
    {"foreach": False},
    {"fused": False},
    {"foreach": True, "fused": True},
    {"foreach": True, "maximize": True, "weight_decay": 0.2},
    {"foreach": True, "differentiable": True},
    {"fused": True, "maximize": True, "weight_decay": 0.2},
    {"fused": True, "differentiable": True},
    {"amsgrad": True, "foreach": True},
    {"amsgrad": True, "fused": True},
    {"amsgrad": True, "maximize": True, "weight_decay": 0.2},
    {"decoupled_weight_decay": True, "weight_decay": 0.2},
    {"momentum": 0.7, "foreach": True},
    {"momentum": 0.7, "fused": True},
    {"momentum": 0.7, "dampening": 0.1, "weight_decay": 0.2},
    {"momentum": 0.7, "nesterov": True, "maximize": True},
    {"momentum": 0.7, "centered": True, "weight_decay": 0.2},
    {"weight_decay": torch.tensor(0.2)},
]
"""Arguments to give together, to each class that takes all of them."""


class Tabled(Block):
    """A layer with a table of positions, whose gradients are sparse."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.table = nn.Embedding(8, width, sparse=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.table(torch.arange(x.shape[1])))


class Case(NamedTuple):
    """An optimizer class with arguments.

    Attributes:
        of: "all" trains every parameter; "matrices" those of the layers, "tables" tables with sparse gradients in the
            layers, and the rest is frozen; "all and tables" everything, with sparse gradients among it.
    """

    name: str
    arguments: dict[str, Any]
    of: str = "all"

    def __str__(self) -> str:
        shown = ", ".join(f"{key}={_shown(value)}" for key, value in self.arguments.items())
        return f"{self.name}({shown})" + ("" if self.of == "all" else f" of {self.of}")

    @property
    def kind(self) -> Any:
        return CLASSES[self.name]

    def kwargs(self) -> dict[str, Any]:
        return copy.deepcopy(self.arguments)

    def model(self, dtype: torch.dtype = torch.float32, **sizes: int) -> Tiny:
        model = tiny(**sizes)
        if "tables" in self.of:
            width = model.embed.embedding_dim
            model.layers = nn.ModuleList(Tabled(width) for _ in model.layers)
        model.to(dtype)
        for name, param in model.named_parameters():
            chosen = {"tables": "table" in name, "matrices": "layers" in name and param.ndim == 2}
            param.requires_grad_(chosen.get(self.of, True))
        return model

    def stock(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.kind([p for p in model.parameters() if p.requires_grad], **self.kwargs())

    def ours(self, model: nn.Module, mode: str, **more: Any) -> GrassOptimizer:
        """Trains all layers and roles at every step."""
        config = all_layers(sum(isinstance(module, Block) for module in model.modules()), mode)
        params = [p for p in model.parameters() if p.requires_grad]
        return GrassOptimizer(model, self.kind, self.kwargs(), config=config, params=params, **more)


def all_layers(count: int, mode: str) -> GrassConfig:
    return GrassConfig(
        active_layers=count,
        probe_steps=0,
        sampling_interval=2,
        update_interval=2,
        always_active=("embeddings", "final_norm", "lm_head"),
        offload=MODES[mode],
    )


def arguments_of(kind: type) -> list[str]:
    return list(inspect.signature(kind).parameters)[1:]


def cases_of(name: str) -> Iterator[Case]:
    """A class with its defaults, with a value beside the default of each argument, and with some together."""
    known = arguments_of(CLASSES[name])
    of = {"Muon": "matrices", "SparseAdam": "tables"}.get(name, "all")
    singles = [{key: OF_A_CLASS.get((name, key), BESIDE[key])} for key in known]
    together = [given for given in TOGETHER if given.keys() <= set(known)]
    yield from (Case(name, given, of) for given in [{}, *singles, *together])
    yield Case(name, {}, "all and tables")
    if of != "all":
        yield Case(name, {})


CASES = [case for name in CLASSES for case in cases_of(name)]

REFUSALS = {
    "LBFGS": "its step() needs a closure that computes the loss again",
    "Muon": "it takes matrices alone",
    "sparse gradients on many ranks": "will have sparse gradients: sparse gradients work in one process",
    "sparse gradients": "has sparse gradients",
    "whole parameters": "does not work entry by entry, and its state is of DTensors",
    "SparseAdam() of all": "SparseAdam does not support dense gradients",
    "foreach=True, differentiable=True": "does not say what it keeps: _foreach ops don't support autograd",
    "capturable=True": "does not say what it keeps: If capturable=True, params",
    "differentiable=True": "does not say what it keeps: a leaf Variable that requires grad",
}
"""Part of the sentence with which cases are refused. The first three are refused in every mode, the others where states
move; with ``mode="none"`` the last four fail as in stock, and the others train."""


def refusal_of(case: Case, wrapper: str = "") -> str | None:
    """The row of `REFUSALS` that a case may be refused by."""
    sparse = "tables" in case.of
    if case.name == "LBFGS" and not (sparse and wrapper):
        return "LBFGS"
    if case.name == "Muon" and case.of != "matrices":
        return "Muon"
    if sparse:
        several = " on many ranks" * bool(wrapper)
        return f"sparse gradients{several}"
    if wrapper in ("fsdp2", "hsdp") and case.name in ("Adafactor", "Muon", "SparseAdam"):
        return "whole parameters"
    if case.name == "SparseAdam":
        return "SparseAdam() of all"
    if case.arguments.get("differentiable") and case.arguments.get("foreach") and case.name != "SGD":
        return "foreach=True, differentiable=True"
    return next((f"{key}=True" for key in ("capturable", "differentiable") if key in case.arguments), None)


def unexpected(case: Case, outcome: str, *, moves: bool, wrapper: str = "") -> str | None:
    """What is wrong with an outcome, if something is.

    Args:
        moves: whether the states of layers are to move.
        wrapper: around the model, on many ranks.
    """
    if outcome.startswith("refused"):
        row = refusal_of(case, wrapper)
        if row is None or REFUSALS[row] not in outcome or not (moves or row in list(REFUSALS)[:3]):
            return f"{case}: {outcome}, which is in no table"
    return f"{case}: {outcome}" if outcome.startswith("FAULT") else None


Weights = list[torch.Tensor]
Train = Callable[[nn.Module, torch.optim.Optimizer], Weights]


def attempt(make: Callable[[], tuple[nn.Module, torch.optim.Optimizer]], train: Train) -> Weights | Exception:
    """The weights after a training, or what has been raised."""
    try:
        return train(*make())
    except Exception as error:
        return error


def outcome(
    make: Callable[[], tuple[nn.Module, torch.optim.Optimizer]], train: Train, stock: Weights | Exception
) -> str:
    """The outcome of a case; anything else is a sentence that begins with "FAULT".

    Args:
        make: the model and a `GrassOptimizer` for it.
        stock: what `attempt` gave for the stock optimizer.
    """
    try:
        made = make()
    except GrassError as error:
        return f"refused: {error}"
    except Exception as error:
        return _compared(error, stock)
    return _compared(attempt(lambda: made, train), stock)


def _compared(ours: Weights | Exception, stock: Weights | Exception) -> str:
    if isinstance(ours, Exception) or isinstance(stock, Exception):
        return "fails as stock" if type(ours) is type(stock) else f"FAULT: {_told(ours)} beside {_told(stock)}"
    unequal = [i for i, (a, b) in enumerate(zip(ours, stock, strict=True)) if not torch.equal(a, b)]
    if not unequal:
        return "equal"
    worst = max((ours[i] - stock[i]).abs().max().item() for i in unequal)
    return f"FAULT: {len(unequal)} parameters differ, by {worst:.1e} at most"


def _told(result: Weights | Exception) -> str:
    return repr(result)[:200] if isinstance(result, Exception) else "weights"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_shown, value)) + ")"
    return f"tensor({float(value):g})" if torch.is_tensor(value) else repr(value)


def counted(outcomes: Sequence[str]) -> dict[str, int]:
    """How often each outcome was met, refusals as one."""
    kinds = [outcome.partition(":")[0] for outcome in outcomes]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}
