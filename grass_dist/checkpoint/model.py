"""The weights and buffers of a model as pieces, however the model is wrapped."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from grass_dist.checkpoint.pieces import Piece
from grass_dist.model.sharding import Sharding

_WRAPPERS = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")


def fqn(name: str) -> str:
    """A parameter's name without the parts that DDP, `torch.compile` and activation checkpointing add to it."""
    for wrapper in _WRAPPERS:
        if name.startswith(wrapper):
            return fqn(name.removeprefix(wrapper))
        name = name.replace(f".{wrapper}", ".")
    return name


def pieces_of(model: nn.Module, sharding: Sharding) -> list[Piece]:
    """All parameters and persistent buffers that this rank holds, sharing their memory."""
    pieces = []
    for name, param in model.named_parameters():
        shard = sharding.shard_of(param).reshape(-1)
        numel = getattr(param, "ds_numel", param.numel())
        pieces.append(Piece(fqn(name), numel, sharding.start_of(param), shard, writes=sharding.counts(param)))
        if sharding.replicates(param):
            pieces[-1] = replicated(pieces[-1])
    for name, buffer in persistent_buffers(model):
        flat = buffer.detach().view(-1) if buffer.is_contiguous() else buffer.detach().reshape(-1)
        pieces.append(replicated(Piece(fqn(name), buffer.numel(), 0, flat)))
    return pieces


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The whole shapes of all parameters and persistent buffers."""
    shapes = {fqn(n): tuple(getattr(p, "ds_shape", p.shape)) for n, p in model.named_parameters()}
    return shapes | {fqn(n): tuple(b.shape) for n, b in persistent_buffers(model)}


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that a state_dict has."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def replicated(piece: Piece) -> Piece:
    return Piece(piece.key, piece.numel, piece.start, piece.tensor, writes=True, shared=True)
