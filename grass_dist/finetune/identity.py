"""Describes what must be the same on all ranks: versions, model and data, in short texts that ranks compare."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import torch
from torch import nn

from grass_dist.finetune.data.batches import Examples
from grass_dist.finetune.data.loading import Stream
from grass_dist.version import __version__

SAMPLE = 256
"""Most elements that are read of a parameter."""


def versions(*, deepspeed: bool = False) -> dict[str, str]:
    """Returns the versions of the packages that decide what is computed, by the names that an error shows.

    Args:
        deepspeed: whether the backend needs it.
    """
    packages = ["torch", "transformers", "datasets", "numpy", "safetensors"]
    found = {f"version of {name}": _version(name) for name in [*packages, *(["deepspeed"] if deepspeed else [])]}
    found["version of grass-dist"] = __version__  # a checkout that was never installed has it too
    return {**found, "version of python": f"{sys.version_info.major}.{sys.version_info.minor}"}


def model_identity(model: nn.Module) -> dict[str, str]:
    """Tells two models apart within milliseconds, by parameters, configurations and a sample of the weights.

    Call it before the model is wrapped. The weights of a model that ZeRO-3 has loaded in shards are not read.
    """
    parameters = list(model.named_parameters())
    whole = [p for _, p in parameters if not hasattr(p, "ds_id") and not p.is_meta]
    described = "\n".join(f"{name} {_shape(p)} {p.dtype}" for name, p in parameters)
    return {
        "number of parameters": str(sum(math.prod(_shape(p)) for _, p in parameters)),
        "names, shapes and dtypes of the parameters": _hash([described.encode()]),
        "configuration of the model": _hash([_settings(model).encode()]),
        "weights of the model (a sample)": _hash(map(_sample, whole)),
    }


def data_identity(examples: Examples | Stream, name: str = "training examples") -> dict[str, str]:
    """Returns number and hash of tokenised examples; for a stream, which is not read yet, `Stream.identity`.

    It reads all tokens once, in some 7 s for each billion of them.

    Raises:
        ConfigError: a row or a file of a stream cannot be read.
    """
    if isinstance(examples, Stream):
        return examples.identity()
    return {f"number of {name}": str(len(examples)), name: examples.digest()[:16]}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _shape(parameter: nn.Parameter) -> list[int]:
    return list(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty vector in the parameter


def _sample(parameter: nn.Parameter) -> bytes:
    """Returns the exact bytes of elements at a fixed stride, without a copy of a tensor that is not contiguous."""
    count = parameter.numel()
    stride = max(1, -(-count // SAMPLE))
    taken = torch.take(parameter.detach(), torch.arange(0, count, stride, device=parameter.device))
    return taken.cpu().view(torch.uint8).numpy().tobytes()


def _settings(model: nn.Module) -> str:
    """Returns the Hugging Face configuration without what depends on where and how it was loaded; "" without one."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return json.dumps(_lasting(settings), sort_keys=True, default=_as_text)


def _lasting(value: Any) -> Any:
    """Drops volatile entries at any depth: those with a leading underscore are transformers' own bookkeeping."""
    if isinstance(value, dict):
        kept = {str(key): _lasting(entry) for key, entry in value.items()}
        return {key: entry for key, entry in kept.items() if not key.startswith("_") and key != "transformers_version"}
    return [_lasting(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _as_text(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    # Other objects show their address, which differs on each rank.
    return str(value) if isinstance(value, (torch.dtype, os.PathLike)) else type(value).__qualname__


def _hash(parts: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:16]
