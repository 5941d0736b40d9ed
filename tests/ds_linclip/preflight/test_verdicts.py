"""How the answers of hosts are judged, where a real cluster of that kind cannot be had."""

import json

import pytest
import torch

from ds_linclip.config import load_config
from ds_linclip.preflight import Judge, Machine, Space, Table
from ds_linclip.preflight.network_probe import Links, Offset, Speed, offset_of
from ds_linclip.preflight.rendezvous import Failed
from ds_linclip.preflight.table import Row
from ds_linclip.process.exit_codes import ExitCode

HOSTS = ["node1", "node1", "node2", "node2", "node3", "node3"]
GIB = 2**30


@pytest.fixture
def table() -> Table:
    return Table(HOSTS)


@pytest.fixture
def judge(table: Table) -> Judge:
    return Judge(table, HOSTS)


def row(table: Table, check: str) -> Row:
    return next(each for each in table.rows if each.check == check)


def machine(**software: str) -> Machine:
    packages = ("git_commit", "source", "python", "ds_linclip", "torch", "deepspeed", "numpy")
    usual = dict.fromkeys((*packages, "megatron-core", "cuda", "nccl", "driver"), "1.0")
    return Machine(
        software=usual | software,
        device=torch.device("cuda:0"),
        devices=["H, 80 GiB"] * 2,
        num_cores=8,
        memory=GIB,
    )


def test_the_host_with_other_software_is_named_and_a_driver_is_a_warning_only(judge, table):
    others = [machine(torch="2.0", driver="570.1"), machine(torch="2.0", driver="570.1")]
    assert judge.machines([machine(), machine(), *others, machine(), machine()])
    (problem,) = row(table, "torch").problems
    assert problem.host == "node2"
    assert problem.found == "torch 2.0, where node1, node3 has 1.0"
    assert row(table, "python").verdict == "ok"
    assert row(table, "GPU software").verdict == "warning"
    assert table.exit_code == ExitCode.USER_ERROR
    assert "| torch          | FAILURE | 1.0 (node1, node3); 2.0 (node2)" in table.text()


def test_a_host_without_enough_gpus_leaves_the_links_unmeasured(judge, table):
    short = Failed("parallel.device (cuda) needs a GPU for each of the 2 ranks on this node")
    assert not judge.machines([machine(), machine(), short, short, machine(), machine()])
    table.skip("links", why="devices come first")
    (problem,) = row(table, "devices").problems
    assert (problem.host, problem.found) == ("node2", short.reason)
    assert row(table, "links").verdict == "not checked"
    assert "of 2 checks 1 failed" in table.text()


def test_clocks_are_compared_over_the_shortest_round_trip(judge, table):
    # The second took longest on one way; the first says 5 s ahead, to half of its 2 ms.
    found = offset_of([(100.0, 105.001, 100.002), (101.0, 106.9, 102.0)])
    assert found.seconds == pytest.approx(5.0)
    assert found.bound == pytest.approx(0.001)
    # Two hosts are out by less than the limit or than can be known.
    offsets = {2: Offset(0.3, 0.001), 4: found}
    judge.clocks([offsets, *[{}] * 5], limit=1.0)
    (problem,) = row(table, "clocks").problems
    assert (problem.host, problem.is_warning) == ("node3", True)
    assert problem.found == "+5.000 s (± 0.001) against node1"
    assert row(table, "clocks").found == "0 (node1) to 5000 (node3) ms ahead of node1, ± 1 ms"
    unsure = Table(HOSTS)
    Judge(unsure, HOSTS).clocks([{2: Offset(5.0, 4.5)}, *[{}] * 5], limit=1.0)
    assert row(unsure, "clocks").verdict == "ok"


def test_the_slow_link_is_named_by_its_ends_and_bandwidths_are_those_of_nccl_tests(judge, table):
    assert Speed(10**9, 4, 1.0).algorithm_bandwidth == 1e9
    assert Speed(10**9, 4, 1.0).bus_bandwidth == 1.5e9
    assert Speed(10**9, 2, 0.5).bus_bandwidth == 2e9

    def speeds(seconds: float, small: float = 1e-4) -> list[Speed]:
        return [Speed(8, 2, 1e-5), Speed(2**20, 2, small), Speed(2**26, 2, seconds)]

    everywhere = [Speed(8, 6, 1e-5), Speed(2**20, 6, 1e-3), Speed(2**26, 6, 0.1)]
    judge.links(
        [
            Links(everywhere, speeds(0.01, small=1e-3), speeds(0.02)),
            Links(everywhere, speeds(0.01, small=1e-3), []),
            Links(everywhere, speeds(0.011), speeds(0.08)),
            Links(everywhere, speeds(0.011), []),
            Links(everywhere, speeds(0.012), []),
            Links(everywhere, speeds(0.012), []),
        ]
    )
    (problem,) = row(table, "all-reduce, host to host").problems
    assert (problem.host, problem.is_warning) == ("node2 to node3", True)
    assert row(table, "all-reduce, within hosts").verdict == "ok"
    figures = row(table, "all-reduce, all ranks").figures["all hosts"][1]
    assert figures["bus_bandwidth"] == pytest.approx(figures["algorithm_bandwidth"] * 10 / 6)
    assert table.exit_code == ExitCode.FINISHED


def test_room_is_asked_for_what_the_run_needs(judge, table):
    def spaces(free: float) -> dict[str, Space]:
        room = Space(path="/out", free=int(free * GIB), needed=10 * GIB, why="4 checkpoints")
        return {"checkpoints": room, "cache": room}

    judge.spaces([spaces(20), None, spaces(9), None, spaces(20), None], 0)
    (problem,) = row(table, "disk: checkpoints").problems
    assert (problem.host, problem.found) == ("node2", "9 GiB free in /out")
    assert problem.rule == "10 GiB must be free for checkpoints: 4 checkpoints"
    assert row(table, "disk: cache").verdict == "warning"  # the shards may be fewer
    tight = Table(HOSTS)
    Judge(tight, HOSTS).spaces([spaces(20), None, spaces(20), None, spaces(40), None], 30 * GIB)
    assert row(tight, "disk: cache").verdict == "FAILURE"
    assert [each.host for each in row(tight, "disk: cache").problems] == ["node1", "node2"]
    assert "--min-free-gib" in row(tight, "disk: cache").problems[0].rule


def test_ranks_that_do_not_fit_the_axes_or_the_batch_are_told_of():
    config = load_config("ds_configs/train/embedded.yaml", ["parallel.tp=2"])
    for ranks, verdict in ((6, "FAILURE"), (3, "FAILURE"), (4, "ok")):
        hosts = [f"node{rank}" for rank in range(ranks)]
        table = Table(hosts)
        Judge(table, hosts).layout(config)
        assert table.rows[0].verdict == verdict, table.text()
    assert json.loads(table.json())["rows"][0]["figures"]["dp"] == 2
