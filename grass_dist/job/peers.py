"""Finds out, without collectives, which rank is lost when a collective fails."""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch.distributed as dist

from grass_dist.errors import GrassError

LOOKS_EVERY = 1.0
"""Seconds between two looks into the store for a roll that a rank has called."""
ANSWERS_WITHIN = 10.0
"""Seconds in which a rank that lives answers."""
LINGERS = 3.0
"""Most seconds for which the rank that keeps the store stays after the roll, so that the others can read it."""
BEATS = 10
"""Signs of life that a rank gives in the time after which it counts as lost."""
FINDS_OUT_WITHIN = 5.0
"""Seconds that the main thread has to find out by itself that a rank is lost."""

_CALLER = "caller"
_DURING = "during "
_OF_GLOO = re.compile(r"gloo/|Timed out waiting \d+ms|Connection (closed|reset) by peer|Broken pipe")
_TIMED_OUT = re.compile(r"(?:Timed out waiting|timeout after|ran for) (\d+) ?m(?:illi)?s")


@dataclass(frozen=True, slots=True)
class Answer:
    """Holds what a rank says when the roll is called."""

    doing: str
    failed: bool
    """True if it has an error of its own; otherwise the roll has found it in the middle of its work."""


@dataclass(frozen=True, slots=True)
class Roll:
    """The ranks that were still there after an error."""

    caller: int
    """The rank whose error came first."""
    answers: dict[int, Answer]
    """Answer of each rank; a rank that is missing did not answer in time."""
    waited: float = 0.0
    """Seconds for which no rank had heard of those that are missing."""


class Peers:
    """The ranks and their hosts; a thread answers for this rank, however long its collective hangs.

    Without the thread a rank could only be heard after its own error. A peer that is killed is noticed at once only by
    the ranks that exchange bytes with it. The others wait until the timeout, and would seem as silent as the dead.

    Args:
        hosts: host names by rank.
        line: the store, over a connection that nothing else uses: others may hold theirs for as long as the timeout.
            None for ranks that cannot ask each other.
        keeper: the process that keeps the store, as a sentence names it.
        keeps: whether that is this process.
        launched: whether the launcher keeps it, and no rank.
        answers_within: seconds in which a living rank answers.
        lost_after: seconds of silence after which a rank is lost.
    """

    def __init__(
        self,
        rank: int = 0,
        hosts: Sequence[str] = ("",),
        line: dist.Store | None = None,
        *,
        keeper: str = "",
        keeps: bool = False,
        launched: bool = False,
        answers_within: float = ANSWERS_WITHIN,
        lost_after: float = math.inf,
    ) -> None:
        self.rank, self.hosts, self.keeper = rank, tuple(hosts), keeper
        self.doing = ""
        """The work of the main thread, see `during`."""
        self._keeps, self._launched = keeps, launched
        self._answers_within, self._lost_after = answers_within, lost_after
        self._store_heard = self._next_heard = self._beaten = time.monotonic()
        self._next_beat = b""
        self._failed_in: str | None = None
        self._asked = self._stopped = False
        self._roll: Roll | None = None
        self._all_here = threading.Event()
        """A roll found all ranks there, and the watch goes on."""
        self._wake, self._over, self._known = threading.Event(), threading.Event(), threading.Event()
        """The watch is to look now; it has ended; the main thread knows by itself that a rank is lost, or leaves."""
        self._thread: threading.Thread | None = None
        self._guards: list[threading.Thread] = []
        if line is not None:
            self._thread = threading.Thread(target=self._watch, args=(line,), name="peers", daemon=True)
            self._thread.start()
            atexit.register(self.stop)  # a thread inside the store's code aborts a process that ends

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Says what is being done, for the sentence of an error, e.g. "the backward of step 12". It may be nested.

        An error that passes through keeps the innermost one as a note.
        """
        before, shown = self.doing, threading.current_thread() is threading.main_thread()
        if shown:
            self.doing = what
        try:
            yield
        except BaseException as error:
            if _noted(error) is None:
                error.add_note(_DURING + what)
            raise
        finally:
            if shown:
                self.doing = before

    def call_roll(self, doing: str) -> Roll | None:
        """Asks who is still there, or takes the roll that another has called before.

        Returns:
            None if the store does not answer: after 15 s or so, and 10 s more where a roll was under way.
        """
        if self._thread is None:
            return None
        self._failed_in = doing
        self._known.set()
        self._wake.set()
        self._over.wait(LOOKS_EVERY + 2 * self._answers_within + (LINGERS if self._keeps else 0) + 1)
        return self._roll

    def ask(self) -> None:
        """Has the watch call the roll, without waiting: if a rank is missing, `guard` tells it.

        For a signal: a launcher that ends all ranks may do so because one has died, and a collective with NCCL does
        not fail for that.
        """
        self._asked = True
        self._all_here.clear()
        self._wake.set()

    def all_here(self, within: float) -> bool:
        """Waits up to ``within`` seconds for the roll that `ask` has called, and says whether all ranks are there."""
        return self._thread is None or self._all_here.wait(within)

    def guard(self, end: Callable[[GrassError], None], then: str = "") -> None:
        """Calls ``end`` from a thread once a rank or the store has been silent for ``lost_after``, if this one waits.

        It guards the waits without a timeout of their own (`World.patient`): a host that has lost its power never
        closes its connections, so the ranks that wait for it are not told. A rank that has the error of a collective is
        left alone.

        Args:
            then: as in `lost_peer`.
        """
        if self._thread is not None and self._lost_after < math.inf:
            self._guards.append(threading.Thread(target=self._guard, args=(end, then), name="guard", daemon=True))
            self._guards[-1].start()

    @property
    def tells(self) -> bool:
        """Says whether this rank is to tell a person of a lost one: the first that noticed, else some on each host.

        Rank 0 also tells it where the first is on another host, which may have another terminal.
        """
        if self._roll is not None:
            caller = self._roll.caller
            return caller == self.rank or (self.rank == 0 and self.hosts[caller] != self.hosts[0])
        # Where a rank keeps the store, the first of a host may be the lost one.
        return self.hosts[: self.rank].count(self.hosts[self.rank]) < (1 if self._launched else 2)

    @property
    def launcher_silence(self) -> float | None:
        """Seconds since the launcher was last heard of, if it keeps the store."""
        return time.monotonic() - self._store_heard if self._launched else None

    def stop(self) -> None:
        """Ends the threads: before the process that keeps the store ends, and before the interpreter does.

        A thread that lets go of a process group while the interpreter ends aborts the process.
        """
        self._stopped = True
        self._known.set()
        self._wake.set()
        for thread in [*self._guards, *([self._thread] if self._thread is not None else [])]:
            thread.join(2 * LOOKS_EVERY)  # it hangs where the store's host is gone

    def _watch(self, line: dist.Store) -> None:
        """Looks after the others until one is lost. It begins again after a false alarm, to which all have answered."""
        number = 0
        try:
            while True:
                self._look(line, number)
                if self._stopped or self._hold_roll(line, number):
                    break
                number += 1
        except RuntimeError:  # the store is gone: there is no roll
            pass
        finally:
            self._over.set()

    def _look(self, line: dist.Store, number: int) -> None:
        """Waits for a reason to call roll ``number``, or for another to have called it."""
        self._next_heard = time.monotonic()
        while not self._wake.wait(LOOKS_EVERY) and not line.check([f"{number}/{_CALLER}"]) and self._next_lives(line):
            self._store_heard = time.monotonic()

    def _next_lives(self, line: dist.Store) -> bool:
        """Gives a sign of life now and then, and looks for that of the next rank, so that each rank is looked after."""
        now = time.monotonic()
        if now - self._beaten < self._lost_after / BEATS:
            return True
        self._beaten = now
        line.set(f"beat/{self.rank}", str(now))
        key = f"beat/{(self.rank + 1) % len(self.hosts)}"
        beat = line.get(key) if line.check([key]) else b""
        if beat != self._next_beat:
            self._next_beat, self._next_heard = beat, now
        return now - self._next_heard < self._lost_after

    def _guard(self, end: Callable[[GrassError], None], then: str) -> None:
        while not self._stopped:
            if not self._over.wait(LOOKS_EVERY) and time.monotonic() - self._store_heard < self._lost_after:
                continue
            if self._known.wait(FINDS_OUT_WITHIN):
                return
            if self._over.is_set() or time.monotonic() - self._store_heard > self._lost_after:
                break  # else this process itself was stopped, and the store is there
        if self._stopped or (self._roll is not None and len(self._roll.answers) == len(self.hosts)):
            return  # all are there, but one has failed, and the main thread will hear of it
        doing = self.doing or "a wait for the others"
        waited = time.monotonic() - self._store_heard if self._roll is None else self._roll.waited
        blamed = _blame(self, self._roll, doing, timed_out=False)
        end(_sentence(doing, f"waited {waited:.0f} s in vain", blamed or "", then))

    def _hold_roll(self, line: dist.Store, number: int) -> bool:
        """Calls roll ``number``, or answers it. All ranks come to one outcome: that of the first that knows it.

        Returns:
            Whether a rank is lost or has failed; otherwise it was a false alarm.
        """
        self._asked = False
        began = time.monotonic()
        silence = began - self._next_heard
        mine = json.dumps([self.rank, silence if silence >= self._lost_after else 0.0])
        told = line.compare_set(f"{number}/{_CALLER}", "", mine)
        caller, silence = json.loads(told)
        doing = self.doing if self._failed_in is None else self._failed_in
        line.set(f"{number}/answer/{self.rank}", json.dumps(asdict(Answer(doing, self._failed_in is not None))))
        ranks = range(len(self.hosts))
        silent = self._wait_for(line, f"{number}/answer", ranks, self._answers_within)
        if self._stopped:
            return True
        found = json.dumps([rank for rank in ranks if rank not in silent])
        present = json.loads(line.compare_set(f"{number}/present", "", found))
        answers = {rank: Answer(**json.loads(line.get(f"{number}/answer/{rank}"))) for rank in present}
        line.set(f"{number}/read/{self.rank}", "1")
        if len(present) == len(ranks) and not any(answer.failed for answer in answers.values()):
            self._begin_again()
            return False
        self._roll = Roll(caller, answers, silence + time.monotonic() - began)
        if self._keeps:
            self._wait_for(line, f"{number}/read", present, LINGERS)
        return True

    def _begin_again(self) -> None:
        self._store_heard = time.monotonic()
        self._wake.clear()
        self._all_here.set()
        if self._asked or self._stopped or self._failed_in is not None:  # since then
            self._wake.set()

    def _wait_for(self, line: dist.Store, key: str, ranks: Sequence[int], seconds: float) -> set[int]:
        """Waits for ``key/<rank>`` of all ranks, unless this one leaves. Returns those that did not come in time."""
        missing, deadline = set(ranks), time.monotonic() + seconds
        while True:
            missing = {rank for rank in missing if not line.check([f"{key}/{rank}"])}
            if not missing or self._stopped or time.monotonic() > deadline:
                return missing
            time.sleep(0.05)


def lost_peer(peers: Peers, error: BaseException, then: str = "") -> GrassError | None:
    """Makes the sentence for an error of a collective: what was being done, and which rank it waited for.

    It takes up to 15 s, in which the ranks are asked who is still there. Afterwards the process can only leave, by
    `World.abandon`: ending the process group may hang.

    Args:
        then: what the user can do, without a full stop, e.g. "the run can go on with --resume auto".

    Returns:
        None if ``error`` does not come from a collective. Otherwise an error that each of the other ranks has too.
    """
    if len(peers.hosts) == 1 or not of_collective(error):
        return None
    origin = _origin(error)
    text = " ".join(str(origin).split())
    doing = _noted(origin) or _noted(error) or peers.doing or "a collective"
    waited = _TIMED_OUT.search(text)
    roll = peers.call_roll(doing)
    happened = f"did not end within {int(waited[1]) / 1000:g} s" if waited else "failed"
    blamed = _blame(peers, roll, doing, timed_out=waited is not None)
    return _sentence(doing, happened, blamed or f"all ranks are there, and the error was: {text[:200]}", then)


def _blame(peers: Peers, roll: Roll | None, doing: str, *, timed_out: bool) -> str | None:
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


def _sentence(doing: str, happened: str, cause: str, then: str) -> GrassError:
    """Writes the error: what was being done, what came of it, who is to blame, and what to do."""
    look = ""
    if not cause.startswith("all ranks are there"):
        look = "Look at their logs" if " do not answer" in cause else "Look at its log"
    advice = "; ".join(part for part in (look, then) if part)
    advice = f" {advice[0].upper()}{advice[1:]}." if advice else ""
    return GrassError(f"{doing[0].upper()}{doing[1:]} {happened}: {cause}.{advice}")


def _names(peers: Peers, ranks: list[int]) -> str:
    """Writes ranks with their hosts, e.g. "rank 1 (on host b)" or "ranks 1 to 3 (on hosts b, c)"."""
    hosts = list(dict.fromkeys(peers.hosts[rank] for rank in ranks))
    if len(ranks) == 1:
        return f"rank {ranks[0]} (on host {hosts[0]})"
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    where = ", ".join(hosts[:8]) + (", …" if len(hosts) > 8 else "")
    return f"ranks {shown} (on {'host' if len(hosts) == 1 else 'hosts'} {where})"


def of_collective(error: BaseException) -> bool:
    """Says whether an error comes from a collective or a store that failed, however it is wrapped."""
    return _is_of_collective(_origin(error))


def _is_of_collective(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _OF_GLOO.search(str(error)) is not None


def _origin(error: BaseException) -> BaseException:
    """Returns the error of a collective that ``error`` is, or was raised from; else ``error``."""
    at: BaseException | None = error
    for _ in range(10):  # a chain may be a ring
        if at is None:
            break
        if _is_of_collective(at):
            return at
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return error


def _noted(error: BaseException) -> str | None:
    """Returns what was being done when an error was raised, as `Peers.during` has noted it."""
    for note in getattr(error, "__notes__", ()):
        if note.startswith(_DURING):
            return note.removeprefix(_DURING)
    return None
