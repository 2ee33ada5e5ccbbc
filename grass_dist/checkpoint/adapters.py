"""The weights of a checkpoint that has adapters, as a model without them: merged, or with the adapters apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from grass_dist.checkpoint import files
from grass_dist.checkpoint.dcp import TensorReader
from grass_dist.checkpoint.loading import Checkpoint
from grass_dist.errors import CheckpointError
from grass_dist.model.adapters import NAME, merged, plain_name

ADAPTER, CONFIG = "adapter", "adapter_config.json"
"""The folder of adapters that are kept apart, and the file of their settings."""

_FACTOR = re.compile(rf"(.+)\.lora_([AB])\.{NAME}\.weight")


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the model."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    numel: int
    source: str | None = None
    """Its key in the checkpoint, where that is another one."""
    factors: tuple[Weight, Weight] | None = None
    """A and B of the adapter that is merged into it."""
    scale: float = 1.0
    """Factor of what they add."""
    transposed: bool = False
    """Whether it is (in, out) and not (out, in)."""

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Adapter:
    """Adapters that are kept apart: what peft reads from a folder."""

    config: dict[str, Any]
    weights: Sequence[Weight]


def take_adapters(
    checkpoint: Checkpoint, weights: Sequence[Weight], *, apart: bool
) -> tuple[list[Weight], Adapter | None]:
    """The weights of the plain model, under its names, and the adapters if they are kept ``apart``.

    Raises:
        CheckpointError: there are no adapters to keep apart, or some without their settings or without weights.
    """
    factors = {(found[1], found[2]): w for w in weights if (found := _FACTOR.fullmatch(w.key))}
    if not factors:
        if apart:
            raise CheckpointError(f"{checkpoint.folder} has no adapters (grass.adapters); leave --adapters out.")
        return list(weights), None
    config = _settings(checkpoint)
    scale, turned = config["lora_alpha"] / config["r"], bool(config.get("fan_in_fan_out"))
    of, modules = {w.key: w for w in factors.values()}, {module for module, _ in factors}
    plain = []
    for weight in weights:
        if weight.key in of:
            continue
        module, under, leaf = weight.key.rpartition(".base_layer.")
        named = weight
        if under and module in modules:
            named = replace(weight, key=plain_name(weight.key, module), source=weight.key)
        if named is weight or leaf != "weight":
            plain.append(named)
            continue
        a, b = factors.pop((module, "A"), None), factors.pop((module, "B"), None)
        if a is None or b is None or (shape := _fits(weight, a, b, turned)) is None:
            raise CheckpointError(f"{checkpoint.folder}: the adapter of {module!r:.80} does not fit its weight.")
        plain.append(named if apart else replace(named, factors=(a, b), scale=scale, transposed=shape))
    if factors:
        raise CheckpointError(f"{checkpoint.folder} has an adapter of {next(iter(factors))[0]!r:.80}, and no weight.")
    renamed = [replace(w, key=f"base_model.model.{w.key.replace(f'.{NAME}.', '.')}", source=w.key) for w in of.values()]
    return plain, Adapter({**config, "inference_mode": True}, renamed) if apart else None


def read_weights(reader: TensorReader, weights: Sequence[Weight]) -> list[torch.Tensor]:
    """Reads weights, with their adapters merged into them."""
    every = [w for weight in weights for w in (weight, *(weight.factors or ()))]
    flat = {w.source or w.key: torch.empty(w.numel, dtype=w.dtype) for w in every}
    reader.read_all([(key, 0, tensor) for key, tensor in flat.items() if tensor.numel()])

    def shaped(weight: Weight) -> torch.Tensor:
        return flat[weight.source or weight.key].view(weight.shape)

    found = []
    for weight in weights:
        tensor = shaped(weight)
        if weight.factors is not None:
            a, b = map(shaped, weight.factors)
            tensor = merged(tensor, a, b, weight.scale, transposed=weight.transposed)
        found.append(tensor)
    return found


def _fits(weight: Weight, a: Weight, b: Weight, turned: bool) -> bool | None:
    """Whether a weight is transposed; None if the adapter is not one of it. Only a square one has to be told."""
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        return None
    shape = (b.shape[0], a.shape[1])
    if weight.shape == shape:
        return turned and shape[0] == shape[1]
    return True if weight.shape == shape[::-1] else None


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: the checkpoint has no usable settings of its adapters.
    """
    name = f"{files.MODEL}/{CONFIG}"
    config = files.read_json(checkpoint.folder / name) if name in checkpoint.manifest.files else None
    if isinstance(config, dict):
        numbers = [config.get(key) for key in ("r", "lora_alpha")]
        if all(isinstance(n, int | float) and not isinstance(n, bool) and 0 < n < 2**31 for n in numbers):
            return config
    raise CheckpointError(f"{checkpoint.folder} has adapters, and no usable {name} that says their scale.")
