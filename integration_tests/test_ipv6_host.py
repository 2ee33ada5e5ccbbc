"""A host that has no IPv4 address at all, and whose name does not resolve: ranks meet there, and the doctor works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from integration_tests.support.hosts import needs_hosts

pytestmark = [pytest.mark.timeout(150), pytest.mark.integration, needs_hosts]

ADDRESS = "fd00::5"
UP = f"""
set -e
ip link set lo up
ip -4 addr flush dev lo
ip link add eth0 type bridge
ip link set eth0 up
ip -6 addr add {ADDRESS}/64 dev eth0 nodad
hostname has-no-address
ping() {{ "$PYTHON" -m grass_dist.doctor --size 1MB --timeout 40 --json "$1"; }}
ping alone.json
export WORLD_SIZE=2 MASTER_ADDR={ADDRESS} MASTER_PORT=29400
RANK=1 LOCAL_RANK=1 ping two.json &
RANK=0 LOCAL_RANK=0 ping two.json
wait $!
"""


@pytest.mark.long
def test_the_doctor_works_on_a_host_that_has_ipv6_alone(tmp_path):
    environ = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["unshare", "--net", "--uts", "sh", "-c", UP]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=140)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    alone, two = (json.loads(Path(tmp_path / name).read_text()) for name in ("alone.json", "two.json"))
    assert len(alone["ranks"]) == 1 and [rank["address"] for rank in two["ranks"]] == [ADDRESS] * 2
    assert two["all_reduce"]["ranks"] == 2 and two["all_reduce"]["seconds"] > 0
