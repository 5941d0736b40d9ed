"""Every layout of benchmarks/layouts/check_layouts.py trains as the single process does."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.layouts.check_layouts import compare, run
from benchmarks.traffic import CONTROL_BYTES
from linclip_kernels.linear_attention.reference import relative_rms

#: Every axis is in one of them; the rest of the table is slow.
LINEAR = ["single", "dp2-zero2-micro2", "tp2-pp2-micro2", "cp2-dp2-zero3"]
SOFTMAX = ["single", "tp2-pp2-dp2-zero1-micro2"]
#: Towers as SigLIP's, and other settings that those of CLIP do not have.
BIDIRECTIONAL = [
    *("model.vision.class_token=false", "model.vision.no_ln_pre=true"),
    *("model.vision.patch_dropout=0.25", "model.vision.ls_init_value=0.5"),
    *("model.text.no_causal_mask=true", "model.text.pool_type=last", "model.text.proj_bias=true"),
    "train.activation_checkpointing=selective",
]
POOLED = [*BIDIRECTIONAL, "model.vision.pool_type=map", "model.vision.proj_type=none"]
AVERAGED = [
    *(*BIDIRECTIONAL, "model.vision.pool_type=avg", "model.vision.activation=quick_gelu"),
    "model.vision.norm_eps=1e-3",
]


def table(folder: Path, embedded_overrides: list[str], *options: str) -> list[dict[str, str]]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.layouts.check_layouts",
        *embedded_overrides,
        "--out",
        folder,
        *options,
    ]
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    with (folder / "layouts.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("attention", "layouts"),
    [("eq7", LINEAR), pytest.param("softmax", SOFTMAX, marks=pytest.mark.slow)],
)
def test_every_layout_trains_as_one_process(tmp_path, embedded_overrides, attention, layouts):
    options = ["--attention", attention, "--steps", "5", "--layouts", *layouts]
    rows = table(tmp_path, embedded_overrides, *options)
    assert [row["layout"] for row in rows] == layouts
    for row in rows:
        assert float(row["loss_difference"]) <= 1e-5, row
        assert float(row["weight_difference"]) <= 1e-5, row
        assert int(row["bytes_off_plan"]) < 64, row
        split = {axis for axis in ("tp", "cp", "pp") if f"{axis}2" in row["layout"]}
        assert {axis for axis in ("tp", "cp", "pp") if int(row[f"{axis}_bytes"])} == split
    assert f"| {attention} | single | 1 |" in (tmp_path / "summary.md").read_text()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("tp2-pp2-micro2", POOLED),
        pytest.param("cp2-dp2-zero3", AVERAGED, marks=pytest.mark.slow),
    ],
)
def test_other_towers_train_as_one_process(embedded_overrides, layout, changes):
    (one,) = run("single", "eq7", 3, [*embedded_overrides, *changes])
    ranks = run(layout, "eq7", 3, [*embedded_overrides, *changes])
    row = compare(ranks, one)
    assert row["loss_difference"] <= 1e-5, row
    assert row["bytes_off_plan"] < CONTROL_BYTES, row
    pairs = [(ranks[0].weights[name], weight) for name, weight in one.weights.items()]
    assert all(relative_rms(found, weight) <= 1e-5 for found, weight in pairs if weight.ndim >= 2)
    # Together: biases are still almost zero, where the gradients of many pairs cancel.
    vectors = [[each.flatten() for each in pair] for pair in pairs if pair[0].ndim < 2]
    found, expected = map(torch.cat, zip(*vectors, strict=True))
    assert relative_rms(found, expected) <= 1e-5


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        ("tp2-pp2-micro2", ["train.precision=amp_bf16"]),
        ("dp2-zero1", ["train.precision=bf16"]),
        ("dp2-zero3-micro2", ["train.precision=bf16", "train.reduce_dtype=bf16"]),
    ],
)
def test_traffic_is_as_planned_in_every_precision(embedded_overrides, layout, precision):
    for rank in run(layout, "eq7", 2, [*embedded_overrides, *precision]):
        axes = rank.traffic.keys() | rank.planned.keys()
        apart = {axis: rank.traffic.get(axis, 0) - rank.planned.get(axis, 0) for axis in axes}
        assert all(abs(size) < CONTROL_BYTES for size in apart.values()), apart


@pytest.mark.slow
@pytest.mark.distributed
def test_means_for_predicted_weights_are_sent_in_the_dtype_of_products(embedded_overrides):
    overrides = [*embedded_overrides, "train.precision=amp_bf16"]
    for rank in run("tp2-pp2-micro2", "inline-local", 2, overrides):
        assert abs(rank.traffic["tp"] - rank.planned["tp"]) < CONTROL_BYTES


@pytest.mark.slow
@pytest.mark.distributed
def test_whole_table(tmp_path, embedded_overrides):
    assert len(table(tmp_path, embedded_overrides)) > 30
