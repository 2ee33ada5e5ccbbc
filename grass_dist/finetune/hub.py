"""Finds out whether the Hugging Face Hub can be reached; where not, its client would try for most of a minute."""

from __future__ import annotations

import re
import socket
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

SECONDS = 3.0
"""Seconds in which a connection must be made, or the Hub counts as out of reach."""


def loading_options(name: str) -> dict[str, Any]:
    """Returns options of ``from_pretrained``, which restrict it to the disk where the Hub is out of reach."""
    return {"local_files_only": True} if hub_problem(name) else {}


def hub_problem(name: str) -> str | None:
    """Says why the Hub cannot be asked for a model; None where it can be, or need not be.

    The answer for the first name that is not a folder here holds for the rest of the process.
    """
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None or Path(name).is_dir():
        return None
    problem = _connection_problem(constants.ENDPOINT, SECONDS)
    return f"{constants.ENDPOINT} cannot be reached ({problem})" if problem else None


@lru_cache
def _connection_problem(endpoint: str, seconds: float) -> str | None:
    """Says why no connection can be made to a server, or to the proxy that the environment names for it."""
    where = urlsplit(endpoint)
    if not where.hostname:
        return None  # the client says what is wrong with it
    proxies = {} if proxy_bypass(where.hostname) else getproxies()
    if proxy := proxies.get(where.scheme) or proxies.get("all"):
        where = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        if not where.hostname or not where.port:
            return None
    address = where.hostname, where.port or {"http": 80}.get(where.scheme, 443)
    found = [f"no connection within {seconds:g} s"]

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=seconds).close()
            found.clear()
        except OSError as error:
            found[:] = [error.strerror or str(error) or found[0]]

    connecting = threading.Thread(target=connect, daemon=True)  # for no timeout holds while a name is looked up
    connecting.start()
    connecting.join(seconds)
    return found[0] if found else None
