"""The benchmark of the kinds of attention: what it counts, and the command on short inputs."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.attention import bench_zoo
from benchmarks.attention.zoo import ZOO, settings_of
from ds_linclip.config import VisionTower
from ds_linclip.model.flops import blocks_flops
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.runtime.measure import Limits


@pytest.fixture(scope="module")
def layers() -> bench_zoo.Layers:
    return bench_zoo.Layers(list(ZOO), Mesh.create(), torch.float32)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ZOO)
def test_flops_are_those_of_a_block_without_its_mlp(layers, name):
    tower = VisionTower(layers=1, attention=settings_of(name))
    mlp = 2 * tower.width**2 * 2 * tower.mlp_ratio
    (expected,) = blocks_flops(tower, 197)
    found = bench_zoo.flops_per_token(layers.layers[name], 197)
    assert found == pytest.approx(expected / 197 - mlp)


def test_softmax_alone_is_expected_to_grow_as_the_square(layers):
    assert [name for name, exponent in layers.growth.items() if exponent == 2] == ["softmax"]


@pytest.mark.long
@pytest.mark.usefixtures("threads")
def test_command_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    limits = Limits(max_seconds_per_point=0.001, max_seconds_per_call=1e4)
    monkeypatch.setattr(bench_zoo, "LIMITS", limits)
    options = ["--device", "cpu", "--tokens", "10", "5", "--kinds", "gated-delta"]
    monkeypatch.setattr("sys.argv", ["bench_zoo.py", str(tmp_path), *options])
    assert bench_zoo.main() == 0
    with (tmp_path / "zoo.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["attention"] for row in rows] == ["softmax", "gated-delta"]
    assert all(float(row["ms_5"]) > 0 and float(row["ms_10"]) > 0 for row in rows)
    assert "| gated-delta |" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "7"], r"tokens \(7\) must be a square of patches and the class token: 5 "),
        (["--kinds", "flash"], r"kinds \(flash\) must be of softmax, window, "),
    ],
)
def test_bad_arguments_give_one_line(monkeypatch, capsys, options, message):
    monkeypatch.setattr("sys.argv", ["bench_zoo.py", "--device", "cpu", *options])
    with pytest.raises(SystemExit):
        bench_zoo.main()
    assert re.search(message, capsys.readouterr().err)
