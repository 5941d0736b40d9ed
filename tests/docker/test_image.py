"""The image: built from docker/Dockerfile by podman, and run, with a read-only root, the way that
compose.yaml and docs/docker.md say. ``make test-docker``; as root.

One thing stands in for another: a fresh Debian of the same release, from debootstrap, for the base
image that the Dockerfile names by digest. Not looked at: that base image itself, Docker's own
engine and its compose, GPUs, InfiniBand.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from helpers import REPOSITORY

COMPOSE = REPOSITORY / "docker" / "compose.yaml"
PROGRAMS = ("podman", "runc", "iptables", "debootstrap", "tar")
LIBRARIES = [Path("/usr/lib/podman") / name for name in ("netavark", "aardvark-dns")]
missing = [
    name for name in PROGRAMS if not shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
]
missing += [path.name for path in LIBRARIES if not path.exists()]
missing += ["the rights of root"] if os.geteuid() != 0 else []
missing += ["30 GB of disk"] if shutil.disk_usage(tempfile.gettempdir()).free < 30e9 else []

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(missing), reason=f"missing: {', '.join(missing)}"),
]

#: The embedded experiment with small steps, continued until it is stopped.
SMALL = [
    *("eval.data=null", "model.vision.layers=1", "model.text.layers=1", "optim.warmup_steps=2"),
    *("model.vision.image_size=16", "train.global_batch_size=16", "data.num_workers=0"),
    "train.steps=1000000",
]
EMBEDDED = "ds_configs/train/embedded.yaml"
HARDENED = ["--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges"]


class Engine:
    """Podman with images, containers and networks of its own in a folder, and nothing elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tmp").mkdir()
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\n'
            f'runroot = "{folder}/run"\ngraphroot = "{folder}/graph"\n'
        )
        # Limits: a container engine may not be allowed to raise them.
        (folder / "containers.conf").write_text(
            '[containers]\ndefault_ulimits = ["nofile=16384:16384", "nproc=16384:16384"]\n'
            f'[engine]\nruntime = "runc"\nevents_logger = "none"\ntmp_dir = "{folder}/run/libpod"\n'
            f'volume_path = "{folder}/volumes"\n'
            f'[network]\nnetwork_backend = "netavark"\nnetwork_config_dir = "{folder}/networks"\n'
        )
        self.environment = {
            **os.environ,
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "TMPDIR": str(folder / "tmp"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
        }

    def __call__(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command and wait for its end."""
        command = [str(argument) for argument in arguments]
        done = subprocess.run(
            command, env=self.environment, cwd=REPOSITORY, text=True, capture_output=True
        )
        if check and done.returncode:
            raise AssertionError(
                f"{shlex.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
            )
        return done

    def healthy(self, container: str) -> tuple[bool, str]:
        """Return whether the image's health check passes, and its output."""
        done = self("podman", "healthcheck", "run", container, check=False)
        log = self("podman", "inspect", "--format", "{{json .State.Health.Log}}", container).stdout
        said = [check["Output"] for check in json.loads(log) or []]
        return done.returncode == 0, "".join(said[-1:]) + done.stderr

    def wait_healthy(self, container: str, seconds: float = 120) -> str:
        until = time.monotonic() + seconds
        while True:
            healthy, line = self.healthy(container)
            if healthy:
                return line
            logs = self("podman", "logs", container, check=False)
            running = self("podman", "inspect", "--format", "{{.State.Running}}", container)
            told = f"{line}\n{logs.stdout[-4000:]}\n{logs.stderr[-4000:]}"
            assert running.stdout.strip() == "true", told
            assert time.monotonic() < until, told
            time.sleep(1)

    def wait(self, container: str) -> int:
        """Wait for the end of a container; return its exit code."""
        return int(self("podman", "wait", container).stdout)

    def volume(self, name: str) -> Path:
        """Return the folder of a volume's files."""
        return self.folder / "volumes" / name / "_data"

    def close(self) -> None:
        self("podman", "rm", "--all", "--force", "--time", "0", check=False)
        self("podman", "network", "prune", "--force", check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Podman, with the images ``linclip`` and ``linclip-sshd``."""
    started = Engine(Path(tempfile.mkdtemp(prefix="linclip-image-")))
    try:
        base = build_base(started)
        build = ["podman", "build", "--isolation", "chroot", "--network", "host", "--layers"]
        build += ["--format", "docker", "--build-arg", f"BASE_IMAGE={base}"]
        build += ["--file", "docker/Dockerfile"]
        started(*build, "--tag", "linclip", ".")
        started(*build, "--tag", "linclip-sshd", "--target", "sshd", ".")
        yield started
    finally:
        started.close()


def build_base(engine: Engine) -> str:
    """Make an image of the Dockerfile's Debian release, with this machine's certificates."""
    text = (REPOSITORY / "docker" / "Dockerfile").read_text()
    named = re.search(r"^ARG BASE_IMAGE=debian:(\w+)-slim@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert named, "the base image must be named by its digest"
    root = engine.folder / "base"
    engine("debootstrap", "--variant=minbase", named[1], root)
    authorities = root / "usr" / "local" / "share" / "ca-certificates"
    authorities.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        shutil.copy("/etc/ssl/certs/ca-certificates.crt", authorities / "host.crt")
    archive = engine.folder / "base.tar"
    engine("tar", "-C", root, "-cf", archive, ".")
    engine("podman", "import", "--quiet", archive, "localhost/base")
    shutil.rmtree(root)
    archive.unlink()
    return "localhost/base"


def starts(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]


def newest(run: Path) -> str:
    """Return the newest checkpoint."""
    return max(path.name for path in (run / "checkpoints").glob("step-*"))


def test_image_trains_with_a_read_only_root_and_saves_when_stopped(engine: Engine):
    run = ["podman", "run", "--detach", "--name", "train", *HARDENED, "--shm-size", "2g"]
    run += ["--tmpfs", "/tmp:exec,mode=1777", "--volume", "runs:/runs"]
    run += ["--volume", "caches:/home/linclip", "--env", "DS_ACCELERATOR=cpu", "linclip"]
    run += ["linclip", "train", "--supervise", "--ranks", "2", EMBEDDED, "name=one", *SMALL]
    checkpoints = []
    for start in ("first", "resumed"):
        engine(*run)
        if start == "first":
            healthy, line = engine.healthy("train")
            assert not healthy
            assert "has given a sign of life" in line
        assert "2 ranks of this host are well" in engine.wait_healthy("train")
        status = engine("podman", "exec", "train", "cat", "/proc/1/status").stdout
        assert re.search(r"^Name:\ttini$", status, re.MULTILINE)
        assert re.search(r"^Uid:\t1000\t1000\t1000\t1000$", status, re.MULTILINE)
        assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
        assert engine("podman", "exec", "train", "touch", "/opt/x", check=False).returncode == 1
        engine("podman", "stop", "--time", "100", "train")
        assert engine.wait("train") == 75, engine("podman", "logs", "train").stderr
        engine("podman", "rm", "train")
        checkpoints.append(newest(engine.volume("runs") / "one"))
    assert len(set(checkpoints)) == 2
    resumed = [start["resumed_from"] for start in starts(engine.volume("runs") / "one")]
    assert resumed == [None, checkpoints[0]]


def test_any_user_imports_everything_and_compiles(engine: Engine):
    """Triton builds its launchers the same way, from C with Python's headers."""
    code = """
import importlib, os, pkgutil, tempfile, torch
from triton.runtime.build import _build
for name in ("ds_linclip", "linclip_kernels", "linclip_eval"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            print(module.name)
x = torch.arange(8.0)
assert torch.equal(torch.compile(lambda x: 2 * x + 1)(x), 2 * x + 1)
folder = tempfile.mkdtemp()
source = os.path.join(folder, "source.c")
open(source, "w").write("#include <Python.h>\\nPyMODINIT_FUNC PyInit_x(void) { return 0; }")
print(_build("x", source, folder, [], [], [], []))
"""
    run = ["podman", "run", "--rm", *HARDENED, "--user", "4321:4321"]
    run += ["--tmpfs", "/tmp:exec,mode=1777", "--tmpfs", "/home/linclip:exec,mode=1777"]
    shown = engine(*run, "linclip", "python", "-c", code).stdout
    for path in (REPOSITORY / "ds_linclip").glob("*.py"):
        assert path.stem.startswith("__") or f"ds_linclip.{path.stem}\n" in shown
    assert shown.splitlines()[-1].endswith(".so")


def test_compose_trains_on_two_nodes_with_tensorboard(engine: Engine):
    compose = ["podman-compose", "--project-name", "linclip-test", "--file", COMPOSE]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    engine.environment["TENSORBOARD_PORT"] = str(port)
    engine.environment["IMAGE"] = "localhost/linclip"
    engine.environment["TRAIN"] = " ".join([EMBEDDED, "name=two", *SMALL, "log.every_steps=1"])
    engine(*compose, "up", "--detach", "--no-build")
    names = {service: f"linclip-test_{service}_1" for service in ("node0", "node1", "tensorboard")}
    try:
        for node in ("node0", "node1"):
            assert "1 ranks of this host are well" in engine.wait_healthy(names[node])
        engine.wait_healthy(names["tensorboard"])
        run = engine.volume("linclip-test_runs") / "two"
        assert starts(run)[0]["hosts"] == {"node0": 1, "node1": 1}
        with urlopen(f"http://127.0.0.1:{port}/data/plugin/scalars/tags", timeout=20) as page:
            assert "train/loss" in page.read().decode()
        engine("podman", "stop", "--time", 100, names["node1"])
        assert [engine.wait(names[node]) for node in ("node0", "node1")] == [75, 75]
        assert newest(run)
    finally:
        engine(*compose, "down", "--volumes", "--timeout", 0, check=False)


def test_nodes_with_sshd_train_for_a_node_that_logs_in(engine: Engine):
    keys = engine.folder / "keys"
    keys.mkdir()
    engine("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / "ssh_key")
    os.chown(keys / "ssh_key", 1000, 1000)
    engine("podman", "network", "create", "cluster")
    for node in ("node0", "node1"):
        run = ["podman", "run", "--detach", "--name", node, "--hostname", node, *HARDENED]
        run += ["--network", "cluster", "--shm-size", "2g", "--tmpfs", "/tmp:exec,mode=1777"]
        run += ["--tmpfs", "/home/linclip:exec,mode=1777", "--volume", "cluster:/runs"]
        run += ["--volume", f"{keys}/ssh_key:/run/secrets/ssh_key:ro"]
        run += ["--volume", f"{keys}/ssh_key.pub:/run/secrets/authorized_keys:ro"]
        run += ["--volume", f"{REPOSITORY}/docker/hostfile:/run/hostfile:ro"]
        engine(*run, "--env", "DS_ACCELERATOR=cpu", "linclip-sshd")
    for node in ("node0", "node1"):
        engine.wait_healthy(node)
    train = ["launch/multinode.sh", "/run/hostfile", EMBEDDED, "name=ssh", *SMALL, "train.steps=4"]
    engine("podman", "exec", "node0", *train)
    run = engine.volume("cluster") / "ssh"
    assert starts(run)[0]["hosts"] == {"node0": 1, "node1": 1}
    assert newest(run).endswith("4")
