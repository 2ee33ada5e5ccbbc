"""The YAML file of a fine-tune: read, with dotted overrides, into a `RunConfig`, and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from grass_dist.errors import ConfigError
from grass_dist.finetune.config import RunConfig
from grass_dist.finetune.deepspeed_config import find_file, merge_grass, read_ds_config
from grass_dist.yaml_files import LARGEST, parse_yaml, read_yaml

_DEEPEST, _MOST_LAYERS = 20, 10**5


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies overrides such as ``train.learning_rate=1e-5``.

    A name with dots in the file means the same: ``parallel: deepspeed`` and ``parallel.config: my.json``. The section
    ``grass`` may stand in the DeepSpeed JSON instead.

    Raises:
        ConfigError: the file, an override or a setting cannot be used.
    """
    try:
        return _read(path, overrides)
    except ConfigError as error:
        raise _in_one_line(error) from None


def _read(path: Path, overrides: Sequence[str]) -> RunConfig:
    data = read_yaml(path, "--config")
    if not isinstance(data, dict):
        raise ConfigError("--config", str(path), "it holds no settings", "see configs/ for examples")
    for key in [key for key in data if "." in key]:
        _put(data, key, data.pop(key), once=True)
    for override in overrides:
        _override(data, override)
    settings = _with_json(data, path.parent)
    _check_names(settings)
    _check_layers(settings.get("grass"))
    return RunConfig(**settings)


def _check_names(settings: dict[str, Any], above: str = "") -> None:
    """Keeps out the one name that Python cannot give a model, and texts that no file and no terminal takes."""
    for key, value in settings.items():
        if key == "self":
            raise ConfigError(f"{above}{key}", value, "there is no such setting", "leave it out")
        if isinstance(value, dict):
            _check_names(value, f"{above}{key}.")
        if isinstance(value, str) and (problem := _unwritable(value)):
            raise ConfigError(f"{above}{key}", value, problem, "leave that character out")


def _unwritable(text: str) -> str:
    """Says why a text can be neither a file's name nor written, or nothing."""
    if "\0" in text:
        return "it has a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "it has half a surrogate pair"
    return ""


def _in_one_line(error: ConfigError) -> ConfigError:
    """The same error with no more of what stands in the file than one can read."""
    parts = (" ".join(text.split()) for text in (error.field, error.problem, error.fix))
    plain = ("".join(c if c.isprintable() else "?" for c in part) for part in parts)
    field, problem, fix = (part if len(part) <= 200 else f"{part[:120]}..." for part in plain)
    return ConfigError(field, error.value, problem, fix)


def _check_layers(grass: Any) -> None:
    """Keeps out layers for which a sampler would fill the memory, or that it cannot count."""
    for name in ("active_layers", "fixed_layers") if isinstance(grass, dict) else ():
        value = grass.get(name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not 0 <= number <= _MOST_LAYERS:
                raise ConfigError(f"grass.{name}", value, f"no model has a layer {number}", "count layers from 0")


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


def as_yaml(value: Any) -> str:
    """A value as the file writes it, in one line: null, not None."""
    return " ".join(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("...\n").split())


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError("override", override, "it is not of the form section.field=value", "write it like that")
    _put(data, key, parse_yaml(text, key, text, "quote it") if text else None)


def _put(data: dict[str, Any], key: str, value: Any, *, once: bool = False) -> None:
    """Sets ``value`` at a dotted name; if ``once``, nothing may be there."""
    *path, last = key.split(".")
    if len(path) > _DEEPEST:
        raise ConfigError(key, value, f"no setting has {len(path)} dots", "write it as it stands in configs/")
    at: dict[str, Any] = data
    for part in path:
        below: Any = at.get(part)
        if isinstance(below, str) and part == "parallel":  # parallel: fsdp2, then parallel.mesh.replicate=2
            below = {"backend": below}
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise ConfigError(key, value, f"{part} is {below!r} in the file, not a section", f"override {part} itself")
        at[part] = below
        at = below
    if once and last in at:
        problem = f"the file sets it twice, as {key} and within a section"
        raise ConfigError(key, value, problem, "keep one of them")
    at[last] = value


def _with_json(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings with the path of their DeepSpeed JSON made absolute and its ``"grass"`` merged in."""
    parallel, grass = data.get("parallel"), data.get("grass")
    if not isinstance(parallel, dict) or parallel.get("backend") != "deepspeed":
        return data
    if not isinstance(name := parallel.get("config"), str) or not isinstance(grass, dict | None):
        return data  # refused where every other wrong type is
    try:
        file = find_file(name, folder)
        if (size := file.stat().st_size) > LARGEST:
            raise ConfigError("parallel.config", name, f"it has {size} bytes", "give a file of settings, not of data")
        merged = merge_grass(read_ds_config(file), grass)
    except (OSError, RecursionError) as error:
        problem = f"it cannot be read ({getattr(error, 'strerror', None) or error})"
        raise ConfigError("parallel.config", name, problem, "give the path of a DeepSpeed JSON") from None
    return {**data, "parallel": {**parallel, "config": str(file)}, **({} if merged is None else {"grass": merged})}
