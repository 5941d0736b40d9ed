import time

import pytest

from ds_linclip.progress import Progress
from ds_linclip.stragglers import slowest
from ds_linclip.watchdog import summarize


def facts(rank: int, entered: int, state: str = "running", **more: object) -> dict:
    place = {"entered": entered, "step": 7, "phase": f"phase {entered}", "seconds": 9.2}
    return {"rank": rank, "host": "n1", "pid": 100 + rank, "state": state, **place, **more}


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            [facts(0, 5), facts(1, 4), facts(2, 5)],
            "hang: rank 1 (host n1, pid 101) is behind: running, step 7, phase 4 for 9 s; "
            "2 of 3 ranks wait at step 7, phase 5 for 9 s",
        ),
        (  # a stopped rank is behind even where it has entered as many phases
            [facts(0, 5), facts(1, 5, "stopped")],
            "hang: rank 1 (host n1, pid 101) is behind: stopped, step 7, phase 5 for 9 s; "
            "1 of 2 ranks wait at step 7, phase 5 for 9 s",
        ),
        (
            [facts(0, 5), {"rank": 1, "state": "silent"}],
            "hang: rank 1 (host unknown, pid unknown) is behind: silent, no sign of life since the "
            "start; 1 of 2 ranks wait at step 7, phase 5 for 9 s",
        ),
        (
            [facts(0, 5), facts(1, 5)],
            "hang: no rank is behind, all 2 are at step 7, phase 5 for 9 s",
        ),
    ],
)
def test_rank_that_is_behind_is_named(found, line):
    assert summarize(found) == line


def test_phases_are_counted_and_keep_their_step():
    progress = Progress()
    assert (progress.place.entered, progress.place.phase) == (0, "")
    progress.enter("waiting for data", 12)
    progress.enter("saving")
    place = progress.place
    assert (place.entered, place.step, place.phase) == (2, 12, "saving")
    assert abs(place.since - time.time()) < 5


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([0.1, 0.4, 0.1, 0.1], (1, 4.0)),
        ([0.1, 0.4], (1, 4.0)),
        ([0.4], (0, 1.0)),
        ([0.0, 0.0], (0, 1.0)),
    ],
)
def test_slowest_rank(times, expected):
    assert slowest(times) == expected
