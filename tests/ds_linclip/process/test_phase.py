import time

from ds_linclip.process.phase import PhaseTracker


def test_phases_are_counted_and_keep_their_step():
    progress = PhaseTracker()
    assert (progress.current.entered, progress.current.phase) == (0, "")
    progress.enter("waiting for data", 12)
    progress.enter("saving")
    current = progress.current
    assert (current.entered, current.step, current.phase) == (2, 12, "saving")
    assert abs(current.since - time.time()) < 5
