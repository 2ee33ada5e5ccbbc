"""Weights that several modules share: embeddings and head, or blocks of some layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from grass_dist.model.discovery import Unit
from grass_dist.model.stacks import bare_name
from grass_dist.model.units import shown_names


def tied_weights(model: nn.Module, units: Iterable[Unit]) -> str | None:
    """Returns a sentence on the weights of ``units`` that have several names, or None if there are none."""
    ours = {id(param) for unit in units for _, param in unit.params}
    first: dict[int, str] = {}
    pairs: dict[str, None] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if id(param) not in ours:
            continue
        if (known := first.setdefault(id(param), name)) != name:
            later, earlier = _apart(bare_name(name), bare_name(known))
            pairs[f"{later} has weights of {earlier}"] = None
    if not pairs:
        return None
    return f"Tied: {shown_names(list(pairs))}. A tied weight trains once, with the layer or role of its first name."


def _apart(later: str, earlier: str) -> tuple[str, str]:
    """Two names without the parts at the end that are the same."""
    ours, theirs = later.split("."), earlier.split(".")
    while len(ours) > 1 and len(theirs) > 1 and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return ".".join(ours), ".".join(theirs)
