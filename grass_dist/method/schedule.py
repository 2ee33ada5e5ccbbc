"""When what happens: the method's clock, in optimizer steps (paper section 3; docs/method.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Phase = Literal["probe", "train"]


def too_short_for(layers: Sequence[int], num_layers: int, sampler: str) -> str | None:
    """What a run says at its end of ``layers``, which have not trained in any step; None if there is nothing to say."""
    if not layers or sampler in ("fixed", "middle"):
        return None
    named = ", ".join(map(str, layers)) if len(layers) <= 40 else f"{', '.join(map(str, layers[:40]))} and others"
    return (
        f"{len(layers)} of {num_layers} layers never trained ({named}): no draw of this run chose them. More steps, a "
        "smaller grass.sampling_interval or more grass.active_layers give every layer a turn."
    )


@dataclass(frozen=True, slots=True)
class Schedule:
    """Answers, for a number of completed optimizer steps, what is due before the next one.

    Training step ``s`` is optimizer step ``probe_steps + s``. Layers switch at multiples of T_s. They are drawn, and
    the importances refreshed, ``lead`` steps before that (before multiples of T_u), so that their states can come in
    time; only the first draw is made at its switch. Where a refresh and a draw fall on the same step, the refresh
    comes first, so that the draw uses the new probabilities.
    """

    probe_steps: int
    """T_p."""
    update_interval: int
    """T_u."""
    sampling_interval: int
    """T_s."""
    lead: int = 0
    """Below T_u and T_s."""

    def phase(self, step: int) -> Phase:
        """Phase of the optimizer step that follows ``step`` completed ones."""
        return "probe" if step < self.probe_steps else "train"

    def round(self, step: int) -> int:
        """Number of the draw whose layers train after ``step`` completed steps; -1 in the probe."""
        return -1 if step < self.probe_steps else (step - self.probe_steps) // self.sampling_interval

    def probe_ends(self, step: int) -> bool:
        return step == self.probe_steps > 0

    def refresh_due(self, step: int) -> bool:
        """Whether training steps have been measured and a multiple of T_u is ``lead`` steps away."""
        trained = step - self.probe_steps
        return trained > 0 and (trained + self.lead) % self.update_interval == 0

    def draw_due(self, step: int) -> bool:
        """Whether layers are drawn: those of round ``round_drawn(step)``."""
        trained = step - self.probe_steps
        return trained == 0 or (trained > 0 and (trained + self.lead) % self.sampling_interval == 0)

    def round_drawn(self, step: int) -> int:
        """Number of the draw that is the latest after ``step`` completed steps; -1 in the probe."""
        trained = step - self.probe_steps
        return -1 if trained < 0 else (trained + self.lead) // self.sampling_interval

    def switch_due(self, step: int) -> bool:
        """Whether other layers train from the next step on: at the first training step and every T_s after it."""
        trained = step - self.probe_steps
        return trained >= 0 and trained % self.sampling_interval == 0

    def steps_to_switch(self, step: int) -> int:
        """Optimizer steps until the next switch: 1 to T_s in training."""
        return self.sampling_interval - max(0, step - self.probe_steps) % self.sampling_interval
