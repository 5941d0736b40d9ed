"""The divergence guard, without training."""

import logging
import math

import pytest
import torch

from ds_linclip.checkpoint.manager import CheckpointManager
from ds_linclip.config import load_config
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.resilience.divergence import Diverged, DivergenceGuard

EMBEDDED = "ds_configs/train/embedded.yaml"
LOSS = torch.tensor(2.5)
NAN = torch.tensor(math.nan)


@pytest.fixture
def make_guard(tmp_path):
    def make(*overrides: str) -> DivergenceGuard:
        run = [f"output_dir={tmp_path}", "name=run"]
        config, mesh = load_config(EMBEDDED, [*run, *overrides]), Mesh.create()
        return DivergenceGuard(config, mesh, CheckpointManager(config, mesh, {}))

    return make


def steps(guard: DivergenceGuard, first: int, skipped: str) -> None:
    """Report steps: ``+`` taken, ``-`` skipped, ``s`` skipped but excused by the loss scale."""
    for step, kind in enumerate(skipped, start=first):
        loss = LOSS if kind == "+" else NAN
        guard.step_done(step, loss, was_skipped=kind != "+", is_excused=kind == "s")


def test_run_ends_after_skipped_steps_in_a_row(make_guard):
    guard = make_guard("health.max_skipped_steps=3", "log.sample_keys=true")
    steps(guard, 1, "+--+--++--")
    with pytest.raises(Diverged) as ended:
        steps(guard, 11, "-")
    message = str(ended.value)
    assert message.startswith("steps 9 to 11 were all skipped")
    assert "the last loss before was 2.5000 at step 8" in message
    assert "The weights have stayed those of step 8." in message
    assert "there is no checkpoint; the keys of its samples are in " in message
    assert "\n" not in message


def test_newest_checkpoint_is_named(make_guard, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-00000004").mkdir(parents=True)
    with pytest.raises(Diverged, match=r"no step was taken .*newest checkpoint is .*step-00000004"):
        steps(make_guard("health.max_skipped_steps=1"), 5, "-")


def test_steps_that_lower_the_loss_scale_do_not_count(make_guard):
    guard = make_guard("health.max_skipped_steps=3")
    steps(guard, 1, "s" * 18 + "--+")
    assert not guard.is_skipping
    with pytest.raises(Diverged, match="steps 22 to 41 "):
        steps(guard, 22, "s" * 17 + "---")


def test_every_skipped_step_is_logged_once(make_guard, caplog):
    with caplog.at_level(logging.WARNING):
        steps(make_guard(), 1, "+-+s")
    assert [record.getMessage()[:14] for record in caplog.records] == [
        "step 2 skipped",
        "step 4 skipped",
    ]
    assert "loss scale" in caplog.records[1].getMessage()


def test_loss_that_is_not_finite_ends_the_run(make_guard):
    guard = make_guard()
    steps(guard, 1, "+-")
    guard.check_loss(2, math.nan)  # its step was skipped
    steps(guard, 3, "+")
    guard.check_loss(3, 2.5)
    steps(guard, 4, "+")
    with pytest.raises(Diverged, match=r"loss of step 4 is nan, and its gradient was finite"):
        guard.check_loss(4, math.nan)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_last_loss_must_be_finite_even_if_its_step_was_skipped(make_guard, loss):
    guard = make_guard("train.steps=2", "optim.warmup_steps=1")
    steps(guard, 1, "--")
    guard.check_loss(1, loss)
    guard.check_loss(2, 2.5)  # only the gradient was too large
    with pytest.raises(Diverged, match=rf"loss of step 2 is {loss}, and it is the last one"):
        guard.check_loss(2, loss)


def test_weights_that_are_not_finite_are_not_saved(make_guard):
    guard = make_guard()
    guard.check_weights(7, None)
    with pytest.raises(Diverged, match=r"weights after step 7 are not finite \(visual\.proj\)"):
        guard.check_weights(7, "visual.proj")


def test_spike_is_a_loss_far_above_the_median(make_guard):
    guard = make_guard("health.spike_factor=2", "health.spike_window=3")
    assert not any(guard.is_spike(n, loss) for n, loss in enumerate([1.0, 9.0, 1.2], start=1))
    assert not guard.is_spike(4, 2.3)
    assert not guard.is_spike(5, math.nan)  # a skipped step
    assert guard.is_spike(6, 4.7)  # the median of 9, 1.2 and 2.3 is 2.3
    assert guard.is_spike(6, 4.7), "a spike does not become part of the median"


def test_without_a_factor_there_are_no_spikes(make_guard):
    guard = make_guard("health.spike_window=1")
    assert not any(guard.is_spike(n, 10.0**n) for n in range(9))


def test_rewinds_leave_batches_out_and_are_counted(make_guard, caplog):
    spikes = ["health.spike_factor=2", "health.spike_window=2", "health.max_rewinds=2"]
    guard = make_guard(*spikes)
    for step in (1, 2):
        assert not guard.is_spike(step, 1.0)
    assert guard.is_spike(10, 3.0)
    guard.rewound(10, 8)
    assert guard.skipped_batches == 2
    resumed = make_guard(*spikes)
    resumed.load_state(guard.state())
    assert resumed.scalars() == {"train/rewinds": 1, "train/skipped_batches": 2}
    assert resumed.is_spike(11, 3.0), "the window comes with the checkpoint"
    with caplog.at_level(logging.WARNING):
        resumed.rewound(11, 8)
    assert "rewound from step 11 to step 8; the 3 batches since are left out" in caplog.text
    assert resumed.skipped_batches == 5
    with pytest.raises(Diverged, match=r"3\.0000.*median.*1\.0000.*max_rewinds \(2\) are used up"):
        resumed.is_spike(12, 3.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["health.max_skipped_steps=0"], r"health\.max_skipped_steps \(0\) must be greater than 0"),
        (["health.spike_factor=0.5"], r"health\.spike_factor \(0\.5\) must be greater than 1"),
        (["health.spike_window=0"], r"health\.spike_window \(0\) must be greater than 0"),
        (["health.max_rewinds=-1"], r"health\.max_rewinds \(-1\) must not be negative"),
        (
            ["health.spike_factor=2", "checkpoint.resume=never"],
            r"health\.spike_factor \(2\.0\) needs checkpoint\.resume latest",
        ),
    ],
)
def test_rules(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(EMBEDDED, overrides)
