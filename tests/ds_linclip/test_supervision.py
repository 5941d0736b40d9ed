import json
import time

import pytest

from ds_linclip.config import Config, ParallelConfig, TrainConfig
from ds_linclip.supervision import (
    Restart,
    choose_hosts,
    format_hostfile,
    hosts_that_answer,
    newest_step,
    read_hostfile,
    record,
    verdict,
)


@pytest.mark.parametrize(
    ("exit_code", "is_complete", "starts_again", "reason"),
    [
        (0, True, False, "finished"),
        (0, False, True, "the launcher was killed"),
        (1, False, True, "failed with exit code 1"),
        (2, False, False, "the user's to mend"),
        (3, False, False, "diverged"),
        (75, False, False, "asked to leave"),
        (76, False, True, "hung"),
        (247, False, True, "a rank was ended by signal 9"),
        (245, False, True, "a rank was ended by signal 11"),
        (-9, False, True, "the launcher was ended by signal 9"),
    ],
)
def test_exit_code_decides(exit_code, is_complete, starts_again, reason):
    assert verdict(exit_code, is_complete=is_complete) == (starts_again, reason)


def config_of(batch: int, micro_batch: int | None = None, **axes: int | None) -> Config:
    train = TrainConfig(global_batch_size=batch, micro_batch_size=micro_batch)
    return Config(train=train, parallel=ParallelConfig(**axes))


@pytest.mark.parametrize(
    ("config", "hosts", "expected"),
    [
        (config_of(64), {"a": 8, "b": 8}, {"a": 8, "b": 8}),
        (config_of(64), {"a": 8, "b": 8, "c": 8}, {"a": 8, "b": 8}),
        (config_of(48), {"a": 8, "b": 8, "c": 8}, {"a": 8, "b": 8, "c": 8}),
        (config_of(48), {"a": 8, "b": 6}, {"a": 8, "b": 4}),
        (config_of(64, tp=2, pp=2), {"a": 8, "b": 6}, {"a": 8}),
        (config_of(64, tp=2, pp=3), {"a": 8, "b": 8}, {"a": 8, "b": 4}),
        (config_of(64, micro_batch=8), {"a": 8, "b": 8}, {"a": 8}),
        (config_of(64, dp=4), {"a": 3, "b": 3}, {"a": 3, "b": 1}),
    ],
)
def test_most_ranks_that_fit(config, hosts, expected):
    assert choose_hosts(config, hosts) == expected


@pytest.mark.parametrize(
    ("config", "hosts", "min_nodes", "message"),
    [
        (config_of(64), {"a": 8}, 2, r"--min-nodes \(2\) is more than the hosts that answer \(a\)"),
        (config_of(64), {}, 1, r"--min-nodes \(1\) .* \(none\)"),
        (config_of(64, tp=4, pp=4), {"a": 8}, 1, r"the 8 slots of 1 hosts: .*cp \(16\)"),
        (config_of(64, dp=16), {"a": 8}, 1, r"parallel\.dp \(16\)"),
        (config_of(8), {"a": 8, "b": 8}, 2, r"--min-nodes \(2\) hosts must have ranks"),
    ],
)
def test_nothing_fits(config, hosts, min_nodes, message):
    with pytest.raises(ValueError, match=message):
        choose_hosts(config, hosts, min_nodes)


def test_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# the cluster\nnode-1 slots=8\n\nnode-2   slots=4 # half\n")
    hosts = read_hostfile(path)
    assert hosts == {"node-1": 8, "node-2": 4}
    path.write_text(format_hostfile(hosts))
    assert read_hostfile(path) == hosts


@pytest.mark.parametrize("text", ["", "node-1\n", "a slots=2\na slots=2\n", "a slots=x\n"])
def test_bad_hostfile_is_refused(tmp_path, text):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"hostfile \(\S+hosts\)"):
        read_hostfile(path)


def test_hosts_are_asked_at_once_and_in_time(tmp_path):
    """A host that says no, one that never answers, one that is well."""
    script = tmp_path / "check"
    script.write_text("case $1 in slow) exec sleep 60;; no) exit 1;; esac")
    begun = time.monotonic()
    hosts = {"no": 1, "slow": 2, "well": 4}
    left = hosts_that_answer(hosts, f"bash {script} {{host}}", timeout=2)
    assert left == {"well": 4}
    assert time.monotonic() - begun < 10
    assert hosts_that_answer({"well": 1}, "/no/such/command {host}", timeout=3) == {}


def test_newest_step_is_that_of_a_committed_checkpoint(tmp_path):
    assert newest_step(tmp_path) == 0
    for name in ("step-00000010", "step-00000020", "step-00000030.tmp", "step-00000040.rejected"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000010")
    assert newest_step(tmp_path) == 20


def test_restarts_are_lines_of_json(tmp_path):
    facts = {"exit_code": 247, "reason": "why", "ranks": 2, "hosts": None, "step": 20}
    for second in (1.0, 2.0):
        record(tmp_path / "run", Restart(time=second, seconds_down=0.5, **facts))
    lines = (tmp_path / "run" / "restarts.jsonl").read_text().splitlines()
    assert [json.loads(x) for x in lines] == [
        {"time": second, "seconds_down": 0.5, **facts} for second in (1.0, 2.0)
    ]
