"""Batches and losses that are not finite, on two ranks: no state is damaged, no rank hangs."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ds_linclip.config import Config, load_config
from ds_linclip.data import Storage, TrainData, find_shards
from ds_linclip.parallel.spawn import run_ranks
from helpers import EMBEDDED
from helpers import not_finite_job as job

pytestmark = [pytest.mark.distributed, pytest.mark.faults]
SMALL = [
    *("model.vision.layers=1", "model.text.layers=1", "model.embed_dim=32"),
    *("model.vision.width=32", "model.vision.head_width=16", "model.text.width=32"),
    *("eval.data=null", "log.tensorboard=false"),
    *("optim.warmup_steps=1", "data.num_workers=0", "log.every_steps=1"),
    *("checkpoint.every_steps=2", "checkpoint.keep_last=9"),
]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Return what every rank measured, form by form."""
    folder = tmp_path_factory.mktemp("steps")
    overrides = [*SMALL, f"train.global_batch_size={job.BATCH}", "optim.ema_decay=0.9"]
    run_ranks(2, job.steps_that_are_not_finite, str(EMBEDDED), overrides, folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("form", job.FORMS)
def test_bad_pixel_changes_no_state_and_the_next_step_is_taken(steps, form):
    for seen in (rank[form] for rank in steps):
        assert math.isnan(seen["loss_of_bad_step"])
        assert (seen["skips_before"] > 0) == form.startswith("fp16")
        assert seen["was_skipped"]
        assert seen["skips"] == 1
        assert seen["changed_by_bad_step"] == 0
        assert not seen["good_was_skipped"]
        assert seen["changed_by_good_step"] > 0


@pytest.mark.parametrize("form", job.FORMS)
def test_running_engine_loads_a_checkpoint_bit_for_bit(steps, form):
    for seen in (rank[form] for rank in steps):
        assert seen["step_loaded"] == seen["steps_before"]
        assert seen["skips_loaded"] == seen["skips_before"]
        assert seen["changed_by_load"] == 0
        assert seen["loss_again"][0] == seen["loss_again"][1]
        assert seen["changed_again"] == 0


def config_of(folder: Path, name: str, *overrides: str) -> Config:
    run = [f"output_dir={folder}", f"name={name}", "train.global_batch_size=16"]
    return load_config(EMBEDDED, [*SMALL, *run, "log.sample_keys=true", *overrides])


def records(run: Path, file: str = "metrics.jsonl") -> dict[int, dict[str, float]]:
    lines = (run / file).read_text().splitlines()
    assert len({json.loads(line)["step"] for line in lines}) == len(lines), "every step once"
    return {record["step"]: record for record in map(json.loads, lines)}


def test_skipped_steps_end_the_run_on_all_ranks_and_it_can_resume(tmp_path, embedded_overrides):
    overrides = [embedded_overrides[0], "train.steps=9", "health.max_skipped_steps=4"]
    config = config_of(tmp_path, "ended", *overrides)
    run_ranks(2, job.end_for_skipped_steps, config)
    for rank in (0, 1):
        message, kept = json.loads((config.run_dir / f"ended-{rank}.json").read_text())
        assert message.startswith("steps 5 to 8 were all skipped")
        assert "step-00000004; the keys of its samples are in" in message
        assert kept == ["step-00000002", "step-00000004"], "nothing is saved while steps fail"
    seen = records(config.run_dir)
    assert sorted(seen) == list(range(1, 10))
    assert all(math.isfinite(record["train/loss"]) for record in seen.values())
    assert seen[9]["train/skipped_steps"] == 0
    undone = records(config.run_dir, "metrics_undone.jsonl")
    assert sorted(undone) == [5, 6, 7]
    assert undone[7]["train/skipped_steps"] == 3
    assert undone[7]["train/loss"] is None


@pytest.mark.parametrize(
    "layout", [["zero.stage=3", "train.precision=bf16"], ["parallel.pp=2"]], ids=["zero3", "pp2"]
)
def test_spike_rewinds_and_leaves_the_batches_out(tmp_path, embedded_overrides, layout):
    overrides = [embedded_overrides[0], "train.steps=8", "model.vision.patch_dropout=0.5"]
    spikes = ["health.spike_factor=3", "health.spike_window=3"]
    sizes = ["data.resolutions=[{image_size: 32}, {from_step: 5, image_size: 16}]"]
    config, again = (
        config_of(tmp_path, name, *overrides, *spikes, *sizes, *layout)
        for name in ("whole", "again")
    )
    run_ranks(2, job.rewind_after_a_spike, config, again, 4)  # the batch of step 5

    seen = records(config.run_dir)
    assert [seen[step]["train/rewinds"] for step in range(1, 9)] == [0] * 4 + [1] * 4
    assert seen[8]["train/skipped_batches"] == 1
    saved = sorted(path.name for path in (config.run_dir / "checkpoints").glob("step-*"))
    # A save was requested at the spike; the step after the rewind is saved instead.
    assert saved == [f"step-{step:08d}" for step in (2, 4, 5, 6, 8)]
    assert sorted(records(config.run_dir, "metrics_undone.jsonl")) == [5]
    assert keys_of(config, step=5, skipped_batches=0) == expected_keys(config, batch=4)
    for step in (5, 8):
        assert keys_of(config, step=step, skipped_batches=1) == expected_keys(config, batch=step)

    resumed = records(again.run_dir)
    assert sorted(resumed) == [7, 8]
    for step, record in resumed.items():
        assert record["train/loss"] == seen[step]["train/loss"]
        assert record["train/skipped_batches"] == 1
    for rank in (0, 1):
        file = Path("checkpoints", "step-00000008", f"rank-{rank:05d}.safetensors")
        whole, last = (load_file(run.run_dir / file) for run in (config, again))
        assert whole.keys() == last.keys()
        assert all(whole[name].equal(last[name]) for name in whole)


def keys_of(config: Config, *, step: int, skipped_batches: int) -> list[str]:
    """Return the keys of all data ranks in order."""
    keys = []
    for log in sorted((config.run_dir / "samples").glob("rank-*.jsonl")):
        for record in map(json.loads, log.read_text().splitlines()):
            if (record["step"], record["skipped_batches"]) == (step, skipped_batches):
                keys += record["keys"]
    return keys


def expected_keys(config: Config, *, batch: int) -> list[str]:
    groups = find_shards(config.data.train, Storage(config.data.cache, config.data.network))
    return next(TrainData(config, groups, dp_rank=0, dp_size=1).batches(batch)).keys
