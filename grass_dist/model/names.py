"""Parameters by the FQNs and patterns that a user writes, and what `GrassConfig.freeze` names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from grass_dist.config import GrassConfig
from grass_dist.errors import ConfigError
from grass_dist.model.stacks import bare_name


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is that of a parameter, or of a module around it. Both are without the prefixes of wrappers."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))


def near(pattern: str, names: Iterable[str], more: Sequence[str] = ()) -> str:
    """How to mend a pattern that matches nothing, from the names of parameters and ``more`` that may be written."""
    parts = [name.split(".") for name in names]
    known = dict.fromkeys([*more, *(".".join(p[:n]) for p in parts for n in range(1, len(p) + 1))])
    last = pattern.rpartition(".")[2]
    like = difflib.get_close_matches(pattern, known, n=3) + [n for n in known if n.rpartition(".")[2] == last]
    return f"use {' or '.join(map(repr, dict.fromkeys(like[:3] or more or list(known)[:3])))}"


def freeze_named(model: nn.Module, config: GrassConfig) -> str | None:
    """Freezes what ``config.freeze`` names. It comes before the layers are looked for.

    Returns:
        A sentence on patterns that match nothing, or None.

    A list may have patterns for several models: one with ``*`` may match nothing if another entry does match.

    Raises:
        ConfigError: a name matches no parameter, or no pattern does.
    """
    if not config.freeze:
        return None
    names = [(bare_name(name), p) for name, p in model.named_parameters(remove_duplicate=False)]
    found = {pattern: [p for name, p in names if matches(bare_name(pattern), name)] for pattern in config.freeze}
    for pattern, hit in found.items():
        if not hit and not ("*" in pattern and any(found.values())):
            problem = "no module or parameter of the model has that name"
            raise ConfigError("freeze", pattern, problem, near(pattern, [name for name, _ in names]))
        for p in hit:
            p.requires_grad_(False)
    if not (idle := [repr(pattern) for pattern, hit in found.items() if not hit]):
        return None
    return f"freeze: {', '.join(idle)} matches nothing in this model; the other entries do."
