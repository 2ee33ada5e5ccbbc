"""What a `torch.amp.GradScaler` and the method know of each other."""

from __future__ import annotations

import inspect

import torch

from grass_dist.backends.base import HookedBackend
from grass_dist.errors import GrassError
from grass_dist.method.controller import GrassController


def asking_scaler() -> torch.amp.GradScaler | None:
    """The scaler whose ``step`` has asked for the attribute whose property calls this; None if another code has.

    `GradScaler.step` reads ``optimizer._step_supports_amp_scaling`` before it unscales gradients, and calls
    ``optimizer.step`` only if all are finite. It is the only moment at which a scaler shows itself to an optimizer.
    Private, and so is the frame that this reads. Checked on torch 2.13; `tests/test_private_interfaces.py` fails when
    it changes.
    """
    frame = inspect.currentframe()
    for _ in range(2):  # the property, and what has read it
        frame = frame.f_back if frame is not None else None
    scaler = frame.f_locals.get("self") if frame is not None else None
    return scaler if isinstance(scaler, torch.amp.GradScaler) else None


class LossScaling:
    """The scaler of a loop, from its call of ``step`` on: the measured norms are those of unscaled losses.

    Args:
        in_backward: whether layers are updated before a scaler can unscale their gradients.
    """

    def __init__(self, backend: HookedBackend, grass: GrassController, *, in_backward: bool) -> None:
        self._backend, self._grass, self._in_backward = backend, grass, in_backward
        self._scaler: torch.amp.GradScaler | None = None  # that is about to step, or has skipped the step

    def begin(self, scaler: torch.amp.GradScaler) -> None:
        """``scaler`` unscales the gradients and looks whether they are finite; if they are, the step follows.

        Raises:
            GrassError: layers have been updated by gradients that were scaled.
        """
        if self._in_backward:
            raise GrassError(
                "A GradScaler unscales gradients after the backward, and grass.offload.update_in_backward has updated "
                "layers by then: set it to False, or train in bfloat16 without a scaler."
            )
        self._grass.finish_gradients()
        self._scaler = scaler
        self._backend.expect_step(self.skip)

    def take(self) -> torch.Tensor | None:
        """The factor of the losses of a step that is applied, an fp64 scalar on the gradients' device; None without a
        scaler. The host does not wait for it.
        """
        scaler, self._scaler = self._scaler, None
        if scaler is None:
            return None
        device = self._backend.sharding.weights_come_to or self._grass.layers[0].params[0][1].device
        scaled = scaler.scale(torch.ones((), device=device))
        assert isinstance(scaled, torch.Tensor)
        return scaled.double()

    def restart(self) -> None:
        """The step begins anew; one that a scaler has not applied is counted."""
        self._grass.restart() if self._scaler is None else self.skip()

    def skip(self) -> None:
        """The step is not applied."""
        self._scaler = None
        self._grass.skip_step()
