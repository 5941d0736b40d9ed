"""Work that is divided among ranks, here by a process alone."""

import pytest

from ds_linclip.process.consensus import AgreedCrash, AgreedError, map_over_ranks


def test_results_are_in_the_order_of_the_items():
    assert map_over_ranks(lambda share: (10 * item for item in share), range(5), None) == [
        *(0, 10, 20, 30, 40)
    ]
    assert map_over_ranks(list, [], None) == []


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_error_of_the_data_is_raised_as_agreed(error):
    def work(share):
        yield from share[:2]
        raise error("item 2 is unreadable")

    with pytest.raises(AgreedError, match="item 2 is unreadable"):
        map_over_ranks(work, range(5), None)


def test_bug_is_not_hidden(caplog):
    with pytest.raises(AgreedCrash, match="ZeroDivisionError: division by zero") as raised:
        map_over_ranks(lambda share: [1 / item for item in share], range(2), None)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert "Traceback" in caplog.text
