"""``launch/slurm.sbatch`` under a real Slurm, on two hosts."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from ds_linclip.config import load_config
from ds_linclip.resilience.restart_policy import newest_step
from helpers import EMBEDDED, REPOSITORY
from helpers.forked_ranks import train_in_ranks
from helpers.killed_runs import batches, losses, stands_beyond, wait_until
from helpers.two_hosts import TwoHosts, two_hosts

pytestmark = [pytest.mark.distributed, pytest.mark.faults, pytest.mark.slow]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "srun")
STEPS = 60
#: No cgroups, more cores than there are; a node counts as down after 10 seconds of silence.
CONFIG = """\
ClusterName=two
SlurmctldHost=node1
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmdTimeout=10
SlurmdParameters=config_overrides
StateSaveLocation={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n.spool
NodeName=node[1-2] CPUs=4
PartitionName=all Nodes=ALL Default=YES
"""


class Slurm:
    """Munge and Slurm on two hosts; the controller is on the first."""

    def __init__(self, hosts: TwoHosts, folder: Path) -> None:
        self._hosts, self._folder = hosts, folder
        folder.mkdir()
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder))
        key = folder / "munge.key"
        key.write_bytes(bytes(range(256)))
        key.chmod(0o400)
        self._start("node1", "slurmctld")
        for host in hosts.names:
            self.start_node(host)

    def start_node(self, host: str) -> None:
        files = f"--key-file={self._folder}/munge.key --log-file={self._folder}/{host}.munge"
        files += " --pid-file=/run/munge/pid --seed-file=/run/munge/seed"
        done = self._hosts.run(host, "sh", "-c", f"mkdir /run/munge && munged --force {files}")
        assert done.returncode == 0, done.stderr
        (self._folder / f"{host}.spool").mkdir(exist_ok=True)
        self._start(host, "slurmd")

    def _start(self, host: str, daemon: str) -> None:
        log = self._folder / f"{host}.{daemon}"
        self._hosts.run(host, daemon, "-L", log, SLURM_CONF=f"{self._folder}/slurm.conf")

    def __call__(self, *command: object, **environment: str) -> str:
        environment["SLURM_CONF"] = f"{self._folder}/slurm.conf"
        done = self._hosts.run("node1", *command, cwd=REPOSITORY, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def restart_job(self) -> None:
        """Restart the requeued job now: Slurm itself does so after two minutes. Not within seconds
        of its end, when Slurm 22.05 confuses both starts, and kills or shrinks the new one."""
        wait_until(lambda: self("sinfo", "--noheader", "-o", "%D %t") == "2 idle\n")
        time.sleep(5)
        self("scontrol", "update", "JobId=1", "StartTime=now")

    def job(self) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "job", 1)))


def test_job_resumes_after_preemption_and_after_the_loss_of_a_node(embedded_overrides, tmp_path):
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (slurmctld, slurmd, slurm-client, munge)")
    overrides = [
        *(*embedded_overrides, "eval.data=null", f"train.steps={STEPS}", "optim.warmup_steps=4"),
        *("model.vision.image_size=16", "model.vision.layers=1", "model.text.layers=1"),
        *("train.global_batch_size=16", "checkpoint.every_steps=5", "log.every_steps=1"),
        *("log.sample_keys=true", "log.tensorboard=false", f"output_dir={tmp_path}"),
    ]
    config = load_config(EMBEDDED, [*overrides, "name=whole", "data.num_workers=0"])
    whole, _ = train_in_ranks(config, 2)
    run = tmp_path / "run"

    (tmp_path / "hosts").mkdir()
    with two_hosts(tmp_path / "hosts") as hosts:
        slurm = Slurm(hosts, tmp_path / "slurm")
        options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
        slurm(
            *("sbatch", *options, f"--output={tmp_path}/said", "launch/slurm.sbatch"),
            *(EMBEDDED, *overrides, "name=run"),
            DS_ACCELERATOR="cpu",
            GLOO_SOCKET_IFNAME="eth0",
        )
        said = tmp_path / "said"
        try:
            wait_until(lambda: stands_beyond(run, 5))
            slurm("scancel", "--signal=TERM", 1)
            wait_until(lambda: slurm.job()["JobState"] == "PENDING", 100)
            left_at = newest_step(run)
            assert f"step-{left_at:08d} is saved; start again to resume" in said.read_text()
            slurm.restart_job()

            wait_until(lambda: stands_beyond(run, left_at + 5))
            hosts.power_off("node2")
            wait_until(lambda: slurm.job()["JobState"] == "PENDING", 100)
            hosts.power_on("node2")
            slurm.start_node("node2")
            slurm.restart_job()
            wait_until(lambda: slurm.job()["JobState"] in ("COMPLETED", "FAILED"))
        except AssertionError as error:
            raise AssertionError(said.read_text()) from error
        assert slurm.job()["ExitCode"] == "0:0", said.read_text()
        ranks = [line for name in hosts.names for line in hosts.processes(name).values()]
        assert not [line for line in ranks if "linclip_launch.train" in line]

    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [start["hosts"] for start in starts] == [{"node1": 1, "node2": 1}] * 3
    assert starts[1]["resumed_from"] == f"step-{left_at:08d}"
    assert losses(run) == whole
    assert batches(run)[0] == batches(tmp_path / "whole")[0]
