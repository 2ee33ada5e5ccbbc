"""The loss scale of a ZeRO optimizer, as DeepSpeed's optimizers without ZeRO show theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LossScale:
    """The names are those of DeepSpeed's ``LossScaleConfig``; settings of a dynamic scale are None without one.

    Attributes:
        cur_scale: factor of the loss now.
        scale_window: steps without an overflow after which it grows by ``scale_factor``.
    """

    cur_scale: float
    dynamic_loss_scale: bool
    use_grad_scaling: bool
    scale_factor: float | None
    scale_window: int | None
    min_loss_scale: float | None


def loss_scale_of(zero: Any) -> LossScale:
    """The scale of ``zero`` as it is now; a copy."""
    scale, dynamic, scaler = float(zero.loss_scale), bool(zero.dynamic_loss_scale), zero.loss_scaler
    return LossScale(
        cur_scale=scale,
        dynamic_loss_scale=dynamic,
        use_grad_scaling=dynamic or scale != 1.0,
        scale_factor=getattr(scaler, "scale_factor", None),
        scale_window=getattr(scaler, "scale_window", None),
        min_loss_scale=getattr(scaler, "min_scale", None),
    )
