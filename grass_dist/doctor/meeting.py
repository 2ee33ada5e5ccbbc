"""Lets the ranks exchange what they found without a collective, over the store that `World.join` will use."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from typing import Any

import torch.distributed as dist

from grass_dist.doctor.network import CONNECTS_WITHIN, reason, shown
from grass_dist.errors import GrassError
from grass_dist.job.interfaces import find_interfaces
from grass_dist.job.launchers import ProcessPlace
from grass_dist.job.world import first_line

GRACE = 10.0
"""Seconds by which the others wait longer than rank 0, which waits for the last of them."""


class Meeting:
    """Connects all ranks by a store. Nothing here waits much longer than ``timeout``.

    The same server serves `World.join` later. It is torchrun's agent's, or one in rank 0's process, which torch shares
    between all stores of a process at one port.

    Args:
        timeout: limit of joining and of each exchange, in seconds.

    Raises:
        GrassError: the store does not answer; the sentence says how it looks from this rank.
    """

    def __init__(self, place: ProcessPlace, timeout: float) -> None:
        assert place.address is not None and place.port is not None
        self.rank, self.size, self.timeout = place.rank, place.size, timeout
        self._expected = set(range(place.size))
        """Whom rank 0 waits for: all at first, then those who came."""
        self._keeps = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not self._keeps:
            _wait_for_port(place, timeout)
        try:
            store = dist.TCPStore(
                place.address,
                place.port,
                is_master=self._keeps,
                timeout=datetime.timedelta(seconds=timeout),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError as error:
            what = "rank 0 cannot listen on" if self._keeps else "no store of torch's answers at"
            raise GrassError(
                f"{what} {place.address}:{place.port} ({first_line(error)}); set MASTER_ADDR to rank 0's host and "
                "MASTER_PORT to a port that is free there."
            ) from None
        # The agent's store outlives a restart of the ranks.
        self._store = dist.PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def exchange(self, key: str, value: Any) -> list[Any]:
        """Returns what all ranks gave, in rank order and the same on each; None for those that did not come in time.

        Args:
            value: anything that JSON can hold.

        Raises:
            GrassError: rank 0 is gone.
        """
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            present = self._expected = self._wait_for(key, self.timeout)
            got = [json.loads(self._store.get(f"{key}/{r}")) if r in present else None for r in range(self.size)]
            self._store.set(f"{key}/all", json.dumps(got))
            return got
        return json.loads(self._from_rank_0(f"{key}/all", self.timeout + GRACE))

    def end(self, code: int | None, seconds: float) -> int:
        """Returns rank 0's exit status on all ranks: a launcher ends the others when one ends with another than 0.

        Args:
            code: the status on rank 0; None on the others.
            seconds: how long the others wait for rank 0.

        Raises:
            GrassError: rank 0 is gone.
        """
        if code is None:
            code = int(self._from_rank_0("end", seconds))
            self._store.set(f"read/{self.rank}", "1")
            return code
        self._store.set("end", str(code))
        self._store.set("read/0", "1")
        if self._keeps:
            self._wait_for("read", GRACE / 2)
        return code

    def _wait_for(self, key: str, seconds: float) -> set[int]:
        """Returns the expected ranks whose ``key`` has come in time."""
        present: set[int] = set()
        deadline = time.monotonic() + seconds
        while True:
            present |= {r for r in self._expected - present if self._store.check([f"{key}/{r}"])}
            if present == self._expected or time.monotonic() > deadline:
                return present
            time.sleep(0.02)

    def _from_rank_0(self, key: str, seconds: float) -> bytes:
        try:
            self._store.wait([key], datetime.timedelta(seconds=seconds))
            return self._store.get(key)
        except RuntimeError as error:
            raise GrassError(
                f"rank 0 did not answer within {seconds:g} s ({first_line(error)}); look at its output."
            ) from None


def _wait_for_port(place: ProcessPlace, timeout: float) -> None:
    """Connects plainly first: torch's own connection to a host that is not there takes long to fail."""
    assert place.address is not None
    where, deadline = f"{place.address}:{place.port}", time.monotonic() + timeout
    while True:
        try:
            with contextlib.closing(socket.create_connection((place.address, place.port), CONNECTS_WITHIN)):
                return
        except OSError as error:
            last = error
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    if isinstance(last, socket.gaierror):
        fix = f"the name {place.address} does not resolve here; use an address, or write it into /etc/hosts"
    elif isinstance(last, ConnectionRefusedError):
        fix = "nobody listens there: start rank 0, on the host that MASTER_ADDR names, with the same MASTER_PORT"
    else:
        fix = "let this host reach that address: open the port in the firewalls, or set MASTER_ADDR to one it reaches"
    raise GrassError(
        f"{where} does not answer: {reason(last, CONNECTS_WITHIN)}, tried for {timeout:g} s; {fix}. "
        f"This host has {shown(find_interfaces())}."
    )
