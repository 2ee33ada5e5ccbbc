"""Mixtures of experts: the modules of a layer whose experts a batch may leave out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from grass_dist.errors import UnsupportedModel
from grass_dist.model.discovery import Unit
from grass_dist.model.stacks import class_of, has_params, shape_of


def expert_blocks(model: nn.Module, layers: Iterable[Unit]) -> list[nn.Module]:
    """The modules within layers that hold a list of experts, and a router with a row for each of them.

    Which experts run is decided by the batch, so that ranks differ. Experts whose weights are one stacked parameter run
    as one module, and are not among them.
    """
    found = []
    for layer in layers:
        for module in model.get_submodule(layer.name).modules():
            lists = [child for child in module.children() if _is_list_of_alike(child)]
            if any(_has_router(module, experts) for experts in lists):
                found.append(module)
    return found


def idle_experts_move(model: nn.Module, layers: Iterable[Unit]) -> str | None:
    """A sentence for wrappers that give experts which no rank uses zeros for gradients, if there are such lists."""
    if not (names := sorted({class_of(block).__name__ for block in expert_blocks(model, layers)})):
        return None
    return (
        f"Experts ({', '.join(names)}) that no rank uses in a step have a gradient of zeros in it: weight decay and "
        "momentum move them."
    )


def _is_list_of_alike(module: nn.Module) -> bool:
    children = list(module.children())
    alike = len({class_of(child) for child in children}) == 1 and all(map(has_params, children))
    return isinstance(module, nn.ModuleList) and len(children) > 1 and alike


def _has_router(module: nn.Module, experts: nn.Module) -> bool:
    """Whether a matrix beside the list has a row for each expert."""
    inside, count = {id(p) for p in experts.parameters()}, len(list(experts.children()))
    return any(len(shape_of(p)) == 2 and shape_of(p)[0] == count and id(p) not in inside for p in module.parameters())


def give_idle_experts_zeros(model: nn.Module, layers: Iterable[Unit]) -> list[RemovableHandle]:
    """Has all ranks reduce the gradients of the same experts, in one order; those of idle experts are zeros.

    FSDP2 and ZeRO-1 and 2 put the gradients of a rank together in the order in which they have come. If one rank lacks
    those of an expert, the ranks add up the gradients of different experts, or wait for ever.

    Returns:
        The handles of the hooks.
    """
    return [handle for block in expert_blocks(model, layers) for handle in _Experts(block).handles]


class _Experts:
    """Those of one block, whose gradients are final with that of the block's input, and not as each expert ends."""

    def __init__(self, block: nn.Module) -> None:
        self._experts = [
            expert for child in block.children() if _is_list_of_alike(child) for expert in child.children()
        ]
        self._ran: set[nn.Module] = set()  # of the forward that is under way, and kept for its backward
        self.handles = [expert.register_forward_pre_hook(self._note) for expert in self._experts]
        self.handles.append(block.register_forward_pre_hook(self._begin, with_kwargs=True))

    def _note(self, expert: nn.Module, _: Any) -> None:
        self._ran.add(expert)

    def _begin(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        train = [(expert, p) for expert in self._experts for p in expert.parameters() if p.requires_grad]
        if not train or not torch.is_grad_enabled():
            return None
        given = {**dict(enumerate(args)), **kwargs}
        at = next((k for k, v in given.items() if torch.is_tensor(v) and v.is_floating_point()), None)
        if at is None:
            raise UnsupportedModel(
                f"{type(block).__name__} is a mixture of experts without a tensor among its arguments, which "
                "grass_dist needs to hold the experts that a batch leaves out: pass it the hidden states, as a tensor."
            )
        self._ran = set()
        given[at] = _Last.apply(given[at], self._ran, [expert for expert, _ in train], *(p for _, p in train))
        return tuple(given[i] for i in range(len(args))), {name: given[name] for name in kwargs}


class _Last(torch.autograd.Function):
    """The identity of a tensor; its backward makes the parameters' gradients final, those of idle experts by zeros."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ran: set, experts: list, *params: torch.Tensor) -> torch.Tensor:
        ctx.ran, ctx.experts = ran, experts
        ctx.like = [(p.shape, p.dtype, p.device) for p in params]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        idle = [expert not in ctx.ran for expert in ctx.experts]
        zeros = (torch.zeros(s, dtype=t, device=d) if i else None for i, (s, t, d) in zip(idle, ctx.like, strict=True))
        return grads[0], None, None, *zeros
