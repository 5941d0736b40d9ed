"""Numbers as people read them."""

import math

import pytest

from ds_linclip.process.number_text import format_figure


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0613, "0.0613"),
        (0.06, "0.06"),
        (0.000123456, "0.000123"),
        (0, "0"),
        (5.678, "5.68"),
        (99.96, "100"),
        (999.4, "999"),
        (999.5, "1000"),
        (441540.4, "441540"),
        (-1234.5, "-1234"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_three_digits_or_all_before_the_point(value: float, text: str) -> None:
    assert format_figure(value) == text
