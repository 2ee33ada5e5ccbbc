"""Optimizer classes as people write them, for the tests of what is found out about a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Rule(torch.optim.Optimizer):
    """Calls `update` for each parameter with a gradient, and `begin` for each group before."""

    def __init__(self, params: Any, lr: float = 0.05, **more: Any) -> None:
        super().__init__(params, {"lr": lr, **more})

    def begin(self, group: dict[str, Any]) -> None:
        return

    def update(self, param: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            self.begin(group)
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, param.grad, group)


class Lion(Rule):
    """Works entry by entry."""

    def update(self, param: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        momentum = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
        param.mul_(1 - group["lr"] * 0.1)
        param.add_(momentum.mul(0.9).add_(grad, alpha=0.1).sign_(), alpha=-group["lr"])
        momentum.mul_(0.99).add_(grad, alpha=0.01)


class Lamb(Rule):
    """The size of an update depends on the norm of the whole parameter."""

    def update(self, param: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        param.add_(grad, alpha=-group["lr"] * float(param.norm() / (grad.norm() + 1e-6)))


class Factored(Rule):
    """Second moments of rows and columns, for matrices alone."""

    def update(self, param: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state, squares = self.state[param], grad.square() + 1e-8
        if param.ndim < 2:
            param.sub_(group["lr"] * grad / squares.sqrt())
            return
        rows = state.setdefault("rows", grad.new_zeros(len(param))).lerp_(squares.mean(1), 0.1)
        columns = state.setdefault("columns", grad.new_zeros(param.shape[1])).lerp_(squares.mean(0), 0.1)
        param.sub_(group["lr"] * grad / (rows[:, None] * columns[None] / rows.mean()).sqrt())


class FactoredIfLarge(Factored):
    """As Adafactor of other libraries: a matrix with a short side has second moments of its entries."""

    def update(self, param: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        if param.ndim == 2 and min(param.shape) >= 128:
            super().update(param, grad, group)
        else:
            param.sub_(group["lr"] * grad)


class Noisy(Rule):
    """Adds noise that torch's generator draws."""

    def update(self, param: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        param.sub_(group["lr"] * (grad + 0.1 * torch.randn_like(grad)))


class NeedsEntries(Lion):
    """Cannot update a shard without entries."""

    def update(self, param: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        if grad.abs().max() > 0:
            super().update(param, grad, group)


class Halving(Rule):
    """Keeps its step size in the group."""

    def __init__(self, params: Any, lr: float = 0.5) -> None:
        super().__init__(params, lr, d=1.0)

    def begin(self, group: dict[str, Any]) -> None:
        group["d"] /= 2

    def update(self, param: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        param.add_(grad, alpha=-group["lr"] * group["d"])


class Counting(Halving):
    """Keeps a list in the group, which it changes in place, and a key that it adds after its first step."""

    def __init__(self, params: Any, lr: float = 0.5) -> None:
        Rule.__init__(self, params, lr, seen=[0])

    def begin(self, group: dict[str, Any]) -> None:
        group["seen"][0] += 1
        group["d"] = 1 / group["seen"][0]


class Late(Halving):
    """Writes into its group after more steps than a trial takes."""

    def begin(self, group: dict[str, Any]) -> None:
        group["steps"] = group.get("steps", 0) + 1
        if group["steps"] % 8 == 0:
            group["d"] /= 2


class Adapting(Halving):
    """Chooses its step size from the gradients of all parameters of a group, as Prodigy and D-Adaptation do."""

    def begin(self, group: dict[str, Any]) -> None:
        total = sum(float(p.grad.abs().sum()) for p in group["params"] if p.grad is not None)
        group["d"] = max(group["d"], 1e-3 * total)


class Clipping(Lion):
    """Clips the norm of all gradients to 1."""

    def begin(self, group: dict[str, Any]) -> None:
        nn.utils.clip_grad_norm_(group["params"], 1.0)


class Warming(Halving):
    """Writes its lr."""

    def begin(self, group: dict[str, Any]) -> None:
        group["lr"] = group["lr"] * 0.9
