"""``linclip eval zero-shot`` on folders of synsets: its results, its errors and its cache."""

import csv
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from helpers.synset_folders import write_hub_folder, write_images
from linclip_launch.cli import main

DOG, BEAGLE, TENCH, HEN = "n02084071", "n02088364", "n01440764", "n01514859"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hub_folder(tmp_path_factory.mktemp("model") / "hub")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images of noise of each of four synsets, and their list."""
    synsets = [DOG, BEAGLE, TENCH, HEN]
    (tmp_path / "list.txt").write_text("\n".join(synsets))
    return write_images(tmp_path / "images", synsets, per_class=3)


def run(model: Path, images: Path, out: Path, *more: str) -> int:
    classes = images.parent / "list.txt"
    arguments = ["eval", "zero-shot", model, "--data", images, "--classes", classes, "--out", out]
    return main([*map(str, arguments), "--batch-size", "2", "--num-workers", "0", *more])


def test_results_are_written_and_cached(model, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(model, images, out, "--templates", "simple") == 0
    report = json.loads((out / "results.json").read_text())
    assert (report["num_samples"], report["num_classes"], report["num_templates"]) == (12, 4, 7)
    assert 0 <= report["top1"] <= report["hierarchical_top1"] <= report["top5"] == 1.0
    # "dog" is right for a dog and a beagle.
    assert report["hierarchical_baseline_top1"] == 0.5
    assert report["hierarchical_baseline_class"] == DOG
    low, high = report["top1_interval"]
    assert low < report["top1"] < high or report["top1"] == 0 == low
    assert report["findings"] == []
    assert report["command"].startswith("linclip eval zero-shot ")
    summary = (out / "summary.md").read_text()
    assert capsys.readouterr().out.strip() == summary.strip()
    assert "| the same, if the answer were always 'dog' | 50.00 |" in summary
    assert re.search(r"on 12 images of 4 of 4 classes of \S+list\.txt, 7 templates", summary)
    with (out / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["name"]) for row in rows][:2] == [(DOG, "dog"), (BEAGLE, "beagle")]
    with (out / "confusions.csv").open(newline="") as file:
        wrong = sum(int(row["num_images"]) for row in csv.DictReader(file))
    assert wrong == 12 - round(12 * report["top1"])

    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert len(kept) == 2
    assert run(model, images, out, "--templates", "simple") == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert run(model, images, out, "--templates", "simple", "--image-size", "24") == 0
    assert len(list(out.rglob("batches-*"))) == 2  # not reused at another size
    assert run(model, images, out, "--names", "definition") == 0
    assert len(list(out.rglob("batches-*"))) == 3


def test_problems_are_errors_or_counted(model, images, tmp_path, capsys):
    (images / HEN / f"{HEN}_1.JPEG").write_bytes(b"no image")
    assert run(model, images, tmp_path / "strict") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"error: .*{HEN}_1.* must be readable: image_undecodable", line)

    (images / "n00007846").mkdir()
    Image.new("RGB", (16, 16)).save(images / "n00007846" / "a.png")
    for path in (images / DOG).iterdir():
        path.unlink()
    assert run(model, images, tmp_path / "strict") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "n00007846" in line
    assert DOG in line
    assert not (tmp_path / "strict" / "results.json").exists()

    assert run(model, images, tmp_path / "lenient", "--lenient") == 0
    report = json.loads((tmp_path / "lenient" / "results.json").read_text())
    assert (report["num_samples"], report["num_unreadable"]) == (9, 1)
    assert report["num_classes_without_images"] == 1
    assert report["top5"] == 8 / 9  # four classes: all but the unreadable one
    findings = " ".join(report["findings"])
    assert "n00007846" in findings
    assert DOG in findings
    assert all(
        line in (tmp_path / "lenient" / "summary.md").read_text() for line in report["findings"]
    )


def test_some_images_may_be_unreadable(model, images, tmp_path, capsys):
    for name in ("0", "2"):
        (images / HEN / f"{HEN}_{name}.JPEG").write_bytes(b"no image")
    out = tmp_path / "out"
    assert run(model, images, out, "--max-bad-samples", "1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: .*max_bad_samples is 1, found image_undecodable: 2 \(image ", line)
    for _ in range(2):  # the second time from the kept parts
        assert run(model, images, out, "--max-bad-samples", "2") == 0
        report = json.loads((out / "results.json").read_text())
        assert report["num_unreadable"] == 2
        assert [entry["key"] for entry in report["unreadable"]] == [
            f"{HEN}/{HEN}_{name}.JPEG" for name in ("0", "2")
        ]
        summary = capsys.readouterr().out
        assert re.search(
            rf"unreadable images, .*: image_undecodable: 2 \(.*/{HEN}_0\.JPEG", summary
        )
    assert run(model, images, out, "--max-bad-samples", "1") == 2
    assert "max_bad_samples is 1" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_place_of_the_results_is_checked_first(model, images, tmp_path, capsys, place):
    (tmp_path / "file").write_text("")
    (images / HEN / f"{HEN}_0.JPEG").write_bytes(b"no image")
    assert run(model, images, tmp_path / place) == 2
    assert re.search(r"--out \(.*\) must be a folder .*/file is not", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--classes", "imagenet-22K"], r"classes \(imagenet-22K\) must be one of imagenet-22k"),
        (["--templates", "seven"], r"templates \(seven\) must be one, simple, openai"),
        (["--image-size", "17"], r"image_size \(17\) must be a positive multiple"),
        (["--names", "open_clip"], r"names \(open_clip\) exist for imagenet-1k"),
    ],
)
def test_bad_arguments_are_one_line_errors(model, images, tmp_path, capsys, more, message):
    assert run(model, images, tmp_path / "out", *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"^error: .*{message}", line)


def test_model_that_is_not_a_run_needs_data_and_out(model, images, tmp_path, capsys):
    assert main(["eval", "zero-shot", str(model), "--out", str(tmp_path)]) == 2
    assert "--data must name a folder of images" in capsys.readouterr().err
    assert main(["eval", "zero-shot", str(model), "--data", str(images)]) == 2
    assert "--out must name a folder" in capsys.readouterr().err
