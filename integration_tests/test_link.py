"""A link between two hosts that is cut: for good, and for a moment. Two ranks on each host."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import pytest

from integration_tests.support.hosts import Host, Hosts, needs_hosts
from integration_tests.support.peers import GO, Scene, play_apart

pytestmark = [pytest.mark.timeout(120), needs_hosts]

TIMEOUT = 8


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with Hosts(2) as made:
        yield made


@pytest.mark.integration
@pytest.mark.parametrize(
    "patient", [False, pytest.param(True, marks=pytest.mark.long)], ids=["with a timeout", "without"]
)
def test_both_sides_of_a_cut_link_end_and_name_the_other(hosts, tmp_path, patient):
    def cut() -> None:
        hosts[1].cut()
        (tmp_path / GO).touch()

    scene = Scene(4, timeout=TIMEOUT, answers_within=3, held=True, patient=patient)
    ended = play_apart(scene, tmp_path, hosts, cut, within=60)
    late = r"waited \d+ s in vain" if patient else rf"did not end within {TIMEOUT} s"
    happened = rf"error: The gradient reduction of step 2 {late}"
    advice = r"the run can go on with --resume auto\.$"
    near = rf"{happened}: ranks 2, 3 \(on host grass2\) do not answer\. Look at their logs; {advice}"
    far = (
        rf"{happened}: rank 0 \(on host grass1\), which keeps the store of all ranks, does not answer\. "
        rf"Look at its log; {advice}"
    )
    for rank, message in enumerate((near, near, far, far)):
        assert ended[rank].code == 1, ended[rank].err
        assert len(ended[rank].said) == 1 and re.match(message, ended[rank].said[0]), ended[rank].err
        assert "Traceback" not in ended[rank].err
        assert ended[rank].seconds < TIMEOUT + 20


@pytest.mark.integration
def test_a_cut_that_heals_within_the_timeout_is_survived(hosts, tmp_path):
    received = []

    def heal() -> None:
        received.append(hosts[1].traffic()[0])
        hosts[1].heal()

    def cut_for_a_moment() -> None:
        hosts[1].cut()
        received.append(hosts[1].traffic()[0])
        (tmp_path / GO).touch()
        threading.Timer(2, heal).start()

    scene = Scene(4, timeout=60, held=True)
    ended = play_apart(scene, tmp_path, hosts, cut_for_a_moment, within=60)
    assert [rank.code for rank in ended] == [0] * 4 and not any(rank.said for rank in ended), ended
    assert received[0] == received[1], "the link was not cut"
    assert hosts[1].traffic()[0] > received[1] + 4 * 100_000  # the gradient came after it was healed
