"""A small mixture of experts as many people write it: a list of modules of which a batch uses some."""

from __future__ import annotations

import torch
from torch import nn

EXPERTS = 3


class Experts(nn.Module):
    """The expert of a token is ``ids % EXPERTS``, so that a test decides who runs; the router's weight scales it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out, weights = torch.zeros_like(x), self.router(x).sigmoid()
        for number, expert in enumerate(self.experts):
            at = (ids % EXPERTS == number).nonzero(as_tuple=True)
            if len(at[0]):
                out = out.index_put(at, expert(x[at]) * weights[at][:, number : number + 1])
        return out


class RoutedBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = Experts(width)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x), ids)


class Routed(nn.Module):
    def __init__(self, layers: int = 4, width: int = 8, vocab: int = 18) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(RoutedBlock(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, ids)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids.roll(-1, 1).flatten())


def ids_for(step: int, rank: int) -> torch.Tensor:
    """Tokens of which rank 0 sends all to expert 0, and rank 1 to expert 1: no token goes to expert 2."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return EXPERTS * torch.randint(0, 6, (2, 6), generator=generator) + rank % 2
