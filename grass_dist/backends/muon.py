"""`MuonAdamW`: Muon for the matrices of layers, and AdamW for everything else, as one optimizer class."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

_OF_ADAMW = ("lr", "betas", "eps", "weight_decay")


class MuonAdamW(torch.optim.Optimizer):
    """Updates matrices (two dimensions) as `torch.optim.Muon` does, and other parameters as `torch.optim.AdamW` does.

    Pass it to `GrassOptimizer`, which has AdamW update the matrices outside of the layers, too: embeddings and the
    output head. With ``adjust_lr_fn="match_rms_adamw"`` both take the same learning rate.

    Muon needs whole matrices. Of a matrix that is sharded (FSDP2) each rank keeps its shard of the momentum; over the
    wire goes one all-gather of the smoothed gradient, in its dtype, each step. Every rank then computes the update.

    Args:
        params: parameters or groups. In a group with ``muon=False`` AdamW updates everything.
        lr: learning rate of both.
        weight_decay: decoupled decay of both.
        momentum: of Muon, for example 0.95.
        nesterov: whether Muon takes Nesterov's momentum.
        ns_steps: steps of the Newton-Schulz iteration.
        adjust_lr_fn: how the learning rate of a matrix depends on its shape; see `torch.optim.Muon`.
        betas: of AdamW.
        eps: of AdamW.
        muon: see ``params``.

    Raises:
        ValueError: an argument is none that Muon or AdamW take.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        muon: bool = True,
    ) -> None:
        of_muon: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        both: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        torch.optim.Muon([nn.Parameter(torch.zeros(1, 1))], **both, **of_muon, adjust_lr_fn=adjust_lr_fn)
        self._adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], **both, betas=betas, eps=eps)
        own = {"adjust_lr_fn": adjust_lr_fn, "betas": betas, "eps": eps, "muon": muon}
        super().__init__(params, {**both, **of_muon, **own})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of everything that has a gradient."""
        for group in self.param_groups:
            matrices = [p for p in group["params"] if group["muon"] and p.ndim == 2]
            for param in matrices:
                if param.grad is not None:
                    self._update_matrix(param, group)
            known = {id(p) for p in matrices}
            self._step_adamw(group, [p for p in group["params"] if id(p) not in known])

    def _step_adamw(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        usual = {k: v for k, v in self._adamw.defaults.items() if k not in _OF_ADAMW}
        self._adamw.param_groups = [{**usual, **{k: group[k] for k in _OF_ADAMW}, "params": params}]
        self._adamw.state = self.state
        self._adamw.step()
        self._adamw.param_groups, self._adamw.state = [], defaultdict(dict)

    def _update_matrix(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        assert param.grad is not None
        state, momentum = self.state[param], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        smoothed = state["momentum_buffer"].lerp_(param.grad, 1 - momentum)
        if group["nesterov"]:
            smoothed = param.grad.lerp(smoothed, momentum)
        update = _as(param, _orthogonal(_whole(smoothed), group["ns_steps"]))
        rows, columns = param.shape
        adjusted = 0.2 * math.sqrt(max(rows, columns))
        if group["adjust_lr_fn"] != "match_rms_adamw":
            adjusted = math.sqrt(max(1, rows / columns))
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update, alpha=-group["lr"] * adjusted)


def _whole(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.full_tensor() if isinstance(matrix, DTensor) else matrix


def _as(param: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A whole matrix that every rank has, divided as ``param`` is."""
    if not isinstance(param, DTensor):
        return whole
    mesh = param.device_mesh
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
        mesh, param.placements
    )


def _orthogonal(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """The orthogonalized matrix, by a step of `torch.optim.Muon` over zeros, the learning rate of which is 1.

    A wide matrix has no other factor: a tall one is transposed.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    made = nn.Parameter(torch.zeros_like(matrix.T if tall else matrix))
    made.grad = matrix.T if tall else matrix
    plain = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False, "ns_steps": steps}
    torch.optim.Muon([made], **plain, adjust_lr_fn="original").step()
    update = -made.detach()
    return update.T if tall else update
