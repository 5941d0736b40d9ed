"""The audit as a command: its files, and errors in one line."""

import csv
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from ds_linclip.config import ModelConfig, TextTower, VisionTower
from ds_linclip.data.prepare.digits import CLASSNAMES, TEMPLATES, digit_samples
from ds_linclip.data.prepare.shard_writer import write_labelled_folder
from ds_linclip.interop.state_dict import export_folder
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from linclip_launch.cli import main


def export_model(folder: Path, *, spread: float) -> Path:
    """Write a hub folder with random weights; with a spread of 0.5, features differ clearly."""
    config = ModelConfig(
        embed_dim=24,
        vision=VisionTower(image_size=(16, 16), patch_size=4, width=32, layers=1, head_width=16),
        text=TextTower(context_length=16, width=32, layers=1, heads=2),
    )
    torch.manual_seed(2)
    mesh = Mesh.create()
    model = CLIP(config, mesh)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(spread * torch.randn_like(parameter))
    export_folder(model, folder)
    mesh.close()
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(tmp_path_factory.mktemp("model"), spread=0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "digits"
    samples = islice(digit_samples("train", image_size=16, seed=0), 420)
    write_labelled_folder(folder, samples, classnames=CLASSNAMES, templates=TEMPLATES)
    return folder


def words(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    common = ["--out", str(out), "--num-workers", "0", "--bins", "2", "--repeats", "20"]
    return ["eval", "audit", str(model), "--data", str(data), *common, *more]


@pytest.mark.parametrize(
    ("question", "sources", "num_samples"),
    [
        (("match",), ["image", "caption"], 840),
        (("parts", "--groups", "2", "--centre-share", "0.4"), ["centre", "surroundings"], 420),
    ],
    ids=["match", "parts"],
)
def test_command_writes_numbers_summary_tables_and_figure(
    model_folder, data, tmp_path, question, sources, num_samples
):
    out = tmp_path / "out"
    assert main(words(model_folder, data, out, "--question", *question)) == 0
    numbers = json.loads((out / "results.json").read_text())
    assert numbers["sources"] == sources
    assert numbers["num_samples"] == num_samples
    assert sum(outcome["count"] for outcome in numbers["outcomes"]) == num_samples
    assert 0 < numbers["entropy"] <= 1
    parts = {row["part"]: row for row in numbers["parts"]}
    assert sum(parts[name]["bits"] for name in list(parts)[:4]) == pytest.approx(
        parts["total"]["bits"], abs=1e-9
    )
    for row in parts.values():
        assert 0 <= row["low"] <= row["high"]
        assert 0 < row["p_value"] <= 1
    with (out / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == num_samples
    assert set(rows[0]) == {"key", *sources, "decision", "right"}
    assert sum(int(row["right"]) for row in rows) / num_samples == pytest.approx(numbers["right"])
    summary = (out / "summary.md").read_text()
    assert f"| unique: {sources[0]} |" in summary
    assert f"{num_samples} decisions" in summary
    with Image.open(out / "parts.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--bins", "8"), "--bins (8) must leave 50 samples for each of 8 x 8 x 2 cells, 6400 of "),
        (("--bins", "21"), "--bins (21) must be in [2, 20]"),
        (("--question", "parts"), "take --bins 2 --groups 2, or more samples"),
        (("--question", "parts", "--groups", "11"), "--groups (11) must be at most 10, the cl"),
        (("--groups", "2"), "--groups (2) must be left out with --question match"),
    ],
)
def test_bad_input_is_one_line(model_folder, data, tmp_path, capsys, more, message):
    assert main(words(model_folder, data, tmp_path / "out", *more)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_images_without_a_caption_are_an_error_or_left_out(model_folder, data, tmp_path, capsys):
    folder = tmp_path / "data"
    samples = list(islice(digit_samples("train", image_size=16, seed=0), 420))
    samples[5] = replace(samples[5], caption="")
    write_labelled_folder(folder, samples, classnames=CLASSNAMES, templates=TEMPLATES)
    out = tmp_path / "out"
    assert main(words(model_folder, folder, out)) == 2
    assert "must have a caption; 1 of 420 have none" in capsys.readouterr().err
    assert main(words(model_folder, folder, out, "--lenient")) == 0
    numbers = json.loads((out / "results.json").read_text())
    assert (numbers["num_images"], numbers["num_samples"]) == (419, 838)
    assert "images without a caption, which are left out: 1 (" in (out / "summary.md").read_text()


def test_a_model_that_decides_the_same_for_all_images_is_refused(data, tmp_path, capsys):
    model = export_model(tmp_path / "model", spread=0.2)
    more = ("--question", "parts", "--groups", "2")
    assert main(words(model, data, tmp_path / "out", *more)) == 2
    assert "the decisions (420) must be of two kinds or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--bins", "1"), "argument --bins: must be a whole number >= 2"),
        (("--question", "colour"), "argument --question: invalid choice: 'colour'"),
        (("--centre-share", "1"), "argument --centre-share: must be a number between 0 and 1"),
        (("--repeats", "5"), "argument --repeats: must be a whole number >= 20"),
    ],
)
def test_arguments_are_checked(tmp_path, capsys, more, message):
    with pytest.raises(SystemExit, match="2"):
        main(words(tmp_path, tmp_path, tmp_path / "out", *more))
    assert message in capsys.readouterr().err
