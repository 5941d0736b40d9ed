"""Reports about clocks and links, on clusters that cannot be had in a test."""

import pytest
import torch

from ds_linclip.preflight.network_probe import (
    AllReduceSpeed,
    ClockOffset,
    all_reduce_speed,
    check_network,
    clock_offset,
)
from ds_linclip.preflight.table import CheckResult, exit_code_of
from ds_linclip.process.exit_codes import ExitCode
from helpers.fake_cluster import FakeCluster

HOSTS = ["node1", "node1", "node2", "node2", "node3", "node3"]


def check(**results: list) -> dict[str, CheckResult]:
    usual = {
        "listen": [("10.0.0.1", 1)] * 6,
        "connect": [0.001, None] * 3,
        "process_group": [0.1] * 6,
        "clocks": [{}] * 6,
        "all_reduce": [{}] * 6,
    }
    cluster = FakeCluster(HOSTS, **(usual | results))
    return {row.check: row for row in check_network(cluster, torch.device("cpu"), 1.0)}


def test_clocks_are_compared_over_the_shortest_round_trip():
    # The second took longest on one way; the first says 5 s ahead, to half of its 2 ms.
    offset = clock_offset([(100.0, 105.001, 100.002), (101.0, 106.9, 102.0)])
    assert offset["seconds"] == pytest.approx(5.0)
    assert offset["bound"] == pytest.approx(0.001)


def test_only_a_clock_that_is_surely_off_is_a_warning():
    small, large = ClockOffset(seconds=0.3, bound=0.001), ClockOffset(seconds=5.0, bound=0.001)
    clocks = check(clocks=[{"node2": small, "node3": large}, *[{}] * 5])["clocks"]
    assert clocks.verdict == "warning"
    (problem,) = clocks.problems
    assert problem.found == [("node3", "+5.000 s (± 0.001) against node1")]
    assert clocks.found == "0 (node1) to 5000 (node3) ms ahead of node1, ± 1 ms"
    unsure = {"node2": ClockOffset(seconds=5.0, bound=4.5)}
    assert check(clocks=[unsure, *[{}] * 5])["clocks"].verdict == "ok"


def test_bandwidths_are_those_of_nccl_tests():
    assert all_reduce_speed(10**9, 4, 1.0)["algorithm_bandwidth"] == 1e9
    assert all_reduce_speed(10**9, 4, 1.0)["bus_bandwidth"] == 1.5e9
    assert all_reduce_speed(10**9, 2, 0.5)["bus_bandwidth"] == 2e9


def speeds(seconds: float, num_ranks: int = 2, small: float = 1e-4) -> list[AllReduceSpeed]:
    return [
        all_reduce_speed(size, num_ranks, each)
        for size, each in ((8, 1e-5), (2**20, small), (2**26, seconds))
    ]


def test_a_slow_link_is_named_by_its_ends():
    everywhere = {"all-reduce, all ranks": {"all hosts": speeds(0.1, num_ranks=6, small=1e-3)}}
    within, between = "all-reduce, within hosts", "all-reduce, host to host"
    slow_when_small = {within: {"node1": speeds(0.01, small=1e-3)}}
    rows = check(
        all_reduce=[
            {**everywhere, **slow_when_small, between: {"node1 to node2": speeds(0.02)}},
            everywhere,
            {within: {"node2": speeds(0.011)}, between: {"node2 to node3": speeds(0.08)}},
            everywhere,
            {within: {"node3": speeds(0.012)}},
            everywhere,
        ]
    )
    assert rows[between].verdict == "warning"
    (problem,) = rows[between].problems
    assert [place for place, _ in problem.found] == ["node2 to node3"]
    assert rows[within].verdict == "ok"
    figures = rows["all-reduce, all ranks"].figures["all hosts"][1]
    assert figures["bus_bandwidth"] == pytest.approx(figures["algorithm_bandwidth"] * 10 / 6)
    assert exit_code_of(list(rows.values())) == ExitCode.FINISHED


def test_nothing_is_measured_between_hosts_that_do_not_reach_each_other():
    rows = check(connect=[0.001, None, OSError("10.0.0.1:1 cannot be reached"), None, 0.001, None])
    assert rows["ports"].problems[0].found == [("node2", "10.0.0.1:1 cannot be reached")]
    assert {row.verdict for name, row in rows.items() if name != "ports"} == {"not checked"}
    assert rows.keys() == {"ports", "process group", "clocks", "all-reduce"}
