"""What GRASS puts on the network between two hosts, read from the hosts' own interfaces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from integration_tests.hosts import Host, Hosts, needs_hosts
from integration_tests.traffic import BACKENDS

pytestmark = [pytest.mark.timeout(150), pytest.mark.integration, needs_hosts]


def run_apart(hosts: list[Host], folder: Path, each: int = 2, timeout: float = 120) -> dict[str, dict]:
    """Runs ``integration_tests.traffic`` with ``each`` ranks on each host; what they measured, by host."""
    where = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29400", "WORLD_SIZE": str(each * len(hosts))}
    ranks = [
        host.popen(
            [sys.executable, "-m", "integration_tests.traffic", str(folder)],
            env={**os.environ, **where, "RANK": str(number * each + local), "LOCAL_RANK": str(local)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, host in enumerate(hosts)
        for local in range(each)
    ]
    try:
        said = [rank.communicate(timeout=timeout)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(said)
    return {host.name: json.loads((folder / f"{host.name}.json").read_text()) for host in hosts}


def test_gradients_of_the_active_layers_alone_cross_the_network(tmp_path):
    with Hosts(2) as hosts:
        found = run_apart(hosts, tmp_path)
    for host, runs in found.items():
        for backend in BACKENDS:
            grass, full = runs[f"{backend} grass"], runs[f"{backend} full"]
            ratio = grass["sent"] / full["sent"]
            print(
                f"{host} {backend}: {full['sent'] / 1e6:.2f} MB a step, ×{ratio:.4f}; trained ×{grass['trained']:.4f}"
            )
            assert full["sent"] > 1e6  # a layer has 2.6 MB of gradients
            assert ratio == pytest.approx(grass["trained"], rel=0.05), (host, backend)
