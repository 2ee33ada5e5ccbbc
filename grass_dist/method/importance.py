"""Importance of a layer, and the probability that it is sampled: pure arithmetic on host arrays in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from grass_dist.config import EffectiveLayers
from grass_dist.errors import ConfigError

FloatArray = NDArray[np.float64]


def mean_gradient_norm(squares: FloatArray, numel: FloatArray) -> FloatArray:
    """RMS gradient of each layer at each step, ``sqrt(||g||^2 / N_l)`` (paper section 3.1, MGN for one step).

    Args:
        squares: sums of squared gradient entries, shape (steps, layers).
        numel: parameter counts N_l, broadcastable to ``squares``.
    """
    return np.sqrt(squares / numel)


def sampling_probabilities(
    importances: FloatArray, *, temperature: float | EffectiveLayers, scale: str = "mean", exploration: float = 0.0
) -> FloatArray:
    """``p_l = (1 - ε) exp(m_l / τ) / Σ_i exp(m_i / τ) + ε / L`` (paper section 3.2, where ε = 0).

    Args:
        importances: m_l, shape (L,); NaN where a layer has not been measured yet: such a layer counts as an
            average one.
        temperature: τ, or the effective layers that it is to give; see `temperature_for`.
        scale: "mean" divides m by its mean over the layers first, "none" does not.
        exploration: ε.

    Returns:
        float64 array of shape (L,) that sums to one.

    Raises:
        ConfigError: τ is so small that a probability is 0 in float64, so that its layer could never train.
    """
    known = ~np.isnan(importances)
    if not known.any():
        return np.full(len(importances), 1.0 / len(importances))
    mean = importances[known].mean()
    m = np.where(known, importances, mean)
    if scale == "mean":
        m = m / mean if mean > 0 else np.ones_like(m)
    if isinstance(temperature, EffectiveLayers):
        temperature = temperature_for(m, temperature.effective_layers)
    p = (1 - exploration) * _softmax(m, temperature) + exploration / len(m)
    if (p < np.finfo(np.float64).tiny).any():
        lowest = int(p.argmin())
        raise ConfigError(
            "temperature",
            temperature,
            f"the sampling probability of layer {lowest} underflows to {p[lowest]:.3g}, so it would never train",
            f"use some exploration, or a temperature of at least {np.ptp(m) / LARGEST_SPREAD:.3g}",
        )
    return p


LARGEST_SPREAD = 600.0
"""Difference of two logits at which no probability underflows in float64."""


def _softmax(m: FloatArray, temperature: float) -> FloatArray:
    weights = np.exp((m - m.max()) / temperature)
    return weights / weights.sum()


def temperature_for(m: FloatArray, effective: float) -> float:
    """The τ at which exp of the entropy of ``softmax(m / τ)`` is ``effective``, by bisection of log τ.

    The entropy rises with τ, from that of a draw among the largest layers alone to that of a uniform one. Where it
    cannot be had, because several layers are equally important or all are, it is the nearest: the lowest τ without an
    underflow. Multiplying m by a number multiplies τ by it, so that p does not depend on the scale of m.

    Args:
        m: importances of shape (L,), without NaN.
        effective: from 1 to L.
    """
    spread = float(np.ptp(m))
    if spread == 0:
        return 1.0
    low, high = spread / LARGEST_SPREAD, spread * HIGHEST
    if effective_layers(_softmax(m, low)) >= effective:
        return low
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high)
        if effective_layers(_softmax(m, middle)) < effective:
            low = middle
        else:
            high = middle
    return high


HIGHEST = 1e8
"""τ over the spread of the importances at which probabilities are equal but for 1e-8."""
BISECTIONS = 80
"""Halvings of log τ, whose range of 25 has no more bits in float64."""


def entropy(probabilities: Sequence[float] | FloatArray) -> float:
    """The entropy of probabilities of shape (L,), in nats; it is ln L if they are equal."""
    p = np.asarray(probabilities, dtype=np.float64)
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def effective_layers(probabilities: Sequence[float] | FloatArray) -> float:
    """How many layers of equal probability would have the same entropy, from 1 to L."""
    return float(np.exp(entropy(probabilities)))


class ImportanceTracker:
    """The importances m_l of all layers and how measurements change them (paper section 3.2).

    Args:
        numel: N_l, the parameter count of each layer over all shards, length L.
        ema_alpha: α, the weight of the newest measurement.
    """

    def __init__(self, numel: Sequence[int], ema_alpha: float) -> None:
        self.numel = np.asarray(numel, dtype=np.float64)
        self.ema_alpha = ema_alpha
        self.importances: FloatArray = np.full(len(numel), np.nan)
        self.dropped = 0
        """Steps whose measurement was thrown away because a norm in it was not finite."""

    def observe(self, squares: FloatArray, layers: Sequence[Sequence[int]]) -> None:
        """Takes the measurements of some steps in.

        A step with a non-finite entry is dropped whole. Each measured layer then moves to
        ``α · measured + (1 - α) · old`` where *measured* is its mean over the steps in which it was active;
        its first measurement is taken as it is. A layer that was not active keeps its importance.

        Args:
            squares: sums of squares of the *global* batch's gradient, shape (steps, γ).
            layers: for each step the layer indices that the first columns stand for; where they are fewer than γ, the
                other columns are 0.
        """
        finite = np.isfinite(squares).all(axis=1)
        self.dropped += int((~finite).sum())
        total, count = np.zeros(len(self.numel)), np.zeros(len(self.numel))
        for step in np.flatnonzero(finite).tolist():
            active = list(layers[step])
            total[active] += mean_gradient_norm(squares[step, : len(active)], self.numel[active])
            count[active] += 1
        seen = count > 0
        measured = total[seen] / count[seen]
        old = self.importances[seen]
        moved = self.ema_alpha * measured + (1 - self.ema_alpha) * old
        self.importances[seen] = np.where(np.isnan(old), measured, moved)

    def replace(self, squares: FloatArray) -> None:
        """Sets all importances at once from sums of squares of shape (L,), as for weight norms."""
        if np.isfinite(squares).all():
            self.importances = mean_gradient_norm(squares, self.numel)
        else:
            self.dropped += 1

    def state_dict(self) -> dict[str, object]:
        return {"importances": self.importances.tolist(), "dropped": self.dropped}

    def load_state_dict(self, state: dict) -> None:
        self.importances = np.asarray(state["importances"], dtype=np.float64)
        self.dropped = int(state["dropped"])
