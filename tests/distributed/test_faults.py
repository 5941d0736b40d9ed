"""Killed saves, full disks, signals, damaged files: no valid checkpoint is lost.

Two forked ranks each, with real files and signals. test_supervise.py and test_watchdog.py have the
faults of whole jobs.
"""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from ds_linclip.config import Config, load_config, save_config
from ds_linclip.model import CLIP
from ds_linclip.monitoring.metrics import MetricWriter
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from ds_linclip.process.consensus import AgreedError
from ds_linclip.process.exit_codes import ExitCode
from ds_linclip.resilience.preemption import Preempted
from ds_linclip.trainer import train
from helpers import EMBEDDED
from helpers.evaluators import Scores
from helpers.saves_that_die import calls_of_second_save, die_in_second_save

pytestmark = [pytest.mark.distributed, pytest.mark.faults]
STEPS = 7


def config_of(folder: Path, overrides: list[str]) -> Config:
    return load_config(
        EMBEDDED,
        [
            *(f"output_dir={folder.parent}", f"name={folder.name}", f"train.steps={STEPS}"),
            *("checkpoint.every_steps=2", "checkpoint.keep_last=2", "train.global_batch_size=8"),
            *("model.vision.layers=1", "model.text.layers=1", "data.num_workers=0"),
            *("optim.warmup_steps=1", "log.every_steps=1", "log.tensorboard=false"),
            *(*overrides, "eval.every_steps=1"),
        ],
    )


def in_ranks(config: Config, sabotage: Callable[[Config, Mesh, int], None] | None = None) -> None:
    """Train on two ranks; ``sabotage`` is called after every step, saves included."""
    run_ranks(2, _train, config, sabotage)


def _train(config: Config, sabotage: Callable[[Config, Mesh, int], None] | None) -> None:
    mesh = Mesh.create(config.parallel)

    def after_step(model: CLIP, writer: MetricWriter, step: int) -> Mapping[str, float]:
        if sabotage is not None:
            sabotage(config, mesh, step)
        return {}

    try:
        train(config, mesh, Scores(after_step))
    except (AgreedError, Preempted) as error:
        (config.run_dir / f"end-{mesh.rank}.txt").write_text(f"{type(error).__name__}: {error}")
    mesh.close()


@pytest.fixture(scope="module")
def whole(embedded_overrides, tmp_path_factory) -> Config:
    """An uninterrupted run with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    config = config_of(folder, [*embedded_overrides, "checkpoint.keep_last=9"])
    in_ranks(config)
    return config


@pytest.fixture
def config(embedded_overrides, tmp_path) -> Config:
    return config_of(tmp_path / "run", embedded_overrides)


def steps_of(config: Config) -> list[int]:
    return sorted(int(p.name[5:]) for p in folder_of(config).glob("step-????????"))


def folder_of(config: Config) -> Path:
    return config.run_dir / "checkpoints"


def ends(config: Config) -> list[str]:
    return [(config.run_dir / f"end-{rank}.txt").read_text() for rank in (0, 1)]


def losses(config: Config) -> dict[int, float]:
    records = map(json.loads, (config.run_dir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def assert_all_valid(config: Config, whole: Config) -> None:
    """Check that every checkpoint equals that of the uninterrupted run bit for bit."""
    assert steps_of(config)
    for step in steps_of(config):
        for name in (f"step-{step:08d}/rank-{rank:05d}.safetensors" for rank in (0, 1)):
            found, expected = (
                load_file(folder_of(config) / name),
                load_file(folder_of(whole) / name),
            )
            assert found.keys() == expected.keys()
            assert all(found[key].equal(expected[key]) for key in found)


def assert_resumes(config: Config, whole: Config) -> None:
    """Check that the next start resumes from the newest checkpoint and repeats the whole run."""
    in_ranks(config)
    assert losses(config) == losses(whole)
    assert steps_of(config)[-1] == STEPS
    assert_all_valid(config, whole)
    assert not list(folder_of(config).glob("*.tmp"))


@pytest.mark.parametrize("share", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_kill_at_any_moment_of_a_save(whole, embedded_overrides, tmp_path, share):
    """Ranks are killed just before calls of every kind that a save makes."""
    overrides = [*embedded_overrides, "checkpoint.keep_last=1"]
    calls = calls_of_second_save(config_of(tmp_path / "count", overrides))
    moments = [(0, call) for call in moments_of(calls[0])]
    moments += [(1, call) for call in moments_of(calls[1])[::3]]
    assert len(moments) >= 20
    outcomes = set()
    for rank, call in moments[:: len(moments) // share if share else 1]:
        config = config_of(tmp_path / f"killed-{rank}-{call}", overrides)
        die_in_second_save(config, rank, call)
        assert steps_of(config) in ([2], [2, 4], [4]), (rank, call, calls[rank][call])
        assert_all_valid(config, whole)
        outcomes.add(max(steps_of(config)))
        assert_resumes(config, whole)
    assert outcomes == {2, 4}, "kills before and after the commit"


def moments_of(calls: list[str]) -> list[int]:
    """Return the first and the last of consecutive calls of the same function."""
    edges = {0, len(calls) - 1}
    for index in range(1, len(calls)):
        if calls[index] != calls[index - 1]:
            edges |= {index - 1, index}
    return sorted(edges)


def fill_the_disk(config: Config, mesh: Mesh, step: int) -> None:
    """Leave no disk space for the file that rank 1 writes at step 4."""
    if step == 3 and mesh.rank == 1:
        staging = folder_of(config) / "step-00000004.tmp"
        staging.mkdir()
        (staging / "rank-00001.safetensors").symlink_to("/dev/full")
    mesh.barrier()


@pytest.mark.parametrize("is_asynchronous", [False, True])
def test_no_space_for_one_rank_commits_on_none(whole, config, is_asynchronous):
    config.checkpoint.asynchronous = is_asynchronous
    in_ranks(config, fill_the_disk)
    for end in ends(config):
        assert end.startswith("NotSaved: checkpoint ")
        assert "step-00000004 was not saved: [Errno 28] No space left on device" in end
        assert "(on rank 1 of 2)" in end
    assert steps_of(config) == [2]
    assert not list(folder_of(config).glob("*.tmp"))
    assert max(losses(config)) in ((4,) if not is_asynchronous else (4, 5, 6)), "seen at once"
    assert_resumes(config, whole)


def fail_alone(config: Config, mesh: Mesh, step: int) -> None:
    if mesh.rank == 1:
        raise OSError("only rank 1 cannot read this")
    mesh.barrier()


@pytest.mark.parametrize("stage", [1, 3])
def test_evaluation_that_fails_on_one_rank_ends_that_rank(config, stage):
    """Averages replace the weights during evaluation; swapping them back is a collective."""
    config.optim.ema_decay, config.zero.stage = 0.5, stage
    with pytest.raises(RuntimeError, match="a rank of 2 failed"):
        in_ranks(config, fail_alone)


def refuse_removal(config: Config, mesh: Mesh, step: int) -> None:
    """Occupy the name that the oldest checkpoint gets before it is removed."""
    if step == 3 and mesh.rank == 0:
        while not (folder_of(config) / "step-00000002").exists():  # it is saved beside training
            time.sleep(0.01)
        (folder_of(config) / "step-00000002.tmp").mkdir()
        (folder_of(config) / "step-00000002.tmp" / "file").touch()
    mesh.barrier()


def test_checkpoint_that_cannot_be_removed_stays_and_training_continues(whole, config):
    in_ranks(config, refuse_removal)
    assert losses(config) == losses(whole)
    assert steps_of(config) == [2, 6, 7]
    assert_all_valid(config, whole)


def terminate_one(config: Config, mesh: Mesh, step: int) -> None:
    """Send SIGTERM while step 4 is being saved."""
    if step == 4 and mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_to_one_rank_saves_the_same_step_on_all(whole, config):
    config.checkpoint.keep_last = 9
    in_ranks(config, terminate_one)
    (first, second) = ends(config)
    assert first == second
    last = steps_of(config)[-1]
    assert last in (5, 6)
    assert first == f"Preempted: asked to leave: {folder_of(config)}/step-{last:08d} is saved"
    assert steps_of(config)[:2] == [2, 4]
    assert max(losses(config)) == last
    shutil.rmtree(folder_of(config) / f"step-{last:08d}.rejected", ignore_errors=True)
    expected = losses(whole)
    assert losses(config) == {step: expected[step] for step in range(1, last + 1)}
    in_ranks(config)
    assert losses(config) == expected


def test_sigterm_to_every_process_of_a_job(embedded_overrides, start_deepspeed_cpu, tmp_path):
    """A scheduler signals ranks and their data workers, under the launcher."""
    slow = [*embedded_overrides, "data.num_workers=2", "train.steps=400", "model.vision.layers=4"]
    config = config_of(tmp_path / "run", [*slow, "checkpoint.every_steps=0"])
    save_config(config, tmp_path / "config.yaml")
    launcher = start_deepspeed_cpu("linclip_launch.train", tmp_path / "config.yaml")
    metrics = config.run_dir / "metrics.jsonl"
    while not metrics.exists() or '"step": 3,' not in metrics.read_text():
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.05)
    processes = psutil.Process(launcher.pid).children(recursive=True)
    ranks = [p for p in processes if "deepspeed.launcher.launch" not in p.cmdline()]
    assert len(ranks) >= 6, "two ranks with two workers each"
    for process in ranks:
        process.terminate()
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == ExitCode.PREEMPTED, out + err
    (last,) = steps_of(config)
    assert re.search(
        rf"^asked to leave: .*step-{last:08d} is saved; start again to resume$", err, re.M
    )
    assert max(losses(config)) == last < 400
    assert not psutil.wait_procs(ranks, timeout=10)[1]


def request_a_save(config: Config, mesh: Mesh, step: int) -> None:
    if step == 2 and mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)


def test_sigusr1_saves_and_training_continues(whole, config):
    config.checkpoint.every_steps = 0
    config.checkpoint.keep_last = 9
    in_ranks(config, request_a_save)
    first, last = steps_of(config)
    assert first in (3, 4)
    assert last == STEPS
    assert losses(config) == losses(whole)


def test_clock_saves_too_and_some_checkpoints_are_permanent(whole, config):
    config.checkpoint.every_steps = 0
    config.checkpoint.every_minutes = 1e-6
    config.checkpoint.keep_last = 1
    config.checkpoint.keep_every_steps = 3
    in_ranks(config)
    assert steps_of(config) == [3, 6, STEPS]
    assert losses(config) == losses(whole)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_to_one_ranks_file_is_detected_by_all(whole, config, harm):
    shutil.copytree(whole.run_dir, config.run_dir)
    damaged = folder_of(config) / f"step-{STEPS:08d}" / "rank-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content if harm == "flip" else content[: len(content) // 2])
    if harm == "remove":
        damaged.unlink()
    (folder_of(config) / "latest").write_text({"flip": "", "cut": "step-7"}.get(harm, "step-1"))
    assert_resumes(config, whole)
    assert (folder_of(config) / f"step-{STEPS:08d}.rejected").is_dir()
    assert (folder_of(config) / "latest").read_text() == f"step-{STEPS:08d}"
