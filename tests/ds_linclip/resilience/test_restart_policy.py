import json
import time

import pytest
from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion

from ds_linclip.config import Config, ParallelConfig, TrainConfig
from ds_linclip.resilience.restart_policy import (
    Restart,
    Slots,
    choose_hosts,
    format_slots,
    newest_step,
    read_hostfile,
    record_restart,
    restart_reason,
    select_slots,
)
from linclip_launch.remote_hosts import HostReply, run_on_hosts


@pytest.mark.parametrize(
    ("exit_code", "is_complete", "reason"),
    [
        (0, True, None),
        (0, False, "the launcher was killed"),
        (1, False, "failed with exit code 1"),
        (2, False, None),
        (3, False, None),
        (75, False, None),
        (76, False, "hung"),
        (137, False, "a rank was ended by signal 9"),
        (100, False, "failed with exit code 100"),
        (247, False, "a rank was ended by signal 9"),
        (255, False, "a host was lost"),
        (245, False, "a rank was ended by signal 11"),
        (-9, False, "the launcher was ended by signal 9"),
    ],
)
def test_exit_code_decides_whether_to_restart(exit_code, is_complete, reason):
    assert restart_reason(exit_code, is_complete=is_complete) == reason


def config_of(batch: int, micro_batch: int | None = None, **axes: int | None) -> Config:
    train = TrainConfig(global_batch_size=batch, micro_batch_size=micro_batch)
    return Config(train=train, parallel=ParallelConfig(**axes))


def slots(**counts: int) -> Slots:
    return {host: list(range(count)) for host, count in counts.items()}


@pytest.mark.parametrize(
    ("config", "hosts", "expected"),
    [
        (config_of(64), slots(a=8, b=8), slots(a=8, b=8)),
        (config_of(64), slots(a=8, b=8, c=8), slots(a=8, b=8)),
        (config_of(48), slots(a=8, b=8, c=8), slots(a=8, b=8, c=8)),
        (config_of(48), slots(a=8, b=6), slots(a=8, b=4)),
        (config_of(64, tp=2, pp=2), slots(a=8, b=6), slots(a=8)),
        (config_of(64, tp=2, pp=3), slots(a=8, b=8), slots(a=8, b=4)),
        (config_of(64, micro_batch=8), slots(a=8, b=8), slots(a=8)),
        (config_of(64, dp=4), slots(a=3, b=3), slots(a=3, b=1)),
        (config_of(64), {"a": [0, 3], "b": [1, 2, 5]}, {"a": [0, 3], "b": [1, 2]}),
    ],
)
def test_as_many_ranks_as_fit_are_chosen(config, hosts, expected):
    assert choose_hosts(config, hosts) == expected


@pytest.mark.parametrize(
    ("config", "hosts", "min_nodes", "message"),
    [
        (config_of(64), {"a": 8}, 2, r"--min-nodes \(2\) is more than the hosts that answer \(a\)"),
        (config_of(64), {}, 1, r"--min-nodes \(1\) .* \(none\)"),
        (config_of(64, tp=4, pp=4), {"a": 8}, 1, r"the 8 slots of 1 hosts \(a 8\): .*cp \(16\)"),
        (config_of(64, dp=16), {"a": 8}, 1, r"parallel\.dp \(16\)"),
        (config_of(8), {"a": 8, "b": 8}, 2, r"--min-nodes \(2\) hosts must have ranks"),
    ],
)
def test_hosts_on_which_nothing_fits_are_refused(config, hosts, min_nodes, message):
    with pytest.raises(ValueError, match=message):
        choose_hosts(config, slots(**hosts), min_nodes)


def test_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# the cluster\nnode-1 slots=8\n\n  node-2   slots=4 # half\n")
    assert read_hostfile(path) == {"node-1": 8, "node-2": 4} == fetch_hostfile(str(path))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_hostfile(path) == {"node-1": 8, "node-2": 4}


@pytest.mark.parametrize(
    "text", ["", "node-1\n", "a slots=2\na slots=2\n", "a slots=x\n", "a slots=2x\n", "a slots=0\n"]
)
def test_bad_hostfile_is_refused(tmp_path, text):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"hostfile \(\S+hosts\)"):
        read_hostfile(path)


@pytest.mark.parametrize(
    ("include", "exclude"),
    [("", ""), ("b", ""), ("c@a:1", ""), ("b:3,0@b:1", ""), ("", "b"), ("", "a:0@c"), ("", "b:2")],
)
def test_slots_are_selected_as_deepspeed_selects_them(include, exclude):
    hosts = {"a": 2, "b": 4, "c": 1}
    selected = select_slots(hosts, include, exclude)
    assert selected == parse_inclusion_exclusion(hosts, include, exclude)
    assert list(selected) == sorted(selected)
    assert select_slots(hosts, format_slots(selected)) == selected


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("d", "", r"--include \(d\): host d must be in the hostfile \(a, b\)"),
        ("a@b:4", "", r"--include \(a@b:4\): host b has 4 slots, numbered from 0"),
        ("b:x", "", r"'b:x' must be host or host:slot,slot"),
        ("", "a@b", r"--exclude \(a@b\) must leave at least one slot"),
        ("a", "b", r"--include \(a\) and --exclude \(b\) exclude each other"),
    ],
)
def test_slots_that_do_not_exist_are_refused(include, exclude, message):
    with pytest.raises(ValueError, match=message):
        select_slots({"a": 2, "b": 4}, include, exclude)


def test_hosts_reply_at_the_same_time_and_within_the_limit(tmp_path):
    """A host with an error, a silent one, a healthy one, one without the command."""
    script = tmp_path / "check"
    script.write_text("case $1 in slow) exec sleep 60;; no) echo why >&2; exit 1;; esac; echo yes")
    started = time.monotonic()
    commands = {host: ["bash", str(script), host] for host in ("no", "slow", "well")}
    replies = run_on_hosts({**commands, "other": ["/no/such/command"]}, timeout=2)
    assert replies["no"] == HostReply(False, "why")
    assert replies["slow"] == HostReply(False, "no answer in 2 s")
    assert replies["well"] == HostReply(True, "yes")
    assert not replies["other"].is_ok
    assert time.monotonic() - started < 10


def test_newest_step_is_that_of_a_committed_checkpoint(tmp_path):
    assert newest_step(tmp_path) == 0
    for name in ("step-00000010", "step-00000020", "step-00000030.tmp", "step-00000040.rejected"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000010")
    assert newest_step(tmp_path) == 20


def test_restarts_are_lines_of_json(tmp_path):
    facts = {"exit_code": 247, "reason": "why", "ranks": 2, "hosts": None, "step": 20}
    for second in (1.0, 2.0):
        record_restart(tmp_path / "run", Restart(time=second, seconds_down=0.5, **facts))
    lines = (tmp_path / "run" / "restarts.jsonl").read_text().splitlines()
    assert [json.loads(x) for x in lines] == [
        {"time": second, "seconds_down": 0.5, **facts} for second in (1.0, 2.0)
    ]
