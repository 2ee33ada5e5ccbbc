"""Errors that a user sees: one sentence each, with the field, the value and the fix."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any


class GrassError(Exception):
    """Base class of every error that grass_dist raises on purpose.

    Every one of them can be pickled, with its attributes: an error in a worker process reaches its parent.
    """

    on_every_rank = False
    """Whether all ranks are known to raise it, so that one of them may speak for all."""

    def __reduce__(self) -> tuple[Callable[..., GrassError], tuple[Any, ...]]:
        attributes = {name: _portable(value) for name, value in self.__dict__.items()}
        return _rebuild, (type(self), self.args, attributes)


class ConfigError(GrassError, ValueError):
    """A setting that cannot work.

    Args:
        field: dotted name of the setting, e.g. ``"grass.active_layers"``.
        value: what it was set to.
        problem: what is wrong with it, without a full stop.
        fix: what to write instead, without a full stop.
    """

    def __init__(self, field: str, value: Any, problem: str, fix: str) -> None:
        self.field, self.value, self.problem, self.fix = field, value, problem, fix
        sentence = f"{shorten(field, 80)}={shorten(repr(value), 80)}: {problem}; {fix}."
        super().__init__("".join(c if c.isprintable() else "?" for c in " ".join(sentence.split())))

    def under(self, prefix: str) -> ConfigError:
        """The same error, with its field below ``prefix``."""
        field = f"{prefix}.{self.field}" if self.field else prefix
        return ConfigError(field, self.value, self.problem, self.fix)


class UnsupportedModel(GrassError, ValueError):
    """A model, or a way of wrapping it, that this version cannot train layer by layer."""


class CheckpointError(GrassError, RuntimeError):
    """A checkpoint that cannot be written, or that is damaged, foreign or of another run."""

    def everywhere(self) -> CheckpointError:
        """The same error, known to be raised by all ranks."""
        self.on_every_rank = True
        return self


class StateError(GrassError, ValueError):
    """A state dict that an optimizer cannot go on from."""


class RanksDisagree(GrassError, RuntimeError):
    """Ranks that must be identical (configuration, model, importances, choice of layers) are not."""

    on_every_rank = True


def shorten(text: str, limit: int) -> str:
    """A text of at most ``limit`` characters; a longer one keeps its beginning and its end, which often tells more."""
    if len(text) <= limit:
        return text
    end = (limit - 3) // 2
    return f"{text[: limit - 3 - end]}...{text[-end:]}"


def _rebuild(cls: type[GrassError], args: tuple[Any, ...], attributes: Mapping[str, Any]) -> GrassError:
    """An error as it was, whatever the arguments of its class's constructor are."""
    error = cls.__new__(cls, *args)
    error.__dict__.update(attributes)
    return error


def _portable(value: Any) -> Any:
    """``value``, or its text where it cannot be pickled: a setting may be set to anything."""
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:
        return repr(value)
    return value
