"""Accuracy and cost over image sizes and domains, of two models side by side."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from ds_linclip.config import ATTENTION_KINDS, ModelConfig, TextTower, VisionTower
from ds_linclip.data.prepare.make_shards import make_scenes
from ds_linclip.interop.state_dict import export_folder
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from linclip_launch.cli import main


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for kind in ("softmax", "linear"):
        torch.manual_seed(0)
        config = ModelConfig(
            embed_dim=16,
            vision=VisionTower(
                image_size=(32, 32), patch_size=8, width=32, layers=1, head_width=16
            ),
            text=TextTower(context_length=16, width=32, heads=2, layers=1),
        )
        config.vision.attention = config.text.attention = ATTENTION_KINDS[kind]()
        folders[kind] = tmp_path_factory.mktemp(kind) / "hub"
        export_folder(CLIP(config, Mesh.create()), folders[kind])
    return folders


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("scenes") / "out"
    make_scenes(out, num_shards=1, samples_per_shard=1, image_size=40, num_test=13)
    return [out / "test", out / "test_unseen"]


@pytest.mark.long
def test_every_size_and_domain_is_scored(models, domains, tmp_path, capsys):
    out = tmp_path / "out"
    labels = [f"{name}={folder}" for name, folder in models.items()]
    arguments = ["eval", "resolution", *labels, "--data", f"seen={domains[0]}", str(domains[1])]
    arguments += ["--sizes", "48", "16", "--out", str(out), "--num-workers", "0"]
    assert main(arguments) == 0
    with (out / "resolution.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["size"], row["domain"]) for row in rows] == [
        (model, size, domain)
        for model in ("softmax", "linear")
        for size in ("16", "48")
        for domain in ("seen", "test_unseen")
    ]
    assert all(float(row["seconds_per_image"]) > 0 for row in rows)
    assert {row["num_samples"] for row in rows if row["domain"] == "seen"} == {"13"}
    summary = (out / "summary.md").read_text()
    assert "| model | px | ms per image | seen: top-1, % | test\\_unseen: top-1, % |" in summary
    assert summary.count("\n| softmax |") == 2
    assert (out / "figure.png").stat().st_size > 10_000
    # The score of one size is that of the zero-shot command at that size.
    alone = tmp_path / "alone"
    more = ["--data", str(domains[0]), "--out", str(alone), "--image-size", "48"]
    assert main(["eval", "zero-shot", str(models["linear"]), *more, "--num-workers", "0"]) == 0
    score = json.loads((alone / "results.json").read_text())
    (row,) = (r for r in rows if (r["model"], r["size"], r["domain"]) == ("linear", "48", "seen"))
    assert (float(row["top1"]), float(row["top5"])) == (score["top1"], score["top5"])


def test_invalid_size_is_a_one_line_error(models, domains, tmp_path, capsys):
    arguments = ["eval", "resolution", str(models["linear"]), "--data", str(domains[0])]
    assert main([*arguments, "--sizes", "20", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "image_size (20) must be a positive multiple of patch_size (8)" in line


def test_domains_of_equal_keys_are_kept_apart(models, domains, tmp_path):
    """Cached results of one domain are not used for another with the same keys."""
    other = tmp_path / "other"
    shutil.copytree(domains[0], other)
    (tar,) = (other / "test").glob("*.tar")
    with tarfile.open(tar) as file:
        members = [(member, file.extractfile(member).read()) for member in file if member.isfile()]
    with tarfile.open(tar, "w") as file:
        for member, content in members:
            if member.name.endswith(".jpg"):
                with Image.open(io.BytesIO(content)) as image, io.BytesIO() as buffer:
                    ImageOps.invert(image.convert("RGB")).save(buffer, "JPEG")
                    content = buffer.getvalue()
                    member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    out = tmp_path / "out"
    sources = [f"plain={domains[0]}", f"inverted={other}"]
    arguments = ["eval", "resolution", str(models["softmax"]), "--data", *sources, "--sizes", "32"]
    assert main([*arguments, "--out", str(out), "--num-workers", "0"]) == 0
    assert len(list((out / "parts").iterdir())) == 2

    (other / "test" / "nshards.txt").write_text("2")
    assert main([*arguments, "--out", str(out), "--num-workers", "0"]) == 2
    assert main([*arguments, "--out", str(out), "--num-workers", "0", "--lenient"]) == 0
    findings = json.loads((out / "results.json").read_text())["findings"]
    assert any(line.startswith("shard_count: 1") for line in findings["inverted"])
    assert "- inverted: shard_count: 1 (" in (out / "summary.md").read_text()
