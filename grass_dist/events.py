"""What a run tells: its observers of its start, of refreshes and draws, and what moving states and weights has cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Started:
    """What a run trains, told once before anything else to observers with a method ``started``. Names are FQNs."""

    stacks: tuple[str, ...]
    """The lists of layers."""
    layers: tuple[str, ...]
    """The layers that compete, in the order of their indices."""
    num_layers: int
    """Layers of the stacks, those that do not compete included."""
    roles: Mapping[str, tuple[str, ...]]
    """What trains at every step: for each role the names of its parameters."""
    frozen: tuple[str, ...]
    """What never trains: layers, roles, and modules for other parameters."""
    frozen_share: float
    """The share of its elements among all of the model's."""
    left_out: tuple[str, ...] = ()
    """Modules and parameters with ``requires_grad`` that were not given to this optimizer: it never trains them."""


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
    """The probabilities by which they were drawn."""
    drawn_at: int
    """`step` at which they were drawn: `draw_ahead` steps earlier, but for the first draw."""


@dataclass(slots=True)
class Traffic:
    """What the transfers of this rank have cost since the start: those of states, and of weights that rest in host
    memory (``grass.offload.weights``)."""

    bytes_to_device: int = 0
    """Bytes of states."""
    bytes_to_host: int = 0
    copies: int = 0
    seconds: float = 0.0
    """Time in which copies ran, those that have ended; both directions added up."""
    waited: float = 0.0
    """Time in which the compute stood still because a state, or weights, had not come."""
    weight_bytes_to_device: int = 0
    """Bytes of weights, which are not among `bytes_to_device`; the other fields count both."""
    weight_bytes_to_host: int = 0

    @property
    def hidden(self) -> float:
        """Share of the copies' time that ran beside the compute: 1 if nothing ever waited."""
        return max(0.0, 1 - self.waited / self.seconds) if self.seconds else 1.0


Event = Refreshed | Sampled
Observer = Callable[[Event], None]
"""Called with each event. If it has a method ``started``, that is called once with a `Started`: a function that tells
two events apart need not know of it."""
