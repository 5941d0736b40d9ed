"""The study summary against numbers worked out by hand."""

import json
from dataclasses import asdict, replace

import pytest
from matplotlib.collections import PathCollection

from experiments.convergence_report import (
    ConvergenceRun,
    Interval,
    compare,
    draw,
    read_runs,
    summarise,
    to_markdown,
)


def run(variant: str, seed: int, top1: float, num_tokens: int = 65) -> ConvergenceRun:
    return ConvergenceRun(
        variant=variant,
        seed=seed,
        num_tokens=num_tokens,
        top1=top1,
        top5=1.0,
        loss=0.5,
    )


RUNS = [
    run("softmax", 0, 0.94, num_tokens=257),
    run("softmax", 0, 0.90),
    run("softmax", 1, 0.92),
    run("softmax", 2, 0.94),
    run("Eq. 7 | alpha 0", 0, 0.80),
    run("Eq. 7 | alpha 0", 1, 0.90),
]


def test_mean_and_interval_by_hand():
    rows = summarise(RUNS)
    assert [(row.num_tokens, row.variant, row.num_seeds) for row in rows] == [
        (65, "softmax", 3),
        (65, "Eq. 7 | alpha 0", 2),
        (257, "softmax", 1),
    ]
    # Deviation 0.02 over three seeds; t(0.975, 2) = 4.302653: 4.302653 * 0.02 / sqrt(3).
    assert rows[0].top1.mean == pytest.approx(0.92)
    assert rows[0].top1.half_width == pytest.approx(0.0496828, rel=1e-5)
    assert rows[0].top5.half_width == 0
    # Deviation sqrt(0.005) over two seeds; t(0.975, 1) = 12.706205: 12.706205 * 0.05.
    assert rows[1].top1.half_width == pytest.approx(0.6353102, rel=1e-5)
    assert rows[2].top1.half_width is None


def test_markdown_table():
    assert to_markdown(summarise(RUNS)).splitlines() == [
        "| tokens | variant | seeds | top-1, % | top-5, % | loss |",
        "| ---: | :--- | ---: | ---: | ---: | ---: |",
        "| 65 | softmax | 3 | 92.0 ± 5.0 | 100.0 ± 0.0 | 0.500 ± 0.000 |",
        "| 65 | Eq. 7 \\| alpha 0 | 2 | 85.0 ± 63.5 | 100.0 ± 0.0 | 0.500 ± 0.000 |",
        "| 257 | softmax | 1 | 94.0 | 100.0 | 0.500 |",
    ]


def test_parameters_and_median_time_stand_in_the_table_where_they_are_known(tmp_path):
    known = [replace(each, num_parameters=12_345, seconds=10.0 * each.seed) for each in RUNS[1:4]]
    lines = to_markdown(summarise([*known, RUNS[0]])).splitlines()
    assert lines[0].endswith("| loss | parameters, k | seconds |")
    assert lines[2].endswith("| 12 | 10 |")
    assert lines[3].endswith("| 0.500 |  |  |")
    path = tmp_path / "runs.jsonl"
    old = {k: v for k, v in asdict(RUNS[0]).items() if k not in ("num_parameters", "seconds")}
    path.write_text("\n".join(json.dumps(each) for each in (old, asdict(known[0]))))
    assert read_runs(path) == [RUNS[0], known[0]]


def test_pooling_lengths_of_unlike_spread_would_say_too_much():
    quiet, loud = [0.09, 0.10, 0.11], [0.00, 0.10, 0.20]
    # Deviations 0.01 and 0.1: error sqrt((0.01**2 + 0.1**2) / 3) / 2 = 0.0290115; degrees of
    # freedom 2 * (0.01**2 + 0.1**2)**2 / (0.01**4 + 0.1**4) = 2.0399960; t = 4.2228.
    stratified = Interval.of_strata([quiet, loud])
    assert stratified.mean == pytest.approx(0.10)
    assert stratified.half_width == pytest.approx(0.0290115 * 4.2228, rel=1e-3)
    assert stratified.half_width > 1.8 * Interval.of([*quiet, *loud]).half_width
    # Equal spread: Welch's degrees of freedom are those of both together, 4.
    equal = Interval.of_strata([loud, [1.0, 1.1, 1.2]])
    assert equal.half_width == pytest.approx(2.776445 * 0.1 / 6**0.5)
    # Lengths count alike, whatever their number of seeds.
    assert Interval.of_strata([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0]]) == Interval(
        mean=0.5, half_width=0.0
    )
    assert Interval.of_strata([[0.1, 0.2], [0.3]]).half_width is None


def test_differences_are_paired_by_seed_and_stratified_by_length():
    runs = [*RUNS, run("Eq. 7 | alpha 0", 0, 0.90, num_tokens=257)]
    assert compare(runs, "softmax", "top1", 1).splitlines() == [
        "| top1 minus that of softmax | 65 tokens | 257 tokens | all lengths |",
        "| :--- | ---: | ---: | ---: |",
        "| Eq. 7 \\| alpha 0 | -6.0 ± 50.8 | -4.0 | -5.0 |",
    ]
    assert "| -6.0 ± 50.8 |  |  |" in compare(RUNS, "softmax", "top1", 1)


def test_picture_has_a_panel_per_length_and_a_dot_per_seed(tmp_path):
    figure = draw(RUNS, "softmax")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "65 tokens",
        "257 tokens",
        "",
        "",
    ]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["softmax", "Eq. 7 | alpha 0"]
    dots = [
        sorted(
            round(float(x), 6)
            for points in axes.collections
            if isinstance(points, PathCollection)
            for x, _ in points.get_offsets()
        )
        for axes in figure.axes
    ]
    assert dots == [[80.0, 90.0, 90.0, 92.0, 94.0], [94.0], [-10.0, -2.0], []]
    figure.savefig(tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_a_diverged_run_stays_visible():
    rows = [run("softmax", seed, 0.9) for seed in range(2)]
    diverged = ConvergenceRun(**{**asdict(run("softmax", 2, 0.1)), "loss": float("nan")})
    assert "| nan ± nan |" in to_markdown(summarise([*rows, diverged]))


def test_runs_are_read_back(tmp_path):
    lines = [json.dumps({**asdict(entry), "folder": "runs/x"}) for entry in RUNS]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines) + "\n\n")
    assert read_runs(tmp_path / "runs.jsonl") == RUNS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"\(0 runs\) must hold at least one run"),
        ("{}", "line 1 .* must hold variant, seed, num_tokens"),
        ("[1]", "line 1 .* must hold variant"),
        ("\n{not json", "line 2: must be JSON"),
    ],
)
def test_bad_file_is_refused(tmp_path, text, message):
    (tmp_path / "runs.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_runs(tmp_path / "runs.jsonl")


def test_repeated_seed_is_refused():
    with pytest.raises(ValueError, match=r"seed \(1\) must be unique within softmax, 65 tokens"):
        summarise([*RUNS, run("softmax", 1, 0.5)])
