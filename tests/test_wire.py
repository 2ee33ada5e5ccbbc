"""Bytes of reductions, within hosts and across them, against numbers by hand."""

import pytest

from grass_dist.report.wire import Sent, sent

TWO = ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("hosts", "settings", "expected"),
    [
        # Each of four links carries 3/4 of 100 bytes; two of them lead to the other host.
        (TWO, {"replicate": 1, "whole": False}, Sent(150, 150)),
        (TWO, {"replicate": 1, "whole": True}, Sent(300, 300)),
        # Each host scatters 100 / 2 over two links, and a half is summed with the other host's: 2 × 50 / 2 each way.
        (TWO, {"replicate": 2, "whole": False}, Sent(200, 200)),
        (["a", "b", "a", "b"], {"replicate": 1, "whole": False}, Sent(0, 300)),  # ranks in an order that crosses
        (["a", "a"], {"replicate": 1, "whole": False}, Sent(100, 0)),
        (["a", "b"], {"replicate": 2, "whole": False}, Sent(0, 200)),
        (["a"], {"replicate": 1, "whole": False}, Sent(0, 0)),
        # HSDP sends 2 × 25 / 2 over each of eight links between hosts, where one ring of all sends 87.5 over two.
        (["a"] * 4 + ["b"] * 4, {"replicate": 2, "whole": False}, Sent(8 * 75, 8 * 25)),
        (["a"] * 4 + ["b"] * 4, {"replicate": 1, "whole": False}, Sent(6 * 87.5, 2 * 87.5)),
    ],
)
def test_bytes_by_hand(hosts, settings, expected):
    assert sent(100, hosts, **settings) == expected


def test_what_crosses_under_hsdp_is_the_same_for_any_shard_group():
    for shard in (2, 4, 8):
        hosts = ["a"] * shard + ["b"] * shard
        assert sent(64, hosts, replicate=2, whole=False).across == pytest.approx(2 * 64)
