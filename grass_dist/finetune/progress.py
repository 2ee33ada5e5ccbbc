"""Shows a person how a fine-tune goes: a bar on a terminal, lines elsewhere, on the main rank only."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from grass_dist.checkpoint.saving import Saved
from grass_dist.events import Event, Refreshed
from grass_dist.job.guard import Guard


class Reporter:
    """Shows steps and, as they change, the active layers. It is a context manager.

    Args:
        guard: tells an error of the display, which costs the run nothing.
    """

    def __init__(self, max_steps: int, num_layers: int, *, speaks: bool, guard: Guard | None = None) -> None:
        self._guard = guard or Guard()
        # mpirun gives its ranks a terminal for stdout alone, whatever it writes that to.
        self._terminal = speaks and sys.stdout.isatty() and sys.stderr.isatty()
        self._console = Console(
            quiet=not speaks, highlight=False, soft_wrap=True, force_terminal=None if self._terminal else False
        )
        self._max_steps, self._num_layers = max_steps, num_layers
        self._held_out: float | None = None
        self._marks = "#." if self._console.options.ascii_only else "█·"
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._terminal,
        )
        self._task = self._bar.add_task("start", total=max_steps, numbers="")

    def __enter__(self) -> Reporter:
        with self._guarded():
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._guarded():
            self._bar.stop()

    def say(self, text: str) -> None:
        with self._guarded():
            self._console.print(text, markup=False)

    def observe(self, event: Event) -> None:
        """Shows an event of the method, as its observer."""
        if isinstance(event, Refreshed):
            likeliest = sorted(range(len(event.probabilities)), key=lambda i: -event.probabilities[i])[:5]
            shown = ", ".join(f"{i} ({event.probabilities[i]:.1%})" for i in likeliest)
            self.say(f"step {event.step}: new importances; likeliest layers {shown}")
        else:
            active = set(event.active_layers)
            strip = "".join(self._marks[i not in active] for i in range(self._num_layers))
            chosen = " ".join(map(str, event.active_layers))
            self.say(f"step {event.step}: round {event.round:<3} {strip}  layers {chosen} train")

    def held_out(self, step: int, loss: float, **metrics: float) -> None:
        """Says how the model does on the held-out examples."""
        self._held_out = loss
        self.say(f"step {step}: held-out loss {loss:.4f}" + "".join(f", {k} {v:.4g}" for k, v in metrics.items()))

    def bad_step(self, step: int, loss: float, norm: float | None) -> None:
        """Says that ``step`` is not counted: see `StepResult.applied`."""
        what = f"loss {loss:.4g}" + (f", gradient norm {norm:.4g}" if norm is not None else "")
        self.say(f"step {step}: {what}: not finite, nothing is updated")

    def resumed(self, step: int, folder: str, exact: bool) -> None:
        """Says that the run goes on after ``step``."""
        how = "" if exact else "; on another number of ranks, so dropout differs"
        self.say(f"step {step}: goes on from {folder}{how}")

    def saved(self, saved: Saved) -> None:
        """Says how a checkpoint went."""
        if saved.error:
            self.say(f"warning: {saved.error}")
        else:
            self.say(f"step {saved.step}: saved in {saved.seconds:.1f} s; training waited {saved.stall_seconds:.2f} s")

    def step(self, step: int, phase: str, loss: float, seconds: float, speed: str = "") -> None:
        """Shows that ``step`` steps are done; the last one was of ``phase``, took ``seconds`` and had this speed."""
        numbers = f"loss {loss:.3f}" + (f"  held out {self._held_out:.3f}" if self._held_out is not None else "")
        numbers += f"  {speed}" if speed else ""
        with self._guarded():
            self._bar.update(self._task, completed=step, description=phase, numbers=numbers)
        if not self._terminal and (step % max(1, self._max_steps // 20) == 0 or step == self._max_steps):
            told = [f"step {step}/{self._max_steps}", phase, f"loss {loss:.4f}", f"{seconds:.2f} s a step", speed]
            self.say("  ".join(part for part in told if part))

    def _guarded(self) -> AbstractContextManager[None]:
        return self._guard.around("the display", "the run goes on, and not all is shown")
