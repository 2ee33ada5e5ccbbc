"""The YAML file of a fine-tune: read, with dotted overrides, into a `RunConfig`, and written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from grass_dist.errors import ConfigError
from grass_dist.training.config import RunConfig
from grass_dist.training.deepspeed_config import find_file, merge_grass, read_json

LARGEST = 2**20
"""Characters of a configuration file, at most."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies overrides such as ``train.learning_rate=1e-5``.

    A name with dots in the file means the same: ``parallel: deepspeed`` and ``parallel.config: my.json``. The section
    ``grass`` may stand in the DeepSpeed JSON instead.

    Raises:
        ConfigError: the file, an override or a setting cannot be used.
    """
    try:
        data = yaml.load(_text_of(path), _Loader)
    except OSError as error:
        raise ConfigError(
            "--config", str(path), f"it cannot be read ({error.strerror})", "give an existing file"
        ) from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise ConfigError("--config", str(path), f"it is not YAML: {where}", "correct it there") from None
    if not isinstance(data, dict):
        raise ConfigError("--config", str(path), "it holds no settings", "see configs/ for examples")
    data = {str(key): value for key, value in data.items()}
    for key in [key for key in data if "." in key]:
        _put(data, key, data.pop(key))
    for override in overrides:
        _override(data, override)
    return RunConfig(**_with_json(data, path.parent))


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted name."""
    return flatten(config.model_dump(mode="json"))


def flatten(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{above}.{key}" if above else str(key)
        flat |= flatten(value, name) if isinstance(value, dict) else {name: value}
    return flat


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _text_of(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise ConfigError(
            "--config", str(path), f"it is longer than {LARGEST} characters", "give a file of settings, not of data"
        )
    return text


class _Loader(yaml.SafeLoader):
    """YAML whose 1e-5 is a number (YAML 1.2), where PyYAML's 1.1 wants 1.0e-5; without aliases.

    A few lines of aliases can stand for a structure that fills any memory.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses an alias (*name), which a configuration may not")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError("override", override, "it is not of the form section.field=value", "write it like that")
    try:
        value = yaml.load(text, _Loader) if text else None
    except yaml.YAMLError:
        raise ConfigError(key, text, "the value is not YAML", "quote it") from None
    _put(data, key, value)


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    """Sets ``value`` at a dotted name."""
    *path, last = key.split(".")
    at: dict[str, Any] = data
    for part in path:
        below: Any = at.get(part)
        if isinstance(below, str) and part == "parallel":  # parallel: ddp, then parallel.replicate=2
            below = {"backend": below}
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise ConfigError(key, value, f"{part} is {below!r} in the file, not a section", f"override {part} itself")
        at[part] = below
        at = below
    at[last] = value


def _with_json(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings with the path of their DeepSpeed JSON made absolute and its ``"grass"`` merged in."""
    parallel, grass = data.get("parallel"), data.get("grass")
    if not isinstance(parallel, dict) or parallel.get("backend") != "deepspeed":
        return data
    if not isinstance(name := parallel.get("config"), str) or not isinstance(grass, dict | None):
        return data  # refused where every other wrong type is
    file = find_file(name, folder)
    merged = merge_grass(read_json(file), grass)
    return {**data, "parallel": {**parallel, "config": str(file)}, **({} if merged is None else {"grass": merged})}
