"""``launch/multinode.sh`` on two hosts: over ssh, without ssh, when one is lost, and refused."""

import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
import yaml

from ds_linclip.config import load_config, save_config
from ds_linclip.process.exit_codes import ExitCode
from ds_linclip.resilience.restart_policy import newest_step
from helpers import EMBEDDED, REPOSITORY
from helpers.forked_ranks import train_in_ranks
from helpers.killed_runs import batches, losses, stands_beyond, wait_until
from helpers.two_hosts import TwoHosts

pytestmark = pytest.mark.distributed
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
STEPS = 60
BOTH = "node1 slots=1\nnode2 slots=1\n"


@pytest.fixture
def overrides(embedded_overrides: list[str], tmp_path: Path) -> list[str]:
    return [
        *(*embedded_overrides, "eval.data=null", f"train.steps={STEPS}", "optim.warmup_steps=4"),
        *("model.vision.image_size=16", "model.vision.layers=1", "model.text.layers=1"),
        *("data.num_workers=1", "train.global_batch_size=16", "checkpoint.every_steps=5"),
        *("log.every_steps=1", "log.sample_keys=true", "log.tensorboard=false", "optim.eps=1e-4"),
        f"output_dir={tmp_path}",
    ]


@pytest.fixture
def whole(overrides: list[str], tmp_path: Path) -> dict[int, float]:
    """Losses of an undisturbed run, on two ranks of this machine."""
    config = load_config(EMBEDDED, [*overrides, "name=whole", "data.num_workers=0"])
    return train_in_ranks(config, 2)[0]


def nothing_is_left(hosts: TwoHosts) -> bool:
    """Return whether no process is left but sshd's of broken logins, which TCP ends hours later."""
    lines = [line for name in hosts.names for line in hosts.processes(name).values()]
    return all(line.startswith("sshd: ") for line in lines)


def starts_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]


def test_over_ssh_until_preempted_then_without_ssh_on_each_host(hosts, overrides, whole, tmp_path):
    """Without ssh as in the pods of a Kubernetes Job: with the script of launch/k8s.yaml."""
    # A name that shells would split.
    run = tmp_path / "a 'b' $HOME {1..2}"
    experiment = [EMBEDDED, *overrides, f'name="{run.name}"']
    running = hosts.start(
        *("node1", "launch/multinode.sh", hosts.hostfile(), *experiment),
        cwd=REPOSITORY,
        **ENVIRONMENT,
    )
    wait_until(lambda: running.poll() is not None or stands_beyond(run, 5))
    seen = {name: hosts.processes(name) for name in hosts.names}
    ranks = [pid for pid, line in seen["node2"].items() if "--local_rank=0" in line]
    environment = Path(f"/proc/{ranks[0]}/environ").read_text().split("\0")
    assert {f"{key}={value}" for key, value in ENVIRONMENT.items()} <= set(environment)
    assert "NCCL_DEBUG=WARN" in environment  # from launch/environment.sh
    (supervisor,) = (
        pid
        for pid, line in seen["node1"].items()
        if "linclip_launch train" in line or "linclip train" in line
    )
    os.kill(supervisor, signal.SIGTERM)
    out, err = running.communicate(timeout=100)
    assert running.returncode == ExitCode.PREEMPTED, out + err
    wait_until(lambda: nothing_is_left(hosts), 5)
    left_at = newest_step(run)
    assert 5 < left_at < STEPS
    assert f"step-{left_at:08d} is saved; start again to resume" in err

    with (hosts.folder / "hosts").open("a") as names:  # those of the service
        names.writelines(
            f"{hosts.addresses[name]} linclip-{i}.linclip\n" for i, name in enumerate(hosts.names)
        )
    command, environment = script_of_a_pod(experiment)
    pods = []
    for index, name in enumerate(hosts.names):
        own = tmp_path / f"pod-{index}"
        own.mkdir()
        given = environment | ENVIRONMENT | {"TMPDIR": str(own), "JOB_COMPLETION_INDEX": str(index)}
        pods.append(hosts.start(name, *command, cwd=REPOSITORY, **given))
    for pod in pods:
        out, err = pod.communicate(timeout=200)
        assert pod.returncode == 0, out + err
    wait_until(lambda: nothing_is_left(hosts), 5)

    starts = starts_of(run)
    assert [start["hosts"] for start in starts] == [{"node1": 1, "node2": 1}] * 2
    assert [start["resumed_from"] for start in starts] == [None, f"step-{left_at:08d}"]
    assert losses(run) == whole
    assert batches(run)[0] == batches(tmp_path / "whole")[0]


def script_of_a_pod(experiment: list[object]) -> tuple[list[str], dict[str, str]]:
    """Return the command of a container of the Job, with another experiment and a rank per pod,
    and its environment."""
    _, job = yaml.safe_load_all((REPOSITORY / "launch" / "k8s.yaml").read_text())
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert environment["NODES"] == str(spec["completions"]) == str(spec["parallelism"])
    assert f"slots={container['resources']['limits']['nvidia.com/gpu']}" in container["args"][2]
    final = {code for rule in spec["podFailurePolicy"]["rules"][:2] for code in codes_of(rule)}
    assert final == {ExitCode.USER_ERROR, ExitCode.DIVERGED, ExitCode.PREEMPTED}
    bash, option, script = container["args"]
    script, found = re.subn(
        r"ds_configs/.*", lambda _: shlex.join(map(str, experiment)), script, flags=re.DOTALL
    )
    assert found == 1
    return [bash, option, script.replace("slots=8", "slots=1")], environment


def codes_of(rule: dict) -> list[int]:
    return rule["onExitCodes"]["values"]


@pytest.mark.slow
def test_plain_deepspeed_with_pdsh_starts_the_same_ranks(hosts, overrides, whole, tmp_path):
    save_config(load_config(EMBEDDED, [*overrides, "name=plain"]), tmp_path / "config.yaml")
    sent = tmp_path / "deepspeed_env"  # pdsh's ranks get no other environment
    sent.write_text("".join(f"{key}={value}\n" for key, value in ENVIRONMENT.items()))
    done = hosts.run(
        *("node1", Path(sys.executable).with_name("deepspeed"), "--hostfile", hosts.hostfile()),
        *("--module", "linclip_launch.train", tmp_path / "config.yaml"),
        cwd=REPOSITORY,
        **ENVIRONMENT,
        DS_ENV_FILE=str(sent),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wait_until(lambda: nothing_is_left(hosts), 5)
    (start,) = starts_of(tmp_path / "plain")
    assert start["hosts"] == {"node1": 1, "node2": 1}
    assert losses(tmp_path / "plain") == whole


@pytest.mark.slow
def test_crash_on_one_host_restarts_all_without_ssh(hosts, overrides, whole, tmp_path):
    run = tmp_path / "crashed"
    command = ["launch/multinode.sh", hosts.hostfile(), "--backoff-seconds", 0.1, EMBEDDED]
    both = [
        hosts.start(
            *(name, *command, "--node-rank", rank, *overrides, "name=crashed"),
            cwd=REPOSITORY,
            **ENVIRONMENT,
        )
        for rank, name in enumerate(hosts.names)
    ]
    wait_until(lambda: any(host.poll() is not None for host in both) or stands_beyond(run, 5))
    ranks = [pid for pid, line in hosts.processes("node2").items() if "--local_rank=0" in line]
    os.kill(min(ranks), signal.SIGKILL)
    for host in both:
        out, err = host.communicate(timeout=300)
        assert host.returncode == 0, out + err
    wait_until(lambda: nothing_is_left(hosts), 5)
    assert len((run / "restarts.jsonl").read_text().splitlines()) == 1
    assert losses(run) == whole
    assert batches(run)[0] == batches(tmp_path / "whole")[0]


@pytest.mark.faults
@pytest.mark.parametrize("loss", ["power", pytest.param("cable", marks=pytest.mark.slow)])
def test_run_resumes_without_a_host_that_is_lost(loss, hosts, overrides, whole, tmp_path):
    run = tmp_path / "lost"
    shell = "ssh -o BatchMode=yes -o ServerAliveInterval=1 -o ServerAliveCountMax=3 {host}"
    running = hosts.start(
        *("node1", "launch/multinode.sh", hosts.hostfile(), "--backoff-seconds", 0.1),
        *("--remote-shell", shell, "--check-seconds", 5, EMBEDDED, *overrides, "name=lost"),
        *("watchdog.timeout_seconds=20",),
        cwd=REPOSITORY,
        **ENVIRONMENT,
    )
    wait_until(lambda: running.poll() is not None or stands_beyond(run, 10))
    assert len(hosts.processes("node2")) >= 4, running.poll()  # sshd, launcher, rank, data worker
    if loss == "power":
        hosts.power_off("node2")
    else:
        hosts.link("node2", "down")
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, out + err
    assert "host node2 does not answer and is left out" in err
    # Ranks that cannot be reached end by themselves.
    wait_until(lambda: nothing_is_left(hosts), 60)

    (restart,) = map(json.loads, (run / "restarts.jsonl").read_text().splitlines())
    assert (restart["ranks"], restart["hosts"]) == (1, ["node1"]), err
    assert [start["hosts"] for start in starts_of(run)] == [{"node1": 1, "node2": 1}, {"node1": 1}]
    step = restart["step"]
    assert step >= 10
    assert step % 5 == 0
    assert losses(run) == pytest.approx(whole, rel=1e-4)
    assert {n: loss for n, loss in losses(run).items() if n <= step} == {
        n: loss for n, loss in whole.items() if n <= step
    }
    keys, starts = batches(run)
    assert {n: sorted(batch) for n, batch in keys.items()} == {
        n: sorted(batch) for n, batch in batches(tmp_path / "whole")[0].items()
    }
    assert starts == {(0, 2), (step, 1)}


#: Hostfile, options and overrides; a pattern for the one line of error.
REFUSED = [
    (
        "node1 slots=1\nnode2\n",
        [],
        r"hostfile \(.*hosts.txt\), line 2: 'node2' must be 'host",
    ),
    ("node1 slots=1\n" * 2, [], r"line 2: 'node1 slots=1' names node1 again: give it one line"),
    ("node1 slots=0\n", [], r"line 1: 'node1 slots=0' must have at least one slot"),
    ("\n", [], r"hostfile \(.*hosts.txt\) must name at least one host"),
    (
        BOTH,
        ["parallel.dp=4"],
        r"no .* fits the 2 slots of 2 hosts \(node1 1, node2 1\).*dp \(4\)",
    ),
    (
        BOTH,
        ["parallel.tp=2", "parallel.pp=2"],
        r"must be a multiple of parallel\.tp x pp x cp \(4\)",
    ),
    (
        BOTH,
        ["--include=node3"],
        r"--include \(node3\): host node3 must be in the hostfile",
    ),
    (BOTH, ["--exclude=node1:1"], r"host node1 has 1 slots, numbered from 0"),
    (BOTH, ["--node-rank=2"], r"--node-rank \(2\) must be from 0 to 1, .* among node1, node2"),
    (BOTH, ["--master-port=29777"], r"\(29777\) is taken on host node1: choose another one"),
    (BOTH, ["--node-rank=0", "--master-port=29777"], r"\(29777\) is taken on this host: choose"),
    (BOTH + "node9 slots=1\n", ["train.global_batch_size=9"], r"host node9 .*: fix it, or leave"),
    (BOTH, ["--remote-shell=ssh -p 23 {host}"], r"node1 .*refused\).* node2 .*--exclude node2"),
]


def test_what_cannot_run_is_refused_before_anything_starts(hosts, overrides, tmp_path):
    listen = "import socket, time; s = socket.create_server(('', 29777)); time.sleep(1000)"
    hosts.start("node1", sys.executable, "-c", listen)
    wait_until(lambda: bool(hosts.processes("node1")), 5)
    before = {name: hosts.processes(name) for name in hosts.names}
    hostfile = tmp_path / "hosts.txt"
    for text, given, message in REFUSED:
        hostfile.write_text(text)
        command = ["launch/multinode.sh", hostfile, EMBEDDED, *overrides, "name=no", *given]
        done = hosts.run("node1", *command, cwd=REPOSITORY, timeout=60, **ENVIRONMENT)
        assert done.returncode == ExitCode.USER_ERROR, (given, done)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, done.stderr
        assert re.search(message, lines[0]), (message, lines)
        assert {name: hosts.processes(name) for name in hosts.names} == before, given
    assert not (tmp_path / "no").exists()
