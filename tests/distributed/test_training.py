"""Two ranks: training, resume, ZeRO stages, the global loss."""

import json

import pytest
from safetensors.torch import load_file

from ds_linclip.checkpoint.manager import CheckpointManager
from ds_linclip.config import load_config
from ds_linclip.data import Storage, TrainData, find_shards
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.spawn import run_ranks
from ds_linclip.process.consensus import AgreedError
from helpers import EMBEDDED, training_job

pytestmark = pytest.mark.distributed
FORMS = list(training_job.FORMS)


@pytest.fixture(scope="module")
def job(embedded_overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    run_ranks(2, training_job.main, folder, str(EMBEDDED), embedded_overrides)
    return folder


def results(job, part):
    return [json.loads((job / f"rank{rank}.json").read_text())[part] for rank in (0, 1)]


def steps_of(form):
    return training_job.STEPS if form == "fp32_zero1" else 4


def values(job, run, tag="train/loss"):
    lines = (job / run / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record[tag] for record in map(json.loads, lines) if tag in record}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tag", ["train/loss", "train/grad_norm", "train/logit_scale"])
def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(job, form, tag):
    whole, again = values(job, f"{form}_whole", tag), values(job, f"{form}_again", tag)
    steps = steps_of(form)
    assert sorted(whole) == list(range(1, steps + 1))
    assert sorted(again) == list(range(steps // 2 + 1, steps + 1))
    assert {step: whole[step] for step in again} == again
    assert len(set(whole.values())) > 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [0, 1])
def test_resumed_state_is_equal_bit_for_bit(job, form, rank):
    step, file = f"step-{steps_of(form):08d}", f"rank-{rank:05d}.safetensors"
    whole, again = (
        load_file(job / f"{form}_{run}" / "checkpoints" / step / file) for run in ("whole", "again")
    )
    assert whole.keys() == again.keys()
    assert all(whole[name].equal(again[name]) for name in whole)
    assert len({name.partition("/")[0] for name in whole}) >= 3


def test_loss_falls(job):
    losses = list(values(job, "fp32_zero1_whole").values())
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.25


def test_loss_of_two_ranks_is_that_of_the_whole_batch(job):
    for difference in results(job, "loss"):
        assert max(difference.values()) < 1e-12


def test_error_of_one_rank_is_raised_on_all(job):
    for rank, seen in enumerate(results(job, "agree")):
        assert seen == {"message": "disk (full) must have room (on rank 1 of 2)", "value": rank}


def test_logit_scale_stays_within_its_bounds(job):
    for seen in results(job, "scale"):
        limit = pytest.approx(100, rel=1e-6)
        reached = seen["up"].index(limit)
        assert seen["up"][reached:] == [limit] * (25 - reached)
        assert seen["down"][0] == limit
        assert min(seen["down"]) < 50.0


def test_run_folder_describes_the_run(job):
    run = job / "bf16_zero2_whole"
    assert load_config(run / "config.yaml").train.precision == "bf16"
    assert json.loads((run / "deepspeed.json").read_text())["bf16"] == {"enabled": True}
    (start,) = map(json.loads, (run / "starts.jsonl").read_text().splitlines())
    assert start["world_size"] == 2
    assert start["layout"]["dp"] == 2
    assert sum(start["hosts"].values()) == 2
    assert start["deepspeed"]
    assert (run / "checkpoints" / "latest").read_text() == f"step-{steps_of('bf16_zero2'):08d}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vision.layers=3", r"step-00000026, .*model\.vision\.layers \(3\) must equal 4"),
        ("optim.kind=lion", r"step-00000026, .*optim\.kind \(lion\) must equal adamw"),
        ("train.seed=5", r"step-00000026, .*train\.seed \(5\) must equal 0"),
        ("optim.lr=1.0", r"step-00000026, .*optim\.lr \(1\.0\) must equal 0\.002"),
        ("data.num_lanes=3", r"data\.num_lanes \(3\) must equal 1.* order of data\.train"),
        (
            "data.resolutions=[{image_size: 64}]",
            r"data\.resolutions \(\[.*64.*\]\) must equal \[\]",
        ),
        ("data.captions=[syn.txt]", r"data\.captions \(\[.*syn\.txt.*\]\) must equal \[\]"),
        ("train.steps=900", r"step-00000026, .*train\.steps \(900\) must equal 26"),
        ("checkpoint.resume=never", r"checkpoint\.resume \(never\) refuses .*step-00000026"),
    ],
)
def test_checkpoint_of_another_run_is_refused(job, embedded_overrides, override, message):
    config = load_config(
        EMBEDDED,
        [*embedded_overrides, f"output_dir={job}", "name=fp32_zero1_whole", override],
    )
    before = sorted(job.rglob("*"))
    groups = find_shards(config.data.train, Storage(config.data.cache, config.data.network))
    data = TrainData(config, groups, dp_rank=0, dp_size=1)
    with pytest.raises(AgreedError, match=message):
        CheckpointManager(config, Mesh.create(), data.identity).newest()
    assert sorted(job.rglob("*")) == before
