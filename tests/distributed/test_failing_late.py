"""What fails before the first step is told at once; what fails later costs no step.

Two forked ranks each, with real files.
"""

import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ds_linclip.config import Config, load_config
from ds_linclip.parallel.spawn import run_ranks
from helpers import EMBEDDED, late_failures
from helpers.late_failures import WHEN, train_with
from helpers.tar_files import write_tar

pytestmark = [pytest.mark.distributed, pytest.mark.faults]
STEPS = 5


@pytest.fixture
def make_config(embedded_overrides, digits, tmp_path) -> Callable[..., Config]:
    """Return a short run with held-out data of its own, which it is to score at step 3."""
    shutil.copytree(digits / "test", tmp_path / "held_out")

    def make(*overrides: str, name: str = "run") -> Config:
        return load_config(
            EMBEDDED,
            [
                *(embedded_overrides[0], f"output_dir={tmp_path}", f"name={name}"),
                *(f"eval.data={tmp_path}/held_out", f"eval.every_steps={WHEN}"),
                *(f"train.steps={STEPS}", "train.global_batch_size=8", "optim.warmup_steps=1"),
                *("model.vision.layers=1", "model.text.layers=1", "data.num_workers=0"),
                *("checkpoint.every_steps=0", "log.every_steps=1", "log.tensorboard=false"),
                *overrides,
            ],
        )

    return make


def ends(config: Config) -> list[dict[str, str]]:
    paths = (Path(config.output_dir) / f"end-{rank}.json" for rank in (0, 1))
    return [json.loads(path.read_text()) for path in paths]


def records(config: Config, tag: str) -> dict[int, float]:
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r[tag] for r in map(json.loads, lines) if tag in r}


def saved(config: Config) -> list[str]:
    return sorted(path.name for path in (config.run_dir / "checkpoints").glob("step-*"))


def check_saved_step(config: Config, failure: str, kind: str, message: str) -> None:
    """Train until something fails; all ranks must say the same and have saved the last step."""
    run_ranks(2, train_with, config, getattr(late_failures, failure))
    first, second = ends(config)
    assert (first["kind"], first["message"]) == (second["kind"], second["message"])
    assert first["kind"] == kind
    assert re.search(message, first["message"])
    assert f"; step {WHEN} is saved, and the same command resumes there" in first["message"]
    assert saved(config) == [f"step-{WHEN:08d}"]


@pytest.mark.parametrize(
    ("layout", "failure", "kind", "message"),
    [
        ("parallel.dp=2", "no_samples", "AgreedError", r"output error \(on rank 0 of 2\)"),
        (
            "zero.stage=3 train.precision=bf16",
            *("dead_worker", "AgreedCrash", r"RuntimeError: .*Killed.* \(on rank 1 of 2\)"),
        ),
        ("parallel.tp=2", "no_samples", "AgreedError", "Input/output error"),
        ("parallel.pp=2 train.micro_batch_size=4", "no_samples", "AgreedError", "Input/output"),
    ],
)
def test_rank_without_samples_saves_the_step_before_with_all_others(
    make_config, layout, failure, kind, message
):
    whole, config = (make_config(*layout.split(), name=name) for name in ("whole", "run"))
    whole.checkpoint.every_steps = WHEN
    run_ranks(2, train_with, whole, None)
    check_saved_step(config, failure, kind, message)
    for rank in (0, 1):
        file = Path("checkpoints", f"step-{WHEN:08d}", f"rank-{rank:05d}.safetensors")
        expected, found = (load_file(run.run_dir / file) for run in (whole, config))
        assert expected.keys() == found.keys()
        assert all(expected[name].equal(found[name]) for name in expected)
    run_ranks(2, train_with, config, None)
    assert ends(config)[0]["kind"] == "finished"
    for tag in ("train/loss", "train/skipped_steps", "eval/zeroshot_top1"):
        assert records(config, tag) == records(whole, tag)


@pytest.mark.parametrize(
    ("stage", "failure", "kind", "message"),
    [
        (1, "held_out_gone", "AgreedError", r"eval\.data .*sample .* must be readable: .*No such"),
        (3, "out_of_memory", "AgreedCrash", r"MemoryError: too many images \(on rank 1 of 2\)"),
        (1, "full_disk_of_metrics", "AgreedError", r"metrics\.jsonl cannot be written: .*No space"),
        (3, "full_disk_of_samples", "AgreedError", r"rank-00001\.jsonl cannot be .*\(on rank 1 of"),
    ],
)
def test_failing_evaluation_or_log_saves_the_step(
    make_config, digits, stage, failure, kind, message
):
    common = [f"zero.stage={stage}", "optim.ema_decay=0.5", "data.num_workers=1"]
    common.append(f"log.every_steps={WHEN}")
    config, whole = make_config(*common, "log.sample_keys=true"), make_config(*common, name="whole")
    run_ranks(2, train_with, whole, None)
    check_saved_step(config, failure, kind, message)
    shutil.copytree(digits / "test", config.eval.data, dirs_exist_ok=True)
    for log in config.run_dir.rglob("*.before"):
        log.replace(log.with_suffix(".jsonl"))
    run_ranks(2, train_with, config, None)
    assert ends(config)[0]["kind"] == "finished"
    # The evaluation that failed, or that the failure came before, is made up for.
    assert records(config, "eval/zeroshot_top1") == records(whole, "eval/zeroshot_top1")
    found = records(config, "train/loss")
    assert found.items() <= records(whole, "train/loss").items()
    assert max(found) == STEPS


def test_evaluation_that_a_signal_left_out_is_made_up_for(make_config):
    config = make_config()
    run_ranks(2, train_with, config, late_failures.preempted)
    assert [end["kind"] for end in ends(config)] == ["Preempted"] * 2
    assert saved(config) == [f"step-{WHEN:08d}"]
    assert records(config, "eval/zeroshot_top1") == {}
    run_ranks(2, train_with, config, None)
    assert sorted(records(config, "eval/zeroshot_top1")) == [WHEN, STEPS]


def test_cut_held_out_image_is_told_before_the_first_step_and_decoded_once(make_config):
    config = make_config()
    (tar,) = (Path(config.eval.data) / "test").glob("*.tar")
    whole = tar.read_bytes()
    with tarfile.open(tar) as members:
        content = [(each.name, members.extractfile(each).read()) for each in members]
    name, image = next(each for each in content[200:] if each[0].endswith(".jpg"))
    content[content.index((name, image))] = (name, image[: len(image) // 2])
    write_tar(tar, content)
    for decodes in (True, False):
        run_ranks(2, train_with, config, None)
        first, second = ends(config)
        assert first["message"] == second["message"]
        assert re.match(
            rf"eval\.data \(.*\): sample {name[:-4]} of {tar} must be readable: image_.*"
            r"max_bad_samples is 0, found image_\w+: 1 \(",
            first["message"],
        )
        assert (first["decoded"] > 0) == decodes
    assert saved(config) == []
    tar.write_bytes(whole)  # at another time: another version of the file
    run_ranks(2, train_with, config, None)
    assert [(end["kind"], end["decoded"] > 0) for end in ends(config)] == [("finished", True)] * 2


@pytest.mark.parametrize(
    ("name", "is_folder", "message"),
    [
        ("tensorboard", False, r"log\.tensorboard, .* cannot write: .*tensorboard"),
        ("checkpoints", False, r"checkpoints.* cannot be read: .*Not a directory"),
        ("metrics.jsonl", True, r"metrics\.jsonl cannot be written: .*Is a directory"),
        ("samples", False, r"samples/rank-00000\.jsonl cannot be written: "),
    ],
)
def test_place_that_cannot_be_written_is_told_before_the_first_step(
    make_config, name, is_folder, message
):
    config = make_config("log.tensorboard=true", "log.sample_keys=true")
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").touch()  # of an earlier start
    place = config.run_dir / name
    place.mkdir() if is_folder else place.touch()
    run_ranks(2, train_with, config, None)
    for end in ends(config):
        assert end["kind"] == "AgreedError"
        assert re.search(message, end["message"])
    assert saved(config) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.steps=1", "optim.warmup_steps=0", "optim.lr=1e38"],
            "weights after step 1 are not",
        ),
        (["train.steps=3", "optim.warmup_steps=0", "optim.lr=1e38"], "weights|loss"),
    ],
)
def test_run_that_is_not_finite_at_its_end_has_diverged(make_config, overrides, message):
    config = make_config(*overrides)
    for _ in range(2):  # the same at the next start: nothing was saved
        run_ranks(2, train_with, config, None)
        for end in ends(config):
            assert end["kind"] == "Diverged"
            assert re.search(message, end["message"])
        assert saved(config) == []
