"""Says who is to blame when ranks lose each other, in a sentence that a person can act on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from grass_dist.errors import GrassError


class Known(Protocol):
    """What a rank knows of all ranks, as `Peers` has it."""

    @property
    def rank(self) -> int: ...

    @property
    def hosts(self) -> tuple[str, ...]: ...

    @property
    def keeper(self) -> str:
        """The process that keeps the store, as a sentence names it."""
        ...

    @property
    def launcher_silence(self) -> float | None:
        """Seconds for which the launcher has not been heard of, if it keeps the store."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What a rank says when the roll is called."""

    doing: str
    failed: bool
    """Whether it has an error of its own; otherwise the roll has found it in the middle of its work."""


@dataclass(frozen=True, slots=True)
class Roll:
    """The ranks that were still there after an error."""

    caller: int
    """The rank whose error came first."""
    answers: dict[int, Answer]
    """Answer of each rank; a rank that is missing did not answer in time."""
    waited: float = 0.0
    """Seconds for which no rank had heard of those that are missing."""


def blame(peers: Known, roll: Roll | None, doing: str, *, timed_out: bool) -> str | None:
    """Finds who is to blame, and what for; None if nobody is."""
    if roll is None:
        silence = "" if peers.launcher_silence is None else f" (for {peers.launcher_silence:.0f} s)"
        return f"{peers.keeper}, which keeps the store of all ranks, does not answer{silence}" if peers.keeper else None
    silent = [rank for rank in range(len(peers.hosts)) if rank not in roll.answers]
    if peers.rank in silent:
        return f"{_names(peers, [roll.caller])} called the roll, and this rank answered too late"
    if silent:
        return f"{_names(peers, silent)} {'does' if len(silent) == 1 else 'do'} not answer"
    elsewhere = [rank for rank, answer in roll.answers.items() if not answer.failed and answer.doing != doing]
    if timed_out and elsewhere:
        at = roll.answers[elsewhere[0]].doing or "something else"
        return f"{_names(peers, elsewhere[:1])} was still at {at}"
    if roll.caller != peers.rank:
        return f"{_names(peers, [roll.caller])} failed before, in {roll.answers[roll.caller].doing}"
    return None


def sentence(doing: str, happened: str, cause: str, then: str) -> GrassError:
    """Writes the error: what was being done, what came of it, who is to blame, and what to do."""
    look = ""
    if not cause.startswith("all ranks are there"):
        look = "Look at their logs" if " do not answer" in cause else "Look at its log"
    advice = "; ".join(part for part in (look, then) if part)
    advice = f" {advice[0].upper()}{advice[1:]}." if advice else ""
    return GrassError(f"{doing[0].upper()}{doing[1:]} {happened}: {cause}.{advice}")


def _names(peers: Known, ranks: list[int]) -> str:
    """Writes ranks with their hosts, e.g. "rank 1 (on host b)" or "ranks 1 to 3 (on hosts b, c)"."""
    hosts = list(dict.fromkeys(peers.hosts[rank] for rank in ranks))
    if len(ranks) == 1:
        return f"rank {ranks[0]} (on host {hosts[0]})"
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    where = ", ".join(hosts[:8]) + (", …" if len(hosts) > 8 else "")
    return f"ranks {shown} (on {'host' if len(hosts) == 1 else 'hosts'} {where})"
