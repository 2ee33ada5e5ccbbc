"""What observers of a run are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refreshed:
    """The probe has ended, or a window of measured steps: importances and probabilities are new."""

    step: int
    """Optimizer steps completed."""
    importances: tuple[float, ...]
    """m_l for each layer; NaN where it has not been measured."""
    probabilities: tuple[float, ...]
    dropped: int
    """Steps whose measurement was not finite, since the start."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """Other layers have been drawn, and train from the next step on."""

    step: int
    """Optimizer steps completed."""
    round: int
    active_layers: tuple[int, ...]
    probabilities: tuple[float, ...]
    """By which they were drawn."""
    drawn_at: int
    """`step` at which they were drawn: `draw_ahead` steps earlier, but for the first draw."""


Event = Refreshed | Sampled
Observer = Callable[[Event], None]
