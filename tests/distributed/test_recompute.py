"""Activation checkpointing: the same gradients, less memory, and no expensive operation twice."""

from typing import Any

import pytest
import torch

from ds_linclip.config import ParallelConfig
from ds_linclip.parallel.spawn import run_ranks
from helpers.recompute_job import all_measures

pytestmark = pytest.mark.distributed
AXES = {"single": {}, "tp2": {"tp": 2}, "cp2": {"cp": 2}}
CASES = [
    (axes, kind, drop)
    for axes in AXES
    for kind in ("linear", "softmax")
    for drop in (False, True)
    if (axes, kind) != ("cp2", "softmax")
]


@pytest.fixture(scope="module")
def measures(tmp_path_factory) -> dict[str, dict[tuple[str, bool, str], dict[str, Any]]]:
    found = {}
    for name, axes in AXES.items():
        folder = tmp_path_factory.mktemp(name)
        parallel = ParallelConfig(device="cpu", **axes)
        run_ranks(parallel.tp * parallel.cp, all_measures, parallel, folder)
        found[name] = torch.load(folder / "found.pt")
    return found


@pytest.mark.parametrize(("axes", "kind", "drop"), CASES)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_gradients_equal_those_without_bit_for_bit(measures, axes, kind, drop, recompute):
    expected = measures[axes][kind, drop, "none"]["gradients"]
    for name, gradient in measures[axes][kind, drop, recompute]["gradients"].items():
        assert torch.equal(gradient, expected[name]), name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize(("axes", "kind", "drop"), CASES)
def test_backward_needs_less_memory(measures, axes, kind, drop):
    none, selective, full = (
        measures[axes][kind, drop, recompute]["held"] for recompute in ("none", "selective", "full")
    )
    assert selective < 0.9 * none
    assert full < 0.5 * none


@pytest.mark.parametrize(("axes", "kind", "drop"), CASES)
def test_selective_repeats_no_product_attention_or_sum_over_ranks(measures, axes, kind, drop):
    none, selective, full = (
        measures[axes][kind, drop, recompute]["operators"]
        for recompute in ("none", "selective", "full")
    )
    assert selective == none
    attention = "linclip::linear_attention" if kind == "linear" else "aten::_scaled_dot_product"
    assert any(name.startswith(attention) for name in none)
    assert ("c10d::allreduce_" in none) == (axes != "single")
    assert sum(full.values()) > sum(none.values())  # the counter does see what is repeated
