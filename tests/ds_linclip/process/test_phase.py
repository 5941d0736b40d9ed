import time

from ds_linclip.process.phase import Progress


def test_phases_are_counted_and_keep_their_step():
    progress = Progress()
    assert (progress.place.entered, progress.place.phase) == (0, "")
    progress.enter("waiting for data", 12)
    progress.enter("saving")
    place = progress.place
    assert (place.entered, place.step, place.phase) == (2, 12, "saving")
    assert abs(place.since - time.time()) < 5
