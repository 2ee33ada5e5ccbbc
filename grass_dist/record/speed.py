"""How fast a run is: tokens a second, and FLOPs by what each draw needs, over what the GPU can do."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grass_dist.config import ADAPTERS
from grass_dist.method.flops import Work, lowest_reached, step_flops
from grass_dist.model.adapters import adapter_parameters
from grass_dist.model.discovery import LayerMap
from grass_dist.model.experts import expert_blocks
from grass_dist.model.stacks import shape_of
from grass_dist.record.peaks import peak_of


@dataclass(frozen=True, slots=True)
class Positions:
    """The positions that a step computes, summed over ranks and micro-batches."""

    count: float
    """All of them: rows times length, with padding."""
    padding: float
    squares: float
    """The sum of the squared length of each row, with padding: pairs of positions, which attention multiplies."""


@dataclass(frozen=True, slots=True)
class ModelWork:
    """Multiply-adds of a model that reads tokens."""

    layers: tuple[int, ...]
    """Entries of the matrices of each layer, which multiply once for each position."""
    attention: float
    """Multiply-adds of a layer's attention for each pair of positions."""
    head: int
    """Entries of the matrix of the output head; 0 without one."""
    tied: bool
    """The output head is the table of the embeddings."""
    recomputed: bool
    """Activation checkpointing is on."""
    adapters: int = 0
    """Entries of the adapters of all layers, which train at every step where they are a role."""

    def flops(self, active: Collection[int], roles: Collection[str], positions: Positions) -> float:
        """Returns the FLOPs of forward and backward.

        Args:
            active: numbers of the layers that train.
            roles: names of the roles that train.
        """
        added = self.adapters if ADAPTERS in roles else 0
        lowest = lowest_reached(active, down_to_all="embeddings" in roles or added > 0)
        whole, reached = self._work(0, positions), self._work(lowest, positions)
        forward, backward = step_flops(
            whole,
            reached,
            (sum(self.layers[i] for i in active) + added) * positions.count,
            head=self.head * positions.count,
            head_trains=("embeddings" if self.tied else "lm_head") in roles,
            recomputed=self.recomputed,
        )
        return forward + backward

    def _work(self, lowest: int, positions: Positions) -> Work:
        """Of the layers from ``lowest`` on. Adapters multiply whether they train or not; a share of them is there."""
        own = self.layers[lowest:]
        added = self.adapters * len(own) / len(self.layers)
        return Work((sum(own) + added) * positions.count, self.attention * len(own) * positions.squares)


def work_of(model: Any, layers: LayerMap, *, recomputed: bool) -> ModelWork | None:
    """Counts the multiply-adds of a model of transformers that is not wrapped yet.

    Returns:
        None where they cannot be counted in this way: several stacks of layers (encoder-decoders), parts that read
        images or sound, mixtures of experts, quantised weights, and layers without attention heads.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    if text is not config or len(layers.stacks) > 1 or not isinstance(heads, int) or not isinstance(hidden, int):
        return None
    params = [[p for _, p in unit.params] for unit in layers.layers]
    odd = any(len(shape_of(p)) > 2 or not p.is_floating_point() for own in params for p in own)
    if odd or expert_blocks(model, layers.layers):
        return None
    width = heads * (getattr(text, "head_dim", None) or hidden // heads)
    first = model.get_submodule(layers.layers[0].name)
    causal = any(getattr(module, "is_causal", False) for module in first.modules())
    table = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(table, "weight", None)
    inputs = model.get_input_embeddings() if weight is not None else None
    return ModelWork(
        adapters=sum(math.prod(shape_of(p)) for _, p in adapter_parameters(model) if len(shape_of(p)) == 2),
        layers=tuple(sum(math.prod(shape_of(p)) for p in own if len(shape_of(p)) == 2) for own in params),
        attention=width * (1 if causal else 2),  # a causal query meets half of the keys, on average
        head=0 if weight is None else math.prod(shape_of(weight)),
        tied=weight is not None and weight is getattr(inputs, "weight", None),
        recomputed=recomputed,
    )


def positions_of(batches: Sequence[dict[str, torch.Tensor]]) -> Positions:
    """Counts the positions of micro-batches, which must be in host memory. Without ``input_ids`` there are none."""
    count = padding = squares = 0
    for batch in batches:
        if (ids := batch.get("input_ids")) is None or ids.ndim != 2:
            continue
        rows, length = ids.shape
        count, squares = count + rows * length, squares + rows * length**2
        if (mask := batch.get("attention_mask")) is not None:
            padding += int(mask.numel() - mask.count_nonzero())
    return Positions(count, padding, squares)


class Speed:
    """Says how fast each step was, of all ranks.

    Args:
        work: of the model; None: its FLOPs are not counted.
        dtype: of the weights. The peak is that of 16-bit weights.
    """

    def __init__(self, work: ModelWork | None, device: torch.device, dtype: torch.dtype, ranks: int) -> None:
        self._work, self._ranks = work, ranks
        on_gpu = device.type == "cuda" and dtype.itemsize == 2
        self._peak = peak_of(torch.cuda.get_device_name(device)) if on_gpu else None

    def of_step(
        self, active: Collection[int], roles: Collection[str], positions: Positions, targets: int, seconds: float
    ) -> dict[str, float | None]:
        """Returns the figures of a step that took ``seconds``.

        Args:
            active: numbers of the layers that trained.
            targets: what is counted as tokens if the model does not read tokens.
        """
        read = positions.count - positions.padding if positions.count else targets
        found: dict[str, float | None] = {
            "positions": positions.count,
            "padding": positions.padding,
            "tokens_per_second": read / seconds,
            "flops": None,
            "flops_per_second": None,
            "mfu": None,
        }
        if self._work is not None and positions.count:
            found["flops"] = self._work.flops(active, roles, positions)
            found["flops_per_second"] = rate = found["flops"] / seconds
            if self._peak is not None:
                found["mfu"] = rate / self._peak / self._ranks
        return found


def told(found: dict[str, float | None]) -> str:
    """Says it in a few words: "1,234 tokens/s, 3.2 TFLOP/s, 41% of the peak"."""
    parts = [f"{found['tokens_per_second']:,.0f} tokens/s"]
    if (rate := found["flops_per_second"]) is not None:
        scale, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "G")) if rate >= s), (1e6, "M"))
        parts.append(f"{rate / scale:.3g} {unit}FLOP/s")
    if (mfu := found["mfu"]) is not None:
        parts.append(f"{mfu:.1%} of the peak")
    return ", ".join(parts)
