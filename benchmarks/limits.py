"""How little a step can cost by its FLOPs: forward 2, activation gradients 2, weight gradients 2 a token and entry."""

from __future__ import annotations

from grass_dist.model.discovery import LayerMap


def with_head(layers: LayerMap, active: tuple[int, ...], roles: bool) -> float:
    """Least step time over full fine-tuning; the output embedding is a matrix that counts, the input one is not."""
    count = len(layers.layers)
    layer = sum(unit.numel for unit in layers.layers) / count
    head = max(p.numel() for unit in layers.roles for _, p in unit.params)
    below = 0 if roles else min(active)
    forward = count * layer + head
    activations = (count - below) * layer + head
    weights = len(active) * layer + (head if roles else 0)
    return (forward + activations + weights) / (3 * forward)


def by_layers(layers: LayerMap, active: tuple[int, ...], roles: bool) -> float:
    """The same by the layers alone: (2 + 2 f_above + 2 γ/L) / 6."""
    count = len(layers.layers)
    above = 1.0 if roles else (count - min(active)) / count
    return (2 + 2 * above + 2 * len(active) / count) / 6
