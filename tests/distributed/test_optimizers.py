"""Two ranks: optimizers and weight averages at every ZeRO stage."""

import json

import pytest

from ds_linclip.engine.ema import ema_weights
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from helpers import optimizer_job as toy

pytestmark = pytest.mark.distributed
FP32 = [name for name in toy.FORMS if name.startswith("fp32")]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    run_ranks(2, toy.main, folder)
    return folder


def results(job, part):
    return [json.loads((job / f"rank{rank}.json").read_text())[part] for rank in (0, 1)]


@pytest.mark.parametrize("form", FP32)
@pytest.mark.parametrize("kind", ["adamw", "lion", "lamb"])
def test_two_ranks_train_like_one_process(job, kind, form):
    for seen in results(job, f"{kind}_{form}"):
        assert seen["skipped"] == 1
        assert seen["weights"] < 1e-6
        assert seen["averages"] < 1e-6 < 1e-4 < seen["apart"]
        assert seen["restored"] == 0


def test_trust_ratios_are_those_of_parameters_that_tensor_parallelism_splits(job):
    for seen in results(job, "lamb_tensor_parallel"):
        assert seen["split"] < 1e-6
        assert seen["both"] < 1e-6
        assert seen["way"] > 0.1


@pytest.mark.parametrize("form", toy.FORMS)
def test_averages_are_saved_and_resumed_bit_for_bit(job, form):
    for seen in results(job, f"resume_{form}"):
        assert seen["weights"] == seen["averages"] == seen["restored"] == 0
        # The order of two roundings may differ, hardly ever across the border of a bf16 value.
        assert seen["not_by_hand"] < 0.02 < 0.5 < seen["apart"]


@pytest.mark.parametrize("loaded", ["fp32_zero1", "fp32_zero3"])
@pytest.mark.parametrize("saved", ["fp32_zero1", "fp32_zero3", "fp32_zero2_offload"])
def test_state_resumes_with_another_stage_on_other_ranks(job, saved, loaded):
    engine, mesh = toy.make_engine(Mesh.create(), "adamw", loaded), Mesh.create()
    toy.load(engine, mesh, job / saved)
    expected, averages = toy.train_in_one_process("adamw", 3)
    assert toy.largest_difference(toy.module_weights(engine), expected) < 1e-6
    with ema_weights(engine):
        assert toy.largest_difference(toy.module_weights(engine), averages) < 1e-6
    toy.train(engine, mesh, [3, 4])
    expected, averages = toy.train_in_one_process("adamw", 5)
    assert toy.largest_difference(toy.module_weights(engine), expected) < 1e-6
    with ema_weights(engine):
        assert toy.largest_difference(toy.module_weights(engine), averages) < 1e-6


@pytest.mark.parametrize("form", ["fp32_zero1", "fp32_zero3"])
def test_state_from_before_the_first_step_replaces_later_state(tmp_path, form):
    engine, mesh = toy.make_engine(Mesh.create(), "adamw", form), Mesh.create()
    toy.save(engine, mesh, tmp_path)
    toy.train(engine, mesh, [0, 1])
    toy.load(engine, mesh, tmp_path)
    toy.train(engine, mesh, range(3))
    expected, averages = toy.train_in_one_process("adamw", 3)
    assert toy.largest_difference(toy.module_weights(engine), expected) < 1e-6
    with ema_weights(engine):
        assert toy.largest_difference(toy.module_weights(engine), averages) < 1e-6
