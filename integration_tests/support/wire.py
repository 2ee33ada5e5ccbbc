"""Counts what goes over the wire, where the process group is called: at the c10d operators."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Wire(TorchDispatchMode):
    """Bytes that this rank puts into each kind of collective while the context is open.

    ``bytes["reduce_scatter"]`` counts inputs, ``bytes["all_reduce"]`` the tensors, ``bytes["all_gather"]`` the
    gathered outputs. ``floats`` counts float32 and narrower tensors only: gradients and weights, not the method's own
    sums and digests.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.floats: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("c10d::"):
            kind = next((k for k in ("reduce_scatter", "all_reduce", "allreduce", "allgather") if k in name), name)
            kind = {"allreduce": "all_reduce", "allgather": "all_gather"}.get(kind, kind)
            # (output, input, ...) for a reduce-scatter, the tensors or the outputs first for the others
            counted = args[1] if kind == "reduce_scatter" else args[0]
            tensors = [t for t in tree_leaves(counted) if isinstance(t, torch.Tensor)]
            self.calls[kind] += 1
            self.bytes[kind] += sum(t.nbytes for t in tensors)
            self.floats[kind] += sum(t.nbytes for t in tensors if t.is_floating_point() and t.dtype != torch.float64)
        return func(*args, **(kwargs or {}))
