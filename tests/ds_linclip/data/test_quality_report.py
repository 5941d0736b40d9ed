"""Counts of what is bad: exact over ranks and resumption, and an error when they are too many."""

import json
from pathlib import Path

import pytest
import torch

from ds_linclip.data import Batch, DataError, DataReport
from ds_linclip.data.sample_reader import ShardProblem
from ds_linclip.data.tally import Tally

CUT = ShardProblem("/data/00001.tar", "shard_cut", 7, 9)
MISSING = ShardProblem("/data/00002.tar", "shard_missing", 0, 9)
HIDDEN = [ShardProblem(f"/data/0000{n}.tar", "member_hidden", 2 + n, 0, "._a.jpg") for n in (1, 3)]
REPEATED = ShardProblem("/data/00001.tar", "keys_repeated", 7, 6)


def batch(size: int, *problems: ShardProblem, **skipped: int) -> Batch:
    nothing = torch.empty(size, 0)
    first = {cause: f"{cause[0]}{count} of /data/00001.tar" for cause, count in skipped.items()}
    keys, captions = ["k"] * size, ["c"] * size
    return Batch(nothing, nothing, keys, captions, Tally(skipped, first), list(problems))


def two_ranks(max_bad_samples: float = 0.1) -> DataReport:
    """Return what one of two ranks knows after two exchanges."""
    first, second = DataReport(max_bad_samples), DataReport(max_bad_samples)
    first.add(batch(100, CUT, text_empty=2))
    second.add(batch(100, CUT, MISSING, *HIDDEN, image_undecodable=1))
    first.merge([first.take(), second.take()])
    first.add(batch(100, REPEATED))
    second.add(batch(100, text_empty=1))
    first.merge([first.take(), second.take()])
    return first


def test_ranks_are_added_up_and_shards_listed_once() -> None:
    report = two_ranks()
    assert report.scalars() == {
        "data/skipped_samples": 4,
        "data/bad_shards": 2,
        "data/skipped/image_undecodable": 1,
        "data/skipped/text_empty": 3,
        "data/shards/keys_repeated": 1,
        "data/shards/shard_cut": 1,
        "data/shards/shard_missing": 1,
    }
    state = report.state()
    assert state["samples"] == 400
    assert state["skipped"] == {"image_undecodable": 1, "text_empty": 3}
    assert [shard["cause"] for shard in state["shards"]] == [
        "shard_cut",
        "shard_missing",
        "member_hidden",
        "member_hidden",
        "keys_repeated",
    ]


def test_every_cause_is_described_with_its_count_and_an_example() -> None:
    assert two_ranks().describe() == [
        "bad samples of 400, replaced: text_empty: 3 (t2 of /data/00001.tar, ...)",
        "bad samples of 400, replaced: image_undecodable: 1 (i1 of /data/00001.tar)",
        "shards: keys_repeated: 1 (/data/00001.tar: 7 found, 6 expected)",
        "shards: shard_cut (broken or cut off; the samples before that place are used): 1 "
        "(/data/00001.tar: 7 found, 9 expected)",
        "shards: shard_missing: 1 (/data/00002.tar: 0 found, 9 expected)",
        "members, passed over: member_hidden (files of the system, not of the user): 8 "
        "(._a.jpg of /data/00001.tar, ...)",
    ]
    assert DataReport(0.1).describe() == []


def test_resumed_report_continues_its_counts() -> None:
    report = DataReport(0.1)
    report.load_state(json.loads(json.dumps(two_ranks().state())))
    assert report.state() == two_ranks().state()
    report.add(batch(10, CUT, text_empty=5))
    report.merge([report.take()])
    assert report.state()["samples"] == 410
    assert report.scalars()["data/skipped/text_empty"] == 8
    assert report.scalars()["data/bad_shards"] == 2


def test_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "data_report.json"
    for step in (1, 2):
        two_ranks().write(path, step=step)
        assert json.loads(path.read_text()) == {"step": step, **two_ranks().state()}
    assert list(tmp_path.iterdir()) == [path]


def test_too_many_bad_samples_are_an_error() -> None:
    report = DataReport(0.1)
    report.add(batch(900, text_empty=60, image_missing=40))
    report.merge([report.take()])
    report.check()  # of 1000 samples, the least that is judged, no more than a tenth
    report.add(batch(100, text_empty=1))
    report.merge([report.take()])
    with pytest.raises(
        DataError,
        match=r"data\.max_bad_samples \(0\.1\) is exceeded: 101 of 1000 samples are bad: "
        r"text_empty: 61 \(t60 of .*\); image_missing: 40 \(i40 of .*\)",
    ):
        report.check()
