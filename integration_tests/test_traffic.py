"""What GRASS puts on the network between two hosts, read from the hosts' own interfaces."""

from __future__ import annotations

import pytest

from integration_tests.support.hosts import Hosts, needs_hosts
from integration_tests.support.traffic import BACKENDS, run_apart

pytestmark = [pytest.mark.timeout(150), pytest.mark.integration, needs_hosts]


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
            if backend == "hsdp":  # weights are gathered, and states lie, within a host: nothing else crosses
                assert grass["sent_in_step"] < 1.05 * grass["sent"], host
