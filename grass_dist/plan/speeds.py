"""Holds every constant of the cost model, or what `grass-dist doctor` measured instead.

The constants are those of a server with A100-class GPUs on PCIe 4 and a 200 Gbit/s network; none was fitted to a
measurement. ``--from doctor.json`` replaces those that were measured. FLOP/s are not, so give yours by ``--tflops``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from grass_dist.errors import ConfigError
from grass_dist.regular_files import read_regular

LARGEST_JSON = 2**26


@dataclass(frozen=True, slots=True)
class Speeds:
    """The speeds that the cost model counts with."""

    flop_per_s: float = 312e12
    """FLOP/s of a GPU by its data sheet: dense bf16 of an A100."""
    flop_share: float = 0.45
    """Share of them that the matrix products of a training step reach."""
    device_bytes_per_s: float = 1.5e12
    """Bandwidth of the GPU's own memory, which bounds the update."""
    pcie_bytes_per_s: float = 20e9
    """Bandwidth of a GPU's pinned copies in one direction, while the other GPUs of the host copy too."""
    within_bytes_per_s: float = 100e9
    """Bandwidth from a GPU to the next of its host (bus bandwidth) over NVLink. PCIe alone has some 15e9."""
    across_bytes_per_s: float = 25e9
    """Bandwidth from a host to other hosts over all its network cards: 200 Gbit/s."""
    within_latency_s: float = 3e-6
    across_latency_s: float = 10e-6
    """Latencies of one hop of a ring, within a host and between two."""
    device_bytes: float | None = None
    """Memory of a GPU, if it was measured."""
    pinnable_bytes: float | None = None
    """Host memory that the ranks of a host may pin, if it was measured."""
    measured: tuple[str, ...] = ()
    """Names of the fields that were measured."""

    @property
    def sentence(self) -> str:
        """Says with which constants times are computed."""
        measured = f" Measured by the doctor: {', '.join(self.measured)}." if self.measured else ""
        return (
            f"Times are of a model of costs: {self.flop_share:.0%} of {self.flop_per_s / 1e12:.4g} TFLOP/s a GPU, "
            f"{self.pcie_bytes_per_s / 1e9:.3g} GB/s of PCIe each way, {self.within_bytes_per_s / 1e9:.3g} GB/s within "
            f"and {self.across_bytes_per_s / 1e9:.3g} GB/s across hosts, "
            f"{self.across_latency_s * 1e6:.3g} µs a hop.{measured}"
        )


_Number = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]


@dataclass
class _Collective:
    """An all-reduce in the report of the doctor."""

    ranks: _Number | None = None
    bus_bytes_per_s: _Number | None = None
    latency_seconds: _Number | None = None

    @property
    def hop(self) -> float | None:
        """Latency of one hop of a ring. An all-reduce of n ranks has 2 (n - 1) of them."""
        if self.latency_seconds is None or self.ranks is None or self.ranks <= 1:
            return None
        return self.latency_seconds / (2 * (self.ranks - 1))


@dataclass
class _Rank:
    pinned: bool = False
    h2d_together_bytes_per_s: _Number | None = None
    d2h_together_bytes_per_s: _Number | None = None
    device_bytes: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)] | None = None


@dataclass
class _Host:
    all_reduce: _Collective | None = None
    pinnable_bytes: _Number | None = None


@dataclass
class _Report:
    """The part of the doctor's report that the cost model counts with; null where it was not measured."""

    version: Literal[1]
    ranks: list[_Rank]
    hosts: list[_Host]
    all_reduce: _Collective | None = None


def speeds_from_doctor(path: Path, base: Speeds | None = None) -> Speeds:
    """Reads the speeds that `grass-dist doctor --json` has measured; what it did not measure stays as in ``base``.

    Raises:
        ConfigError: there is no such file, or it has numbers that no cluster has (zero, negative, NaN).
    """
    base, found = base or Speeds(), _read(path)
    pinned = [rank for rank in found.ranks if rank.pinned]
    within = [host.all_reduce for host in found.hosts if host.all_reduce]
    across = found.all_reduce if len(found.hosts) > 1 else None
    known = {
        "pcie_bytes_per_s": _median(
            speed for rank in pinned for speed in (rank.h2d_together_bytes_per_s, rank.d2h_together_bytes_per_s)
        ),
        "within_bytes_per_s": _median(one.bus_bytes_per_s for one in within),
        "within_latency_s": _median(one.hop for one in within),
        "across_bytes_per_s": across and across.bus_bytes_per_s,
        "across_latency_s": across and across.hop,
        "device_bytes": min((rank.device_bytes for rank in found.ranks if rank.device_bytes), default=None),
        "pinnable_bytes": min((host.pinnable_bytes for host in found.hosts if host.pinnable_bytes), default=None),
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


def _read(path: Path) -> _Report:
    fix = "give the file that grass-dist doctor --json FILE wrote"
    try:
        return TypeAdapter(_Report).validate_json(read_regular(path, LARGEST_JSON, follow=True))
    except OSError as error:
        raise ConfigError("--from", str(path), f"it cannot be read ({error.strerror})", fix) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        number = first["type"] in ("float_type", "finite_number", "greater_than", "greater_than_equal")
        problem = "it must be a finite number above 0" if number else f"it is no report ({first['msg']})"
        raise ConfigError(f"--from{field}", first["input"] if field else str(path), problem, fix) from None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
