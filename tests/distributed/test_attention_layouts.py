"""Every kind of attention trains in every layout as in one process, and sends what is planned."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention.zoo import ZOO, settings_of
from benchmarks.traffic import CONTROL_BYTES
from helpers import job_environment
from linclip_kernels.linear_attention.reference import relative_rms

pytestmark = pytest.mark.distributed


def train(folder: Path, layout: str, names: list[str]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "helpers.attention_layouts_job", str(folder), layout, *names]
    environment = job_environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    found: list[dict[str, Any]] = torch.load(folder / f"{layout}.pt")
    return found


#: Kinds with parameters of their own that heads split and share, and some that need the grid.
QUICK = ["inline-local", "luna", "polaformer", "gated-delta", "frequency-tokens"]
REST = [name for name in ZOO if name not in QUICK]


@pytest.fixture(scope="module", params=[QUICK, pytest.param(REST, marks=pytest.mark.slow)])
def alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    (found,) = train(tmp_path_factory.mktemp("alone"), "single", request.param)
    return found


@pytest.mark.parametrize(
    "layout",
    [
        "tp2",
        pytest.param("pp2-micro2", marks=pytest.mark.slow),
        pytest.param("dp2-zero3", marks=pytest.mark.slow),
        # test_split_attention compares the layers with split tokens.
        pytest.param("cp2", marks=pytest.mark.slow),
    ],
)
def test_every_kind_trains_as_in_one_process(alone, tmp_path, layout):
    names = list(alone)
    if "cp" in layout:
        settings = {name: settings_of(name) for name in alone}
        names = [
            name
            for name, each in settings.items()
            if each.splits_tokens and not any(each.problems_when_split())
        ]
    ranks = train(tmp_path, layout, names)
    for name in names:
        expected_losses, expected, *_ = alone[name]
        # A rank's loss is that of its own pairs.
        losses = torch.tensor([rank[name][0] for rank in ranks]).mean(0).tolist()
        assert losses == pytest.approx(expected_losses, rel=1e-5), name
        weights = ranks[0][name][1]
        # Over all weights together: where a gradient is nearly zero, its rounding decides how far
        # Adam moves a weight. test_split_attention compares the gradients of every parameter.
        both = [(weights[key].flatten(), value.flatten()) for key, value in expected.items()]
        assert relative_rms(*map(torch.cat, zip(*both, strict=True))) <= 1e-6, name
        # Parameters of a few numbers, such as one per head, are sent in messages that do not count.
        sizes = [each.numel() * each.element_size() for each in expected.values()]
        uncounted = sum(size for size in sizes if size < CONTROL_BYTES)
        for rank in ranks:
            *_, measured, planned = rank[name]
            for axis in measured.keys() | planned.keys():
                apart = measured.get(axis, 0) - planned.get(axis, 0)
                assert abs(apart) < CONTROL_BYTES + uncounted, (name, axis, measured, planned)


@pytest.mark.slow
def test_what_zero_3_recomputes_in_mixed_precision_has_the_same_bits(tmp_path):
    """DeepSpeed's linear layer of ZeRO-3 adds the bias in place, to a product that was kept."""
    names = ["eq7", "softmax", "luna"]
    kept, recomputed = (train(tmp_path, layout, names) for layout in ("amp", "amp-selective"))
    for rank, expected in zip(recomputed, kept, strict=True):
        assert [rank[name][0] for name in names] == [expected[name][0] for name in names]
