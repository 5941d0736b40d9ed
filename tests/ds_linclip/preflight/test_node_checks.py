"""Reports about nodes, on clusters that cannot be had in a test."""

import json

import pytest

from ds_linclip.config import Config, load_config
from ds_linclip.preflight.node_checks import (
    DiskSpace,
    Node,
    check_disk_space,
    check_layout,
    check_nodes,
)
from ds_linclip.preflight.table import CheckResult, exit_code_of, format_json, format_table
from ds_linclip.process.exit_codes import ExitCode
from helpers.fake_cluster import FakeCluster

HOSTS = ["node1", "node1", "node2", "node2", "node3", "node3"]
GIB = 2**30


def by_name(results: list[CheckResult]) -> dict[str, CheckResult]:
    return {result.check: result for result in results}


def node(**software: str) -> Node:
    packages = ("git_commit", "source", "python", "ds_linclip", "torch", "deepspeed", "numpy")
    usual = dict.fromkeys((*packages, "megatron-core", "cuda", "nccl", "driver"), "1.0")
    return {
        "software": usual | software,
        "device": "cuda:0",
        "devices": ["H, 80 GiB"] * 2,
        "num_cores": 8,
        "memory": GIB,
    }


def test_the_host_with_other_software_is_named_and_another_driver_is_only_a_warning():
    others = [node(torch="2.0", driver="570.1")] * 2
    cluster = FakeCluster(HOSTS, node=[node(), node(), *others, node(), node()])
    results, can_communicate = check_nodes(cluster, Config())
    assert can_communicate
    rows = by_name(results)
    (problem,) = rows["torch"].problems
    assert problem.found == [("node2", "torch 2.0, where node1, node3 has 1.0")]
    assert rows["python"].verdict == "ok"
    assert rows["GPU software"].verdict == "warning"
    assert rows["devices"].found == "2 ranks, 2 x H, 80 GiB, 8 cores, 1 GiB"
    assert exit_code_of(results) == ExitCode.USER_ERROR
    assert "| torch          | FAILURE | 1.0 (node1, node3); 2.0 (node2)" in format_table(results)


def test_ranks_cannot_communicate_when_a_host_has_too_few_gpus():
    error = ValueError("parallel.device (cuda) needs a GPU for each of the 2 ranks on this node")
    cluster = FakeCluster(HOSTS, node=[node(), node(), error, error, node(), node()])
    results, can_communicate = check_nodes(cluster, Config())
    assert not can_communicate
    (result,) = results
    assert result.check == "devices"
    (problem,) = result.problems
    assert problem.found == [("node2", str(error))]


def test_ranks_cannot_communicate_between_gpus_and_cpus():
    on_cpu = {**node(), "device": "cpu", "devices": []}
    cluster = FakeCluster(["node1", "node2"], node=[node(), on_cpu])
    results, can_communicate = check_nodes(cluster, Config())
    assert not can_communicate
    assert by_name(results)["devices"].verdict == "FAILURE"


def disk_space_of(*free_gib: float) -> list[dict[str, DiskSpace] | None]:
    results: list[dict[str, DiskSpace] | None] = []
    for free in free_gib:
        space = DiskSpace(
            path="/out", free=int(free * GIB), needed=10 * GIB, reason="4 checkpoints"
        )
        results += [{"checkpoints": space, "cache": space}, None]
    return results


def test_a_host_with_too_little_room_for_the_run_is_named():
    cluster = FakeCluster(HOSTS, disk=disk_space_of(20, 9, 20))
    rows = by_name(list(check_disk_space(cluster, Config(), 0)))
    (problem,) = rows["disk: checkpoints"].problems
    text = "9 GiB free in /out, 10 GiB needed: 4 checkpoints"
    assert problem.found == [("node2", text)]
    assert rows["disk: checkpoints"].verdict == "FAILURE"
    assert rows["disk: cache"].verdict == "warning"  # the shards may be fewer


def test_less_room_than_min_free_gib_is_a_failure():
    cluster = FakeCluster(HOSTS, disk=disk_space_of(20, 20, 40))
    cache = by_name(list(check_disk_space(cluster, Config(), 30 * GIB)))["disk: cache"]
    assert cache.verdict == "FAILURE"
    (problem,) = cache.problems
    assert [host for host, _ in problem.found] == ["node1", "node2"]
    assert "--min-free-gib" in problem.found[0][1]


@pytest.mark.parametrize(("num_ranks", "verdict"), [(6, "FAILURE"), (3, "FAILURE"), (4, "ok")])
def test_ranks_must_fit_the_axes_and_the_batch(num_ranks, verdict):
    config = load_config("ds_configs/train/embedded.yaml", ["parallel.tp=2"])
    result = check_layout([f"node{rank}" for rank in range(num_ranks)], config)
    assert result.verdict == verdict
    (row,) = json.loads(format_json([result], ["node0"]))["rows"]
    assert row["verdict"] == verdict
    if verdict == "ok":
        assert row["figures"]["dp"] == 2
        assert row["figures"]["per_host"] == dict.fromkeys(map("node{}".format, range(4)), 1)
