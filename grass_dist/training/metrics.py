"""The record of a run: run.json, config.yaml, metrics.jsonl and TensorBoard files in the run's folder."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

from grass_dist.errors import ConfigError
from grass_dist.events import Event, Refreshed
from grass_dist.training.config import RunConfig, dump_config
from grass_dist.training.parallel import Run


def make_run_folder(config: RunConfig) -> Path:
    """Makes ``output_dir/name``, empty of an earlier run.

    Raises:
        ConfigError: an earlier run lies there and ``overwrite`` is off, or the folder cannot be made.
    """
    folder = Path(config.output_dir) / config.name
    try:
        if (folder / "metrics.jsonl").exists():
            if not config.overwrite:
                raise ConfigError(
                    "name", config.name, f"{folder} holds an earlier run", "choose another name or set overwrite=true"
                )
            for part in ("plots", "tensorboard", "model"):
                shutil.rmtree(folder / part, ignore_errors=True)
            for part in ("metrics.jsonl", "run.json", "report.html"):
                (folder / part).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError("output_dir", config.output_dir, f"{folder}: {error.strerror}", "choose another") from None
    return folder


class MetricsLog:
    """Writes a line of metrics.jsonl for each event, at once, and TensorBoard scalars. On the main rank only."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        (folder / "run.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        self._file = (folder / "metrics.jsonl").open("w", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, event: str, step: int, **values: Any) -> None:
        """One event; floats that are not finite become null."""
        line = {"event": event, "step": step, **{name: _plain(value) for name, value in values.items()}}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:  # a full disk must not end training on this rank while the others wait for it
            print(f"warning: {self._file.name}: {error.strerror}; step {step} is not recorded.", file=sys.stderr)
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                self._board.add_scalar(f"{event}/{name}", value, step)

    def observe(self, event: Event) -> None:
        """An observer of the method: refreshes, and the draws as they begin to train."""
        if isinstance(event, Refreshed):
            p = event.probabilities
            self.write(
                "refresh",
                event.step,
                importances=event.importances,
                probabilities=p,
                dropped=event.dropped,
                entropy=-sum(x * math.log(x) for x in p if x > 0),
            )
            for layer, (m, x) in enumerate(zip(event.importances, p, strict=True)):
                self._board.add_scalar(f"importance/layer_{layer:02d}", m, event.step)
                self._board.add_scalar(f"probability/layer_{layer:02d}", x, event.step)
        else:
            self.write(
                "sample",
                event.step,
                round=event.round,
                drawn_at=event.drawn_at,
                active_layers=event.active_layers,
                probabilities=event.probabilities,
            )

    def close(self) -> None:
        self._file.close()
        self._board.close()


class StepCosts:
    """What each step has cost this rank in communication and in optimizer states, from sums since the start.

    Asked after every step on every rank: it also lets go of what has been measured.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._before = self._sums()

    def of_step(self) -> dict[str, Any]:
        """What came since it was last asked; a copy's time counts in the step in which its end is noticed."""
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
            "transfer_seconds": traffic.seconds,
            "wait_seconds": traffic.waited,
        }


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
