"""The doctor: what it says of facts made by hand, its formulas, and the command in one process."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import pytest

from grass_dist.doctor.collectives import affordable, rounds
from grass_dist.doctor.facts import Collective, Copies, Disk, Facts, Link, Reach, Report
from grass_dist.doctor.findings import by_value, judge, judge_meeting, listed
from grass_dist.doctor.gather import try_disk
from grass_dist.doctor.network import TokenServer, bound_addresses, choose_address, reach
from grass_dist.doctor.schema import pinnable_bytes, report_json
from grass_dist.doctor.tables import show
from grass_dist.job.interfaces import find_interfaces
from grass_dist.job.seats import Seat
from grass_dist.terminal import duration, size

VERSIONS = {"grass-dist": "0.1.0", "python": "3.11.8", "torch": "2.9.1", "CUDA": "none", "MPI": "none"}
GPU = {"device": "H100", "device_bytes": 80 << 30}


def facts(rank: int, host: str, local: int = 0, gpu: str | None = None, visible=(), **changed) -> Facts:
    number = int(host[-1])
    given = Facts(
        rank=rank,
        seat=Seat(host, "boot", local, gpu, tuple(visible) or ((gpu,) if gpu else ())),
        launcher="torchrun",
        versions=dict(VERSIONS),
        device="CPU",
        device_bytes=0,
        unused_gpu=False,
        cores=8,
        host_cores=8,
        omp_threads=4,
        interfaces={"eth0": f"10.0.0.{number}", "lo": "127.0.0.1"},
        interface="eth0",
        address=f"10.0.0.{number}",
        port=4000 + rank,
        chosen_by="the host name",
        interface_problem="",
        name_problem="",
        available_bytes=64 << 30,
        memlock_bytes=None,
        infiniband=False,
    )
    return replace(given, **changed)


def healthy() -> Report:
    """Two hosts of two ranks each."""
    report = Report(4, 60, "node1:29400")
    report.ranks = [facts(rank, f"node{1 + rank // 2}", rank % 2) for rank in range(4)]
    report.reach = [Reach(0, 2, 1e-4, 0.0), Reach(2, 0, 1e-4, 0.001), Reach(3, 0, 1e-4, 0.001)]
    report.collectives = [Collective("all_reduce", "all", 4, 16_000_000, 0.016, 1e-4)]
    report.collectives += [Collective("all_reduce", f"node{n}", 2, 16_000_000, 0.008, 1e-4) for n in (1, 2)]
    report.links = [Link("node1", "node2", 1_000_000, 1e-3, 1e-5), Link("node2", "node1", 1_000_000, 1e-3, 1e-5)]
    report.copies = [Copies(rank, 1 << 20, 1e10, 1e10, 5e9, 5e9) for rank in range(4)]
    report.disks = [Disk(f"node{n}", "/data", 64 << 20, 1e9, 2e9, 10**12) for n in (1, 2)]
    return report


def changed(report: Report, rank: int, **values) -> Report:
    report.ranks[rank] = replace(report.ranks[rank], **values)
    return report


def only(report: Report):
    findings = judge(report)
    assert len(findings) == 1, [finding.sentence for finding in findings]
    return findings[0]


def test_a_healthy_cluster_has_no_findings_and_a_complete_json():
    report = healthy()
    assert judge(report) == []
    found = json.loads(json.dumps(report_json(report, []), allow_nan=False))
    assert [r["rank"] for r in found["ranks"]] == [0, 1, 2, 3]
    assert [h["ranks"] for h in found["hosts"]] == [[0, 1], [2, 3]]
    assert found["all_reduce"]["algorithm_bytes_per_s"] == pytest.approx(1e9)
    assert found["all_reduce"]["bus_bytes_per_s"] == pytest.approx(1.5e9)
    assert found["hosts"][0]["all_reduce"]["algorithm_bytes_per_s"] == pytest.approx(2e9)
    assert found["reduce_scatter"] is None and found["ranks"][3]["clock_offset_seconds"] == 0.001
    assert found["links"][0]["bytes_per_s"] == pytest.approx(1e9)
    assert found["ranks"][1]["h2d_together_bytes_per_s"] == 5e9


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_the_address_that_a_port_is_bound_to(address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listening:
        try:
            listening.bind((address, 0))
        except OSError:
            pytest.skip("this host has no IPv6")
        port = listening.getsockname()[1]
        assert bound_addresses(port) == ()
        listening.listen()
        assert bound_addresses(port) == (address,)
        with socket.create_connection(({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address), port)):
            assert bound_addresses(port) == (address,)


def test_torchs_own_store_is_found_on_all_interfaces():
    import torch.distributed as dist

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    assert set(bound_addresses(store.port)) & {"0.0.0.0", "::"}


def test_a_store_on_all_interfaces_is_a_warning_on_one_it_is_not(capsys):
    finding = only(changed(healthy(), 0, store_bound=("::",)))
    assert finding.kind == "store" and not finding.is_error
    for words in (
        "the ranks' store on host node1 listens on port 29400 of all interfaces (eth0 (10.0.0.1))",
        "firewall",
    ):
        assert words in finding.sentence
    one = changed(healthy(), 0, store_bound=("10.0.0.1",))
    assert judge(one) == [] and judge(changed(healthy(), 0, store_bound=("::",), interfaces={"lo": "127.0.0.1"})) == []
    show(one, [])
    said = " ".join(capsys.readouterr().out.split())
    assert "The ranks meet at node1:29400; the store listens on 10.0.0.1 of host node1, with no password." in said
    assert report_json(one, [])["ranks"][0]["store_bound"] == ["10.0.0.1"]


def test_facts_travel_as_json():
    from dataclasses import asdict

    one = facts(1, "node1", 1, "GPU-1", ("GPU-0", "GPU-1"), store_bound=("::",), **GPU)
    assert Facts.from_json(json.loads(json.dumps(asdict(one)))) == one


def _clock_off(report):
    report.reach[1] = Reach(2, 0, 1e-4, -12.5)
    report.reach[2] = Reach(3, 0, 1e-4, -12.5)
    return report


def _missing(report):
    del report.ranks[3]
    return report


def _unreachable(report):
    report.reach = [Reach(0, 2, problem="no answer within 5 s"), *report.reach[1:]]
    return report


def _three_hosts(report, *slow):
    """Links at 1 GB/s, and those of ``slow`` at 20 MB/s."""
    report.size = 6
    report.ranks += [facts(4, "node3"), facts(5, "node3", 1)]
    pairs = [(a, b) for a in range(1, 4) for b in range(1, 4) if a != b]
    report.links = [Link(f"node{a}", f"node{b}", 10**6, 0.05 if (a, b) in slow else 1e-3, 1e-5) for a, b in pairs]
    return report


def _gpus(report):
    report.ranks = [
        facts(
            rank, f"node{1 + rank // 2}", rank % 2, f"GPU-{rank}", [f"GPU-{rank // 2 * 2 + i}" for i in range(2)], **GPU
        )
        for rank in range(4)
    ]
    return report


def _slow_copy(report):
    _gpus(report).copies[3] = Copies(3, 1 << 20, 3e9, 1e10)
    return report


def _slow_across(report):
    report.collectives[0] = replace(report.collectives[0], seconds=0.5)
    return report


def _slow_host(report):
    report.collectives[2] = replace(report.collectives[2], seconds=0.08)
    return report


def _failed(report):
    report.failed = "The copies did not end within 60 s: rank 3 (on host node2) does not answer."
    return report


def _links(report, seconds):
    report.links = [replace(link, seconds=seconds) for link in report.links]
    return report


def _disk(report, **values):
    report.disks[1] = replace(report.disks[1], **values)
    return report


def _torch(report):
    for rank in (2, 3):
        changed(report, rank, versions={**VERSIONS, "torch": "2.13.0", "python": "3.11.9"})
    return report


@pytest.mark.parametrize(
    ("report", "kind", "level", "parts"),
    [
        (_missing(healthy()), "missing", "stops", ["rank 3 of 4 did not come within 60 s", "node1:29400", "--timeout"]),
        (
            changed(healthy(), 2, interface_problem="GLOO_SOCKET_IFNAME=eth7: this host has no such interface"),
            "interface",
            "stops",
            ["host node2: GLOO_SOCKET_IFNAME=eth7: this host has no such interface; name the one"],
        ),
        (
            changed(healthy(), 2, name_problem="resolves to 127.0.1.1, which others cannot reach"),
            "host name",
            "stops",
            ["host node2", "127.0.1.1", "GLOO_SOCKET_IFNAME=eth0"],
        ),
        (
            changed(healthy(), 2, address="10.0.0.1", interface="docker0"),
            "address",
            "stops",
            ["hosts node1 and node2 both give the address 10.0.0.1 (docker0)"],
        ),
        (
            _unreachable(healthy()),
            "unreachable",
            "stops",
            ["host node1 cannot connect to host node2 at 10.0.0.2:4002 (eth0): no answer within 5 s", "firewall"],
        ),
        (
            changed(healthy(), 1, seat=Seat("node1", "boot", 0, None, ())),
            "devices",
            "stops",
            ["ranks 0 and 1 on host node1 are both number 0"],
        ),
        (
            changed(_gpus(healthy()), 3, seat=Seat("node2", "boot", 2, "GPU-3", ("GPU-2", "GPU-3"))),
            "devices",
            "stops",
            ["rank 3 is number 2 on host node2, which has 2 GPUs"],
        ),
        (_torch(healthy()), "version", "error", ["version of torch differs: 2.9.1 on host node1 and 2.13.0 on host"]),
        (
            changed(healthy(), 2, unused_gpu=True),
            "devices",
            "error",
            ["node2 has an NVIDIA driver", "2.9.1", "install"],
        ),
        (changed(healthy(), 0, omp_threads=8), "threads", "warning", ["8 cores", "12 threads", "OMP_NUM_THREADS=4"]),
        (
            changed(healthy(), 0, memlock_bytes=65536, infiniband=True),
            "memlock",
            "warning",
            ["host node1", "65,536 bytes", "ulimit -l unlimited"],
        ),
        (
            changed(_gpus(healthy()), 2, device="A100"),
            "devices",
            "warning",
            ["GPUs differ: H100 on host node1 and A100"],
        ),
        (_clock_off(healthy()), "clock", "warning", ["clock of host node2 is 12.5 s behind that of host node1", "NTP"]),
        (
            _three_hosts(healthy(), (3, 1)),
            "slow link",
            "error",
            ["host node3 sends to host node1 at 20 MB/s", "median of 1 GB/s", "path between them"],
        ),
        (
            _three_hosts(healthy(), (3, 1), (3, 2)),
            "slow link",
            "error",
            ["node3 sends to all other hosts (node1 and node2) at 20 MB/s", "network card"],
        ),
        (_links(healthy(), 0.1), "slow network", "warning", ["10 MB/s, less than 1 Gbit/s", "takes 100 s"]),
        (_slow_across(healthy()), "slow across hosts", "warning", ["48 MB/s", "2 GB/s", "42 times", "HSDP"]),
        (_slow_host(healthy()), "slow host", "warning", ["within host node2", "200 MB/s", "2 GB/s"]),
        (_slow_copy(healthy()), "slow copies", "warning", ["rank 3 (on host node2) copies H2D at 3 GB/s", "10 GB/s"]),
        (_disk(healthy(), problem="Permission denied"), "folder", "error", ["/data: Permission denied on host node2"]),
        (_disk(healthy(), write=1e7), "slow disk", "warning", ["10 MB/s on host node2", "10 GB takes 1000 s"]),
        (_disk(healthy(), free_bytes=10**8), "full disk", "warning", ["/data on host node2 has 100 MB left"]),
        (_failed(healthy()), "failed", "error", ["rank 3 (on host node2) does not answer"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_finding(report, kind, level, parts):
    finding = only(report)
    assert finding.kind == kind
    assert finding.is_error == (level != "warning") and finding.stops == (level == "stops")
    assert [part for part in parts if part not in finding.sentence] == [], finding.sentence
    assert finding.sentence.endswith(".")
    assert judge_meeting(report) == ([finding] if finding.stops else [])
    json.dumps(report_json(report, [finding]), allow_nan=False)


def test_a_host_that_nobody_reaches_is_named_once():
    report = _three_hosts(healthy())
    report.reach = [Reach(rank, 4, problem="no answer within 5 s") for rank in (0, 2)]
    assert "hosts node1 and node2 cannot connect to host node3 at 10.0.0.3:4004" in only(report).sentence


def test_gpus_on_one_host_and_none_on_the_other():
    report = _gpus(healthy())
    report.ranks[2:] = healthy().ranks[2:]
    kinds = {finding.kind: finding.sentence for finding in judge_meeting(report)}
    assert "GPUs on host node1 and CPU on host node2" in kinds["devices"]


def test_hosts_of_one_name_are_told_apart():
    report = Report(2, 60)
    report.ranks = [replace(facts(r, "node1"), seat=Seat("node1", f"boot{r}", 0, None, ())) for r in range(2)]
    assert list(report.hosts) == ["node1", "node1 (2)"] and report.host_of(1) == "node1 (2)"


def test_bandwidths():
    reduce = Collective("all_reduce", "all", 4, 1000, 0.5, 0.1)
    assert (reduce.algorithm_bytes_per_s, reduce.bus_bytes_per_s) == (2000, 3000)
    scatter = replace(reduce, kind="reduce_scatter")
    assert (scatter.algorithm_bytes_per_s, scatter.bus_bytes_per_s) == (2000, 1500)


def test_a_message_is_as_large_as_the_time_allows():
    assert affordable(16_000_000, 1000, 1e-6, 1.0) == 16_000_000
    assert affordable(16_000_000, 1000, 0.01, 1.0) == 100_000
    assert affordable(16_000_000, 1000, 5.0, 1.0) == 1000


@pytest.mark.parametrize("count", range(1, 9))
def test_every_two_hosts_meet_once_and_nobody_is_at_two_places(count):
    played = rounds(count)
    assert sorted(pair for pairs in played for pair in pairs) == sorted(combinations(range(count), 2))
    for pairs in played:
        assert len({player for pair in pairs for player in pair}) == 2 * len(pairs)
    assert len(played) == (0 if count == 1 else count - 1 + count % 2)


def test_what_may_be_pinned():
    both = [facts(0, "node1"), facts(1, "node1", 1, available_bytes=32 << 30)]
    limited = [replace(one, memlock_bytes=1 << 20, seat=Seat("node1", "", 0, "GPU-0", ("GPU-0",))) for one in both]
    pinned = [Copies(rank, 2 << 20, 1e10, 1e10) for rank in range(2)]
    assert pinnable_bytes(both, []) == 32 << 30
    assert pinnable_bytes(limited, []) == 2 << 20
    assert pinnable_bytes(limited, pinned) == 32 << 30  # the limit did not hold
    assert pinnable_bytes([replace(one, available_bytes=None) for one in both], []) is None


def test_words():
    assert listed(["a"]) == "a" and listed(list("abc")) == "a, b and c" and listed(list("abcd"), 3) == "a, b and 2 more"
    assert by_value({"a": "1", "b": "2", "c": "2"}) == "1 on host a and 2 on hosts b and c"
    assert [size(n) for n in (12, 65_536, 16e6, 123_456e6)] == ["12 bytes", "65.5 kB", "16 MB", "123 GB"]
    assert [duration(s) for s in (1234, 2.5, 0.0123, 35e-6)] == ["1234 s", "2.5 s", "12.3 ms", "35 µs"]


INTERFACES = {"docker0": "172.17.0.1", "eth0": "10.0.0.1", "eth1": "10.1.0.1", "lo": "127.0.0.1"}


@pytest.mark.parametrize(
    ("environ", "by_name", "expected"),
    [
        ({}, "10.0.0.1", ("10.0.0.1", "eth0", "the host name")),
        ({}, "127.0.1.1", ("10.1.0.1", "eth1", "the route to node9")),
        ({}, None, ("10.1.0.1", "eth1", "the route to node9")),
        ({"GLOO_SOCKET_IFNAME": "eth1"}, "10.0.0.1", ("10.1.0.1", "eth1", "GLOO_SOCKET_IFNAME")),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "10.0.0.1", ("10.0.0.1", "eth0", "the host name")),
        ({"NCCL_SOCKET_IFNAME": "eth"}, "10.0.0.1", ("10.0.0.1", "eth0", "NCCL_SOCKET_IFNAME")),
        ({"NCCL_SOCKET_IFNAME": "=eth1"}, None, ("10.1.0.1", "eth1", "NCCL_SOCKET_IFNAME")),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, None, ("10.0.0.1", "eth0", "NCCL_SOCKET_IFNAME")),
    ],
)
def test_the_address_is_that_of_gloo_and_nccl(environ, by_name, expected):
    chosen = choose_address(environ, INTERFACES, by_name=by_name, by_route="10.1.0.1", toward="node9")
    assert (chosen.address, chosen.interface, chosen.chosen_by) == expected
    assert bool(chosen.problem) == (environ.get("GLOO_SOCKET_IFNAME") == "eth")
    # gloo listens on the address of the host name, whatever NCCL is told
    assert bool(chosen.name_problem) == ("GLOO_SOCKET_IFNAME" not in environ and by_name != "10.0.0.1")


def test_a_missing_interface_is_named_with_those_that_exist():
    chosen = choose_address(
        {"GLOO_SOCKET_IFNAME": "eth7"}, INTERFACES, by_name=None, by_route="10.1.0.1", toward="node9"
    )
    assert chosen.problem == (
        "GLOO_SOCKET_IFNAME=eth7: this host has no such interface with an address; it has docker0 (172.17.0.1), "
        "eth0 (10.0.0.1), eth1 (10.1.0.1), lo (127.0.0.1)"
    )
    assert not chosen.name_problem


def test_reaching_a_listener_and_others():
    token = b"x" * 16
    port = TokenServer("127.0.0.1", token).port
    good = reach(1, 0, "127.0.0.1", port, token)
    assert not good.problem and good.seconds is not None and good.seconds < 1
    assert good.clock_offset_seconds is not None and math.isclose(good.clock_offset_seconds, 0, abs_tol=0.5)
    assert reach(1, 0, "127.0.0.1", port, b"y" * 16).problem == "another process answers there"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert reach(1, 0, "127.0.0.1", taken.getsockname()[1], token).problem == "Connection refused"
        taken.listen()
        assert reach(1, 0, "127.0.0.1", taken.getsockname()[1], token, 0.3).problem == "no answer within 0.3 s"
    assert find_interfaces().get("lo") in (None, "127.0.0.1")


def test_the_disk_is_tried_without_a_trace(tmp_path):
    disk = try_disk("node1", tmp_path, 8 << 20, 5)
    assert disk.nbytes == 8 << 20 and disk.write > 0 and disk.read > 0 and not disk.problem
    assert list(tmp_path.iterdir()) == []
    assert try_disk("node1", tmp_path / "none", 1, 5).problem == "No such file or directory"


def run(*argv: str, **options):
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=60, **options)


def test_the_command_in_one_process(tmp_path):
    done = run("-m", "grass_dist.doctor", "--json", "found.json", "--folder", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert socket.gethostname() in done.stdout and "copies (no GPU)" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["size"] == 1 and found["all_reduce"] is None and found["links"] == []
    assert found["ranks"][0]["versions"]["grass-dist"] and found["ranks"][0]["h2d_bytes_per_s"] > 1e6
    assert found["hosts"][0]["disk_write_bytes_per_s"] > 0 and found["hosts"][0]["available_bytes"] > 0
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--size", "many"], 1, "--size='many': this is no size; write e.g. 4GB or 500MB."),
        (["--folder", "/proc/none"], 1, "--folder cannot be written: /proc/none: No such file or directory on host"),
    ],
)
def test_what_the_command_refuses(argv, code, said):
    done = run("-m", "grass_dist.cli", "doctor", *argv)
    assert done.returncode == code and said in done.stdout + done.stderr, done.stdout + done.stderr
