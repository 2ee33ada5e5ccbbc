"""A model by a configuration that somebody else may have made: nothing that it names is run, imported or downloaded.

Such a ``config.json`` can name code that comes with it (``auto_map``), repositories of the Hub (``_name_or_path``, a
kernel as the implementation of attention, a backbone with its weights) and model types that only foreign code knows.
Here transformers' own class is taken, by ``model_type`` and sizes alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grass_dist.errors import GrassError
from grass_dist.regular_files import read_regular

LARGEST = 2**22
"""Bytes of a ``config.json``, at most."""
MOST_LAYERS = 10_000
CODE = "auto_map"
"""The key by which a configuration names the code that comes with it."""

_NAMES_CODE = {CODE, "custom_pipelines", "kernel_config", "use_kernels", "_commit_hash", "dtype", "torch_dtype"}
_NAMES_CODE |= {"_name_or_path", "name_or_path", "attn_implementation", "_attn_implementation"}
_NAMES_CODE |= {"_attn_implementation_internal", "_attn_implementation_autoset", "experts_implementation"}
_NAMES_CODE |= {"_experts_implementation", "_experts_implementation_internal"}
"""What is left out at any depth. The implementation and the dtype are the caller's to choose."""
_COUNTS_LAYERS = re.compile(r"(?:layers?|blocks|depth)$")


class ForeignModel(GrassError, ValueError):
    """A configuration for which no model can be made; the text is a reason without a full stop."""


def read_settings(file: Path) -> dict[str, Any]:
    """What a ``config.json`` holds.

    Raises:
        ForeignModel: it cannot be read, is not a file, is too large, or is not JSON of a model.
    """
    try:
        settings = json.loads(read_regular(file, LARGEST, follow=True))  # the Hub's cache is made of links
    except OSError as error:
        raise ForeignModel(f"{file}: {_as_reason(error.strerror or error)}") from None
    except (ValueError, RecursionError) as error:
        raise ForeignModel(f"{file} is not JSON: {_as_reason(error)}") from None
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ForeignModel(f"{file} is no config.json with a model_type")
    return settings


def plain_config(settings: Mapping[str, Any]) -> Any:
    """The configuration of transformers' own class, without anything that could have code run or downloaded.

    Raises:
        ForeignModel: transformers itself has no such model, or cannot make its configuration of these settings.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        also = ", and the code that comes with the model is not run" if CODE in settings else ""
        raise ForeignModel(f"transformers {transformers.__version__} has no model_type {kind!r:.60}{also}")
    if (deep := too_deep(settings)) is not None:
        raise ForeignModel(deep)
    if named := _elsewhere(settings):
        raise ForeignModel(f"it takes a part of the model from elsewhere, {named[0]} = {named[1]!r:.60}")
    try:
        config = CONFIG_MAPPING[kind].from_dict(_plain(settings))
        depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    except Exception as error:  # whatever a class makes of values that nobody has checked
        raise ForeignModel(f"transformers cannot read it ({_as_reason(error)})") from None
    if depth is not None and (not isinstance(depth, int) or not 0 < depth <= MOST_LAYERS):
        raise ForeignModel(f"it has {depth!r:.40} layers")
    return config


def too_deep(settings: Mapping[str, Any]) -> str | None:
    """Why a model of so many layers is not made, in a few words; to make one of a billion has no end.

    Before transformers makes its configuration of them, which may have a list entry for each.
    """
    for name, value in settings.items():
        if isinstance(value, Mapping):
            if (deep := too_deep(value)) is not None:
                return deep
        elif isinstance(value, int) and value > MOST_LAYERS and _COUNTS_LAYERS.search(name):
            return f"it has {value!r:.40} layers by its {name:.40}"
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: _plain(entry) for key, entry in value.items() if key not in _NAMES_CODE}
        return {key: False if key == "use_pretrained_backbone" else entry for key, entry in kept.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _elsewhere(value: Any) -> tuple[str, str] | None:
    """The key and value by which settings name a model that transformers, or timm, would ask the Hub for."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if isinstance(entry, str) and (key == "backbone" or (key == "architecture" and ":" in entry)):
                return key, entry
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return next((found for entry in entries if (found := _elsewhere(entry))), None)


def _as_reason(error: object) -> str:
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 160 else text[:157] + "..."
