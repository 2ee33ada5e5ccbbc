"""What each step of a run costs one rank."""

from __future__ import annotations

from typing import Any, Protocol

from grass_dist.method.controller import GrassController


class Stepping(Protocol):
    """What trains by GRASS and holds states: a `GrassOptimizer`, one of ZeRO, a run of the training program."""

    @property
    def grass(self) -> GrassController:
        """The method's controller."""
        ...

    @property
    def state_bytes(self) -> int:
        """Bytes of device memory of this rank for optimizer states, with free slots."""
        ...

    @property
    def host_state_bytes(self) -> int:
        """Bytes of optimizer state in this rank's host memory."""
        ...


class StepCosts:
    """Counts what each step costs this rank in communication and optimizer states, from sums since the start.

    Ask it after every step: it also frees what has been measured. It waits for nothing on the device.
    """

    def __init__(self, run: Stepping) -> None:
        self._run = run
        self._before = self._sums()

    def of_step(self) -> dict[str, Any]:
        """Returns what came since it was last asked; a copy's time counts in the step in which its end is noticed."""
        now, before = self._sums(), self._before
        self._before = now
        spent = {name: now[name] - before[name] for name in now}
        return {**spent, "state_bytes": self._run.state_bytes, "host_state_bytes": self._run.host_state_bytes}

    def _sums(self) -> dict[str, Any]:
        grass = self._run.grass
        traffic = grass.traffic
        return {
            "bytes_reduced": grass.bytes_reduced,
            "bytes_to_device": traffic.bytes_to_device,
            "bytes_to_host": traffic.bytes_to_host,
            "weight_bytes_to_device": traffic.weight_bytes_to_device,
            "weight_bytes_to_host": traffic.weight_bytes_to_host,
            "transfer_seconds": traffic.seconds,
            "wait_seconds": traffic.waited,
            "switch_seconds": grass.switch_seconds,
        }
