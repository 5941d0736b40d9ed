"""All 21,841 classes with 80 templates: bounded memory, resumable, and the same on three ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import REPOSITORY
from helpers.synset_folders import write_hub_folder, write_images
from linclip_eval.zero_shot.class_lists import imagenet_classes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
NUM_CLASSES = 21_841


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hub_folder(tmp_path_factory.mktemp("model") / "hub")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each class, with one image of noise."""
    synsets = imagenet_classes("imagenet-22k", "lemma").ids
    return write_images(tmp_path_factory.mktemp("imagenet-22k"), synsets, per_class=1)


def start(model: Path, images: Path, out: Path, ranks: int) -> subprocess.Popen[bytes]:
    launch = [Path(sys.executable).parent / "torchrun", f"--nproc-per-node={ranks}", "--standalone"]
    arguments = ["zero-shot", model, "--data", images, "--classes", "imagenet-22k"]
    more = ["--templates", "openai", "--out", out, "--num-workers", "0"]
    command = [*launch, "-m", "linclip_launch.eval", *arguments, *more]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def test_three_killed_ranks_resume_and_score_as_one(model, images, tmp_path):
    killed = start(model, images, tmp_path / "three", ranks=3)
    classes = tmp_path / "three" / "classifier"
    while len(list(classes.glob("*.safetensors"))) < 100:
        assert killed.poll() is None
        time.sleep(0.5)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    kept = {path: path.stat().st_mtime_ns for path in classes.glob("*.safetensors")}
    assert start(model, images, tmp_path / "three", ranks=3).wait() == 0
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert start(model, images, tmp_path / "one", ranks=1).wait() == 0
    for name in ("per_class.csv", "confusions.csv"):
        files = [(tmp_path / ranks / name).read_bytes() for ranks in ("one", "three")]
        assert files[0] == files[1]
    report = json.loads((tmp_path / "one" / "results.json").read_text())
    assert report["num_samples"] == report["num_classes"] == NUM_CLASSES
    assert report["num_templates"] == 80
    print(f"peak memory of a rank: {report['peak_memory_bytes'] / 2**20:.0f} MiB")
    # A matrix of all logits would be 1.9 GB, one of all prompts' features 0.2 GB.
    assert report["peak_memory_bytes"] < 1.5 * 2**30
