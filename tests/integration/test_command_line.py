"""The commands a user types, run for real: train, evaluate, resume, and errors in the input."""

import json
import re
import subprocess
import sys

import pytest
import torch
import webdataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import EMBEDDED, REPOSITORY
from helpers.dirty_shards import write_dirty_shards
from linclip_launch import train
from linclip_launch.cli import main

pytestmark = pytest.mark.distributed
TRAIN = "linclip_launch.train"
SHORT = ["train.steps=12", "optim.warmup_steps=2", "checkpoint.every_steps=6", "eval.every_steps=6"]


@pytest.fixture
def in_this_process(monkeypatch, capsys):
    """Return a function that runs one rank of training here: exit code, out, err."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
        return train.main(), *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def finished(deepspeed_cpu, embedded_overrides, tmp_path_factory):
    """Train for a few steps on two ranks; return the run folder and the finished launcher."""
    output = tmp_path_factory.mktemp("runs")
    done = deepspeed_cpu(
        TRAIN, EMBEDDED, *embedded_overrides, f"output_dir={output}", "name=short", *SHORT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output / "short", done


def test_training_shows_progress_and_ends_with_a_table(finished):
    run, done = finished
    assert re.search(r"train: 100%.*12/12.*loss=\d.*samples/s=\d", done.stderr)
    for row in (r"steps +12", r"loss +\d\.\d+", r"samples/s +\d+", r"zeroshot_top1 +0\.\d+"):
        assert re.search(row, done.stdout)
    assert f"run folder:  {run}" in done.stdout
    assert re.search(rf"tensorboard: \S+/tensorboard --logdir {run / 'tensorboard'}", done.stdout)


def test_tensorboard_holds_scalars_and_pictures(finished):
    run, _ = finished
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    expected = {
        *("train/loss", "train/lr", "train/logit_scale", "train/grad_norm"),
        *("perf/samples_per_second", "perf/tokens_per_second", "perf/data_seconds_per_step"),
        *("perf/peak_memory_gib", "data/skipped_samples", "data/bad_shards"),
        *("eval/zeroshot_top1", "eval/zeroshot_top5"),
    }
    assert expected <= set(tags["scalars"])
    assert "parallel_plan/text_summary" in tags["tensors"]
    assert [event.step for event in board.Scalars("eval/zeroshot_top1")] == [6, 12]
    picture = board.Images("eval/predictions")[-1]
    assert picture.width > 300
    assert len(picture.encoded_image_string) > 10_000


def test_plan_predicts_the_run(finished, embedded_overrides, tmp_path):
    """The number of samples and the size of a checkpoint are those of the real run."""
    run, _ = finished
    options = [f"output_dir={tmp_path}", "--devices", "2", "--device", "cpu"]
    command = [sys.executable, "-m", "linclip_launch", "plan", "embedded", *embedded_overrides]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    plan = done.stdout
    assert plan.count("plan for 2 x cpu") == 1
    assert "- epoch: 1,437 samples, 11.2 steps" in plan
    assert re.search(r"^0-1 \| image embedding to text head \| 3\.", plan, re.M)
    assert not list(tmp_path.iterdir())
    files = (run / "checkpoints" / "step-00000012").glob("*.safetensors")
    on_disk = sum(file.stat().st_size for file in files) / 2**30
    planned = float(re.search(r"- checkpoint: ([\d.]+) GiB", plan)[1])
    assert planned == pytest.approx(on_disk, rel=0.01, abs=0.005)


def test_data_report_counts_what_was_read(finished):
    run, _ = finished
    report = json.loads((run / "data_report.json").read_text())
    samples = {"step": 12, "samples": 12 * 128, "skipped_samples": 0}
    captions = {"captions_passed_over": {}, "first_captions_passed_over": {}}
    assert report == {**samples, "skipped": {}, "first_skipped": {}, **captions, "shards": []}


def test_eval_script_repeats_the_score_of_training(finished):
    run, _ = finished
    command = [sys.executable, "-m", "linclip_launch.eval", "zero-shot", run]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    folder = run / "eval" / "step-00000012"
    assert done.stdout.strip() == (folder / "summary.md").read_text().strip()
    report = json.loads((folder / "results.json").read_text())
    trained = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in trained if "eval/zeroshot_top1" in record][-1]
    assert report["num_samples"] >= 350
    assert report["top1"] == last["eval/zeroshot_top1"]
    assert report["top5"] == last["eval/zeroshot_top5"]
    assert len((folder / "per_class.csv").read_text().splitlines()) == 11


def test_finished_run_is_evaluated_again_but_not_trained(
    finished, in_this_process, embedded_overrides
):
    """One rank evaluates what two ranks have trained."""
    run, first = finished
    before = sorted((run / "checkpoints").rglob("*"))
    code, out, err = in_this_process(
        EMBEDDED, *embedded_overrides, f"output_dir={run.parent}", "name=short", *SHORT
    )
    assert code == 0, err
    score = re.search(r"zeroshot_top1 +\S+", first.stdout)[0]
    assert score in out
    assert "loss" not in out
    assert sorted((run / "checkpoints").rglob("*")) == before


def test_damaged_checkpoints_are_refused(finished, in_this_process, embedded_overrides):
    run, _ = finished
    for shard in (run / "checkpoints").glob("step-*/rank-00001.safetensors"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    before = times_of_files(run)
    code, _, err = in_this_process(
        EMBEDDED, *embedded_overrides, f"output_dir={run.parent}", "name=short", *SHORT
    )
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(r"no valid checkpoint .*rank-00001\.safetensors\) does not match", errors[0])
    assert "Traceback" not in err
    assert times_of_files(run) == before


def times_of_files(run):
    """Return the content of all files but the lock, which names the last process that held it."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name != "lock")
    return {path: path.stat().st_mtime_ns for path in files}


def write_unusable_shard(folder):
    with webdataset.TarWriter(str(folder / "00000.tar")) as tar:
        for index in range(64):
            tar.write({"__key__": f"{index:09d}", "jpg": b"no picture", "txt": b"a caption"})


@pytest.fixture(scope="module")
def failed(start_deepspeed_cpu, digits, embedded_overrides, tmp_path_factory):
    """Start runs that must fail, all together; return the output and the folder of each."""
    folders = {
        name: tmp_path_factory.mktemp(name) for name in ("unusable", "dirty", "no_gpu", "wild")
    }
    write_unusable_shard(folders["unusable"])
    write_dirty_shards(digits, folders["dirty"])
    overrides = {
        "unusable": [f"data.train=[{folders['unusable']}/00000.tar]", "eval.data=null"],
        "dirty": [f"data.train=['{folders['dirty']}/{{00000..00007}}.tar']", "eval.data=null"],
        "no_gpu": ["parallel.device=cuda"],
        "wild": [
            *("optim.lr=1e30", "optim.warmup_steps=1", "health.max_skipped_steps=3"),
            *("checkpoint.every_steps=1", "log.every_steps=1", "eval.data=null"),
        ],
    }
    running = {}
    for name, folder in folders.items():
        where = [f"output_dir={folder}", f"name={name}"]
        running[name] = start_deepspeed_cpu(
            TRAIN,
            EMBEDDED,
            *(*embedded_overrides, *where, *overrides[name]),
            ranks=1 if name == "wild" else 2,  # two are in test_not_finite
        )
    printed = {name: process.communicate(timeout=240) for name, process in running.items()}
    return {name: (running[name].returncode, *printed[name], folders[name]) for name in running}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_error_found_by_ranks_stops_all_with_one_message(failed):
    code, out, err, folder = failed["no_gpu"]
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(r"parallel\.device \(cuda\) .* each of the 2 ranks .* found 0", errors[0])
    assert "Traceback" not in err + out
    assert not list(folder.iterdir())


def test_shards_without_a_usable_sample_end_the_run(failed):
    code, _, err, _ = failed["unusable"]
    assert code == 2
    assert re.search(r"^error: data\.train .*00000\.tar\) must hold usable", err, re.M)
    assert "image_undecodable" in err


def test_too_many_bad_samples_end_the_run(failed):
    code, _, err, folder = failed["dirty"]
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(
        r"data\.max_bad_samples \(0\.1\) is exceeded: (\d+) of 1280 samples are bad: "
        r"text_empty: \d+ \(.*, \.\.\.\); shard_unreadable: \d+ \(",
        errors[0],
    )
    assert "Traceback" not in err
    report = json.loads((folder / "dirty" / "data_report.json").read_text())
    assert report["samples"] == 1280
    assert report["skipped_samples"] == sum(report["skipped"].values()) > 128
    lost = [shard for shard in report["shards"] if shard["cause"] == "shard_unreadable"]
    assert [shard["url"] for shard in lost] == [f"{folder}/00003.tar"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"error: .*unknown key \(optim\.lrr\); did you mean optim\.lr"),
        ("parallel.dp=4", r"error: parallel\.dp \(4\) .*must equal the number of ranks \(1\)"),
        ("data.train=['{folder}/no-{00..03}.tar']", r"error: data\.train \(/.*/no-.* no file"),
    ],
)
def test_error_in_the_config_exits_with_two_and_one_line(
    in_this_process, embedded_overrides, override, message, tmp_path
):
    override = override.replace("{folder}", str(tmp_path))
    code, _, err = in_this_process(
        EMBEDDED, *embedded_overrides, f"output_dir={tmp_path}", override
    )
    assert code == 2
    assert re.search(message, err)
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["config.yaml", "checkpoints"])
def test_eval_of_an_incomplete_run_folder_names_what_is_missing(capsys, tmp_path, missing):
    if missing == "checkpoints":
        (tmp_path / "config.yaml").write_text((EMBEDDED).read_text())
    assert main(["eval", "zero-shot", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert re.search(rf"^error: .*{tmp_path}", err, re.MULTILINE)
    assert "Traceback" not in err


def test_training_that_diverges_exits_with_its_own_code(failed):
    code, _, err, folder = failed["wild"]
    assert code == 3
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(r"steps 2 to 4 were all skipped.*last loss before was \d", errors[0])
    assert errors[0].endswith("wild/checkpoints/step-00000001")
    assert "Traceback" not in err
    assert (folder / "wild" / "checkpoints" / "latest").read_text() == "step-00000001"
