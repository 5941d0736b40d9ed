import pytest

from ds_linclip.monitoring.stragglers import slowest


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
