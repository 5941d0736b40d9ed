"""The preflight on ranks of one machine, and on two hosts made of namespaces."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ds_linclip.config import load_config
from ds_linclip.parallel.spawn import run_ranks
from ds_linclip.preflight.node_checks import disk_space
from ds_linclip.preflight.rendezvous import Rendezvous, RendezvousError
from helpers import EMBEDDED, REPOSITORY
from helpers.forked_ranks import train_in_ranks
from helpers.two_hosts import TwoHosts
from linclip_launch import preflight
from linclip_launch.cli import parse

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def config_file(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded run as a file, since ssh takes the quotes of a command line apart."""
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(
        f"base: {EMBEDDED}\noutput_dir: {path.parent}/runs\n"
        f"data:\n  train: ['{digits}/train/{{00000..00007}}.tar']\neval:\n  data: {digits}/test\n"
    )
    return path


def run_preflight(folder: Path, arguments: list[str], ranks: tuple[int, ...]) -> None:
    """Run the command on some ranks; write exit code and output of each into ``folder``."""
    rank = int(os.environ["RANK"])
    if rank not in ranks:
        return
    words = ["preflight", *arguments, "--json", str(folder / f"{rank}.json")]
    out = folder / f"{rank}.out"
    started = time.monotonic()
    with out.open("w") as file, contextlib.redirect_stdout(file):
        code = preflight.check(parse(words)[0])
    (folder / f"{rank}.code").write_text(str(int(code)))
    (folder / f"{rank}.seconds").write_text(str(time.monotonic() - started))


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    return {row["check"]: row for row in json.loads(path.read_text())["rows"]}


def problems_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Return pairs of a host and what was found there."""
    return [(host, found) for problem in row["problems"] for host, found in problem["found"]]


def test_all_problems_of_one_machine_are_reported_at_once(config_file, tmp_path, digits):
    not_a_shard = tmp_path / "00000.tar"
    not_a_shard.write_text("<html>please log in</html>" * 100)
    sources = [f"{digits}/train/{{00000..00009}}.tar", f"{{shards: {not_a_shard}, num_samples: 9}}"]
    arguments = [
        *(str(config_file), f"data.train=['{sources[0]}', {sources[1]}]"),
        *("parallel.tp=2", "parallel.dp=3", "train.global_batch_size=129"),
        *("output_dir=/sys/linclip", "--min-free-gib", "1e9", f"eval.data={tmp_path}/nothing"),
    ]
    run_ranks(2, run_preflight, tmp_path, arguments, (0, 1))

    assert [(tmp_path / f"{rank}.code").read_text() for rank in (0, 1)] == ["2", "2"]
    rows, table = rows_of(tmp_path / "0.json"), (tmp_path / "0.out").read_text()
    assert (tmp_path / "1.out").read_text() == ""  # only rank 0 prints
    failed = {check for check, row in rows.items() if row["verdict"] == "FAILURE"}
    expected = {"ranks", "output folder", "disk: checkpoints", "training data", "held-out data"}
    assert failed == expected, table
    assert "parallel.dp=1 would do, or 6 ranks" in rows["ranks"]["problems"][0]["rule"]
    assert "/sys/linclip" in problems_of(rows["output folder"])[0][1]
    data = problems_of(rows["training data"])
    assert "2 of 10 are missing, first" in data[0][1]
    assert f"{not_a_shard} is no tar file" in data[1][1]
    assert "nothing" in problems_of(rows["held-out data"])[0][1]
    for check in failed:
        for problem in rows[check]["problems"]:
            assert all(host for host, _ in problem["found"])
            assert problem["rule"]
            assert problem["remedy"] in table
    for check in ("process group", "all-reduce, all ranks", "clocks"):
        assert rows[check]["verdict"] == "ok"
    assert f"verdict: NOT ready ({len(rows)} checks: 5 failed" in table


def test_a_rank_that_does_not_arrive_ends_the_others_in_time(config_file, tmp_path):
    run_ranks(3, run_preflight, tmp_path, [str(config_file), "--timeout", "3"], (0, 1))
    assert [(tmp_path / f"{rank}.code").read_text() for rank in (0, 1)] == ["2", "2"]
    assert float((tmp_path / "0.seconds").read_text()) < 20
    assert (tmp_path / "1.out").read_text() == ""  # rank 0 knows, and prints it
    ((_, found),) = problems_of(rows_of(tmp_path / "0.json")["answers"])
    assert found == "no answer to 'arrive' within 8 s from ranks of hosts unknown: 2"
    # Nobody listens at the master's port.
    run_ranks(2, run_preflight, tmp_path, [str(config_file), "--timeout", "3"], (1,))
    ((_, found),) = problems_of(rows_of(tmp_path / "1.json")["answers"])
    assert "cannot be reached in 3 s" in found
    assert "refused" in found


def gather_in_vain(folder: Path) -> None:
    rendezvous = Rendezvous.join(timeout=3)
    rendezvous.wait_for_all()
    rank = rendezvous.rank
    slow = rendezvous.gather("slow", lambda: time.sleep(60 * rank))
    wrong = rendezvous.gather("wrong", lambda: 1 / (1 - rank), [1])
    assert slow.values == {0: None}
    assert slow.errors == dict.fromkeys((1, 2), "not finished within 3 s")
    assert wrong.values == {}
    assert wrong.errors == {1: "ZeroDivisionError: division by zero"}
    if rank == 2:
        os._exit(0)
    message = r"no answer to 'gone' within 8 s from ranks of .*: 2"
    with pytest.raises(RendezvousError, match=message):
        rendezvous.gather("gone", lambda: rank)
    (folder / str(rank)).write_text("raised")
    rendezvous.close()


def test_a_rank_that_fails_hangs_or_ends_does_not_hold_up_the_others(tmp_path):
    run_ranks(3, gather_in_vain, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_checkpoints_take_the_room_that_is_required(embedded_overrides, tmp_path, optimizer):
    overrides = [
        *(*embedded_overrides, f"output_dir={tmp_path}", "train.steps=4", "eval.data=null"),
        *("optim.warmup_steps=1", f"optim.kind={optimizer}", "optim.ema_decay=0.9"),
        *("train.global_batch_size=8", "checkpoint.every_steps=1", "checkpoint.keep_last=2"),
        *("log.tensorboard=false", "data.num_workers=0"),
    ]
    config = load_config(EMBEDDED, overrides)
    before = disk_space(config)["checkpoints"]
    train_in_ranks(config, 1)
    after = disk_space(config)["checkpoints"]
    saved = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert saved == pytest.approx(before["needed"] * 2 / 3, rel=0.01)  # one more is being written
    assert after["needed"] == pytest.approx(before["needed"] / 3, rel=0.05)


def on_hosts(
    hosts: TwoHosts, slots: int, arguments: list[object], *options: object
) -> subprocess.CompletedProcess[str]:
    """Run the command of docs/preflight.md from the first host."""
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [launcher, "--hostfile", hosts.hostfile(slots), *options]
    command += ["--module", "linclip_launch.preflight", *arguments]
    paths = [path for path in sys.path if path]  # as this process finds modules
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return hosts.run("node1", *command, cwd=REPOSITORY, **environment)


def test_two_hosts(hosts, config_file, digits, tmp_path):
    found, runs = tmp_path / "found.json", tmp_path / "runs"
    arguments = [config_file, f"output_dir={runs}/new", "--json", found]
    master = ["--master_addr", hosts.addresses["node1"]]

    # Nothing is wrong.
    done = on_hosts(hosts, 2, arguments, *master)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(found)
    assert {row["verdict"] for row in rows.values()} <= {"ok", "warning"}, done.stdout
    assert "verdict: ready to train" in done.stdout
    assert rows["ranks"]["figures"] == {"ranks": 4, "dp": 4, "per_host": {"node1": 2, "node2": 2}}
    # One machine's clock, seen through the cable.
    offset = rows["clocks"]["figures"]["node2"]
    assert abs(offset["seconds"]) <= offset["bound"] + 1e-4
    assert 0 < offset["bound"] < 0.1
    everywhere = rows["all-reduce, all ranks"]["figures"]["all hosts"]
    assert [each["size"] for each in everywhere] == [8, 2**20, 2**26]
    for each in everywhere:
        assert each["algorithm_bandwidth"] == pytest.approx(each["size"] / each["seconds"])
        assert each["bus_bandwidth"] == pytest.approx(each["algorithm_bandwidth"] * 6 / 4)
    assert rows["all-reduce, within hosts"]["figures"].keys() == {"node1", "node2"}
    assert rows["all-reduce, host to host"]["figures"].keys() == {"node1 to node2"}
    assert rows["output folder"]["figures"]["fsync_seconds"].keys() == {"node1", "node2"}
    assert not runs.exists()
    assert not hosts.processes("node1")
    assert not hosts.processes("node2")

    # The second host with another deepspeed, another commit, a folder of its own, no data.
    runs.mkdir()
    metadata = tmp_path / "METADATA"
    installed = metadata_of("deepspeed")
    metadata.write_text(installed.read_text().replace("\nVersion: ", "\nVersion: 9."))
    for what, where in (
        (f"--bind {metadata}", installed),
        (f"--bind {other_commit(tmp_path)}", REPOSITORY / ".git"),
        ("-t tmpfs tmpfs", runs),
        ("-t tmpfs tmpfs", digits / "train"),
    ):
        mounted = hosts.run("node2", "mount", *what.split(), where)
        assert mounted.returncode == 0, mounted.stderr
    done = on_hosts(hosts, 1, arguments, *master)
    assert done.returncode == 2, done.stdout + done.stderr
    rows = rows_of(found)
    failed = {check for check, row in rows.items() if row["verdict"] == "FAILURE"}
    assert failed == {"deepspeed", "ds_linclip", "output folder", "training data"}, done.stdout
    for check, what in (
        ("deepspeed", "deepspeed 9."),
        ("ds_linclip", "git_commit "),
        ("output folder", "which node1 has created, is not there"),
        ("training data", "00000.tar cannot be opened"),
    ):
        ((host, value),) = problems_of(rows[check])
        assert host == "node2"
        assert what in value
    assert list(runs.iterdir()) == []
    assert not hosts.processes("node1")
    assert not hosts.processes("node2")

    # The second host is not started; the launcher of the first one knows its name.
    alone = ["--no_ssh", "--node_rank", "0", *master]
    done = on_hosts(hosts, 1, [*arguments, "--timeout", "2"], *alone)
    assert done.returncode == 2, done.stdout + done.stderr
    ((host, value),) = problems_of(rows_of(found)["answers"])
    assert (host, value) == ("node2", "no answer to 'arrive' within 7 s from ranks of node2: 1")
    assert not hosts.processes("node1")


def metadata_of(package: str) -> Path:
    folders = (Path(path) for path in sys.path)
    found = (path for folder in folders for path in folder.glob(f"{package}-*.dist-info/METADATA"))
    return next(found).resolve()


def other_commit(folder: Path) -> Path:
    """Return a replacement for ``.git`` of this checkout that is one commit ahead."""
    copy = folder / "copy"
    subprocess.run(["git", "clone", "--quiet", "--shared", REPOSITORY, copy], check=True)
    commit = "-c user.name=n -c user.email=e commit --quiet --allow-empty -m other"
    subprocess.run(["git", "-C", copy, *commit.split()], check=True)
    if (REPOSITORY / ".git").is_dir():
        return copy / ".git"
    pointer = folder / "gitdir"  # a worktree's is a file
    pointer.write_text(f"gitdir: {copy}/.git\n")
    return pointer
