"""Holds every constant of the cost model, or what `grass-dist doctor` measured instead.

The constants are those of a server with A100-class GPUs on PCIe 4 and a 200 Gbit/s network; none was fitted to a
measurement. ``--from doctor.json`` replaces those that were measured. FLOP/s are not, so give yours by ``--tflops``.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grass_dist.errors import ConfigError
from grass_dist.regular_files import read_regular

FLOP_PER_S = 312e12
"""FLOP/s of a GPU by its data sheet: dense bf16 of an A100."""
FLOP_SHARE = 0.45
"""Share of them that the matrix products of a training step reach."""
DEVICE_BYTES_PER_S = 1.5e12
"""Bandwidth of the GPU's own memory, which bounds the update."""
PCIE_BYTES_PER_S = 20e9
"""Bandwidth of a GPU's pinned copies in one direction, while the other GPUs of the host copy too."""
WITHIN_BYTES_PER_S = 100e9
"""What a GPU sends to the next one of its host (a collective's bus bandwidth) over NVLink. PCIe alone has some 15e9."""
ACROSS_BYTES_PER_S = 25e9
"""What a host sends to other hosts over all its network cards: 200 Gbit/s."""
WITHIN_LATENCY_S = 3e-6
ACROSS_LATENCY_S = 10e-6
"""Latencies of one hop of a ring, within a host and between two."""
LARGEST_JSON = 2**26


@dataclass(frozen=True, slots=True)
class Speeds:
    """The speeds that the cost model counts with."""

    flop_per_s: float = FLOP_PER_S
    flop_share: float = FLOP_SHARE
    device_bytes_per_s: float = DEVICE_BYTES_PER_S
    pcie_bytes_per_s: float = PCIE_BYTES_PER_S
    within_bytes_per_s: float = WITHIN_BYTES_PER_S
    across_bytes_per_s: float = ACROSS_BYTES_PER_S
    within_latency_s: float = WITHIN_LATENCY_S
    across_latency_s: float = ACROSS_LATENCY_S
    device_bytes: float | None = None
    """Memory of a GPU, if it was measured."""
    pinnable_bytes: float | None = None
    """Host memory that the ranks of a host may pin, if it was measured."""
    measured: tuple[str, ...] = ()
    """Names of the fields that are not the constants of this module."""


def speeds_from_doctor(path: Path, base: Speeds | None = None) -> Speeds:
    """Reads the speeds that `grass-dist doctor --json` has measured; what it did not measure stays as in ``base``.

    Raises:
        ConfigError: there is no such file, or it has numbers that no cluster has (zero, negative, NaN).
    """
    base, found = base or Speeds(), _read(path)
    ranks, hosts = _list(found, "ranks"), _list(found, "hosts")
    many = len(hosts) > 1
    whole = found.get("all_reduce")
    within = [h.get("all_reduce") for h in hosts]
    known: dict[str, float | None] = {
        "pcie_bytes_per_s": _median(
            _number(rank, f"ranks[{i}]", name)
            for i, rank in enumerate(ranks)
            if rank.get("pinned")
            for name in ("h2d_together_bytes_per_s", "d2h_together_bytes_per_s")
        ),
        "within_bytes_per_s": _median(_number(c, "hosts.all_reduce", "bus_bytes_per_s") for c in within),
        "within_latency_s": _median(_hop(c, "hosts.all_reduce") for c in within),
        "across_bytes_per_s": _number(whole, "all_reduce", "bus_bytes_per_s") if many else None,
        "across_latency_s": _hop(whole, "all_reduce") if many else None,
        "device_bytes": min(
            (b for i, r in enumerate(ranks) if (b := _number(r, f"ranks[{i}]", "device_bytes", zero=True))),
            default=None,
        ),
        "pinnable_bytes": min(
            (b for i, h in enumerate(hosts) if (b := _number(h, f"hosts[{i}]", "pinnable_bytes")) is not None),
            default=None,
        ),
    }
    given = {name: value for name, value in known.items() if value is not None}
    return replace(base, **given, measured=(*base.measured, *given))


def check_speed(option: str, value: float) -> float:
    """Checks a speed.

    Raises:
        ConfigError: it is no speed.
    """
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(option, value, "it is no speed", "use a finite number above 0")
    return value


def _read(path: Path) -> dict[str, Any]:
    fix = "give the file that grass-dist doctor --json FILE wrote"
    try:
        found = json.loads(read_regular(path, LARGEST_JSON, follow=True))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError("--from", str(path), f"it cannot be read ({reason})", fix) from None
    if not isinstance(found, dict) or found.get("version") != 1:
        raise ConfigError("--from", str(path), "it is no report of version 1", fix)
    return found


def _list(found: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = found.get(key)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ConfigError(f"--from.{key}", value, "it is no list of objects", "write the file again with the doctor")
    return value


def _number(entry: Any, where: str, name: str, *, zero: bool = False) -> float | None:
    """Reads a positive number of the report; None where it was not measured."""
    value: Any = entry.get(name) if isinstance(entry, dict) else entry
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        problem = "it must be a finite number above 0"
        raise ConfigError(
            f"--from.{where}.{name}", value, problem, "write the file again with grass-dist doctor --json"
        )
    return float(value)


def _hop(collective: Any, where: str) -> float | None:
    """Latency of one hop of a ring. An all-reduce of n ranks has 2 (n - 1) of them."""
    latency, ranks = _number(collective, where, "latency_seconds"), _number(collective, where, "ranks")
    return latency / (2 * (ranks - 1)) if latency is not None and ranks is not None and ranks > 1 else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
