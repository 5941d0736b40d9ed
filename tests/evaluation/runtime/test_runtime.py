"""Slopes and crossovers with known answers, and small measurements of the real thing."""

import csv
import json
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ds_linclip.config import ParallelConfig
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.runtime import measure as module
from linclip_eval.runtime.fit import CallCost, RuntimePoint, Scaling, crossover, fit_slope
from linclip_eval.runtime.measure import Inputs, Limits, measure, measure_in_turn, peak_bytes
from linclip_eval.runtime.subjects import ATTENTIONS, DIRECTIONS, SUBJECTS, Subject
from linclip_launch.cli import main

TOKENS = [2**i for i in range(8, 17)]
#: Limits that are never reached, however busy the machine is.
LONG = {"max_seconds_per_point": 1000.0, "max_seconds_per_call": 1000.0}


def subject(what: str = "attention", kind: type[Subject] = Subject) -> Subject:
    mesh = Mesh.create(ParallelConfig(device="cpu"))
    return kind(what, mesh, torch.float32, num_heads=2)


def point(num_tokens: int, seconds: float) -> RuntimePoint:
    measured = CallCost(seconds=seconds, low=seconds, high=seconds, runs=9, peak_bytes=1)
    return RuntimePoint(
        what="layer",
        attention="softmax",
        direction="training",
        num_tokens=num_tokens,
        measured=measured,
    )


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5, 2.0])
def test_slope_of_a_power_is_its_exponent(exponent):
    slope = fit_slope(TOKENS, [3e-8 * n**exponent for n in TOKENS])
    assert slope.exponent == pytest.approx(exponent, abs=1e-9)
    assert slope.high - slope.low < 1e-6


def test_interval_of_a_noisy_slope_holds_the_exponent_as_often_as_it_says():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        noise = np.exp(0.05 * generator.standard_normal(len(TOKENS)))
        slope = fit_slope(TOKENS, 1e-8 * np.square(TOKENS) * noise)
        assert slope.low < slope.exponent < slope.high
        held += slope.low <= 2 <= slope.high
    assert 930 <= held <= 970  # 950 of 1000, and three deviations


@pytest.mark.parametrize(
    ("tokens", "seconds", "message"),
    [
        ([256, 512], [1, 2], r"tokens \(2 different\) must be at least 3"),
        ([256, 256, 512], [1, 1, 2], r"tokens \(2 different\) must be at least 3"),
        ([256, 512, 1024], [1, 0, 2], "must be positive and finite"),
        ([256, 512, 1024], [1, float("nan"), 2], "must be positive and finite"),
    ],
)
def test_slope_of_too_little_is_refused(tokens, seconds, message):
    with pytest.raises(ValueError, match=message):
        fit_slope(tokens, seconds)


def test_slope_is_fitted_over_the_last_decade():
    # Constant up to 4096, then quadratic: a fit over everything would be far below 2.
    points = [point(n, max(n, 4096) ** 2) for n in TOKENS]
    scaling = Scaling([*points, RuntimePoint(**{**vars(point(2**17, 1)), "measured": None})])
    place = "layer", "training", "softmax"
    assert scaling.fitted(*place) == [8192, 16384, 32768, 65536]
    assert scaling.slope(*place).exponent == pytest.approx(2)
    assert Scaling(points[:2]).slope(*place) is None


def test_crossover_of_two_powers():
    softmax = {n: 1e-9 * n**2 for n in TOKENS}
    linear = {n: 1e-6 * n for n in TOKENS}
    assert crossover(softmax, linear) == pytest.approx(1000)
    del softmax[65536]  # too slow to be measured
    assert crossover(softmax, linear) == pytest.approx(1000)


def test_last_crossover_counts():
    softmax = dict(zip(TOKENS, (3, 1, 3, 1, 3, 3, 3, 3, 3), strict=True))
    linear = dict.fromkeys(TOKENS, 2.0)
    assert TOKENS[3] < crossover(softmax, linear) < TOKENS[4]


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_no_crossover_of_parallel_lines(factor):
    line = {n: float(n) for n in TOKENS}
    assert crossover(line, {n: factor * n for n in TOKENS}) is None
    assert crossover(line, {}) is None


def test_peak_is_the_most_that_lives_at_once():
    x = torch.zeros(1000, 1000)

    def call() -> torch.Tensor:
        y = x + 1  # 4 MB
        y = y * 2  # 8 MB, then 4 MB again
        return torch.cat([y, y])  # 12 MB

    assert peak_bytes(call, x.device) == pytest.approx(12e6, rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize(
    "what",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name.startswith(("vit", "text")) else [])
        for name in SUBJECTS
        if name != "vit-l-16"
    ],
)
def test_every_subject_runs_in_both_directions(what):
    points = measure(subject(what), [24], Limits(runs=2, warmup=0, **LONG))
    assert {(point.direction, point.attention) for point in points} == {
        (direction, attention) for direction in DIRECTIONS for attention in ATTENTIONS
    }
    for one in points:
        assert one.measured is not None, one.skipped
        assert 0 < one.measured.low <= one.measured.seconds <= one.measured.high
        assert one.measured.runs == 2


def test_attentions_of_a_subject_compute_what_their_names_say():
    inputs = subject().inputs(7)
    out = {name: subject().call(name, "inference", inputs)() for name in ATTENTIONS}
    (q, k, v), _ = inputs
    q, k, v = (x.detach().transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    weights = torch.softmax(q @ k.mT / 8, dim=-1)
    torch.testing.assert_close(out["softmax"].transpose(1, 2), weights @ v)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    weights = 1 + q @ k.mT
    torch.testing.assert_close(out["Eq. 7"].transpose(1, 2), 0.5 * weights @ v)
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(out["Eq. 4"].transpose(1, 2), weights @ v)


def test_attentions_are_called_in_turn():
    calls = []

    class Recorded(Subject):
        def call(self, attention: str, direction: str, inputs: Inputs) -> Callable[[], object]:
            call = super().call(attention, direction, inputs)
            return lambda: (calls.append(attention), call())

    limits = Limits(passes=1, runs=5, warmup=2, **LONG)
    measure(subject(kind=Recorded), [16], limits)
    in_turn = list(ATTENTIONS)
    # For each direction: two calls of a first look, then two to warm up and five that count.
    assert calls == in_turn * (2 * (2 + 2 + 5))


def test_every_pass_goes_through_all_numbers_of_tokens():
    lengths = []

    class Recorded(Subject):
        def call(self, attention: str, direction: str, inputs: Inputs) -> Callable[[], object]:
            lengths.append(inputs[1].shape[1])
            return super().call(attention, direction, inputs)

    points = measure(subject(kind=Recorded), [16, 32], Limits(passes=2, runs=3, warmup=0, **LONG))
    calls = 2 * len(ATTENTIONS)
    assert lengths == [16] * calls + ([16] * calls + [32] * calls) * 2  # after the first look
    assert {point.measured.runs for point in points} == {3}


def test_point_without_memory_is_left_out_and_so_are_longer_ones():
    class Full(Subject):
        def call(self, attention: str, direction: str, inputs: Inputs) -> Callable[[], object]:
            def fail() -> None:
                raise torch.OutOfMemoryError("64 GiB")

            is_full = attention == "softmax" and inputs[1].shape[1] >= 32
            return fail if is_full else super().call(attention, direction, inputs)

    points = measure(subject(kind=Full), [16, 32, 64], Limits(runs=1, warmup=0, **LONG))
    skipped = {(point.attention, point.num_tokens): point.skipped for point in points}
    assert skipped.pop(("softmax", 32)) == "out of memory at 32 tokens"
    assert skipped.pop(("softmax", 64)) == "out of memory at 32 tokens"
    assert not any(skipped.values())


@pytest.mark.parametrize(
    ("tokens", "limits", "reason"),
    [
        ([64], {"max_seconds_per_call": 1e-9}, "a call predicted to take"),
        ([64, 2**34], {"max_seconds_per_call": 1e30}, "a call predicted to fill"),
    ],
)
def test_point_predicted_not_to_fit_is_left_out_with_its_reason(tokens, limits, reason):
    points = measure(subject(), tokens, Limits(runs=1, warmup=0, **limits))
    last = [point for point in points if point.num_tokens == tokens[-1]]
    assert len(last) == 6
    assert all(point.measured is None and reason in point.skipped for point in last)


def test_nothing_is_measured_after_the_deadline():
    points = measure(subject(), [16, 32], Limits(), deadline=0.0)
    assert len(points) == 12
    assert {point.skipped for point in points} == {"no time left of the budget"}


def test_fewer_runs_are_recorded():
    limits = Limits(runs=1000, warmup=100, max_seconds_per_point=1e-6)
    points = measure(subject(), [16], limits)
    assert {point.measured.runs for point in points} == {1}


@pytest.mark.long
def test_command_writes_everything(tmp_path, capsys):
    tokens = ["32", "64", "128", "256"]
    arguments = ["--out", str(tmp_path / "new"), "--device", "cpu", "--what", "attention", "layer"]
    arguments += ["--tokens", *tokens, "100000000", "--runs", "3", "--warmup", "1"]
    arguments += ["--max-seconds-per-point", "1000"]
    assert main(["eval", "runtime", *arguments]) == 0
    folder = tmp_path / "new"
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3 * 5
    for row in rows:
        if row["tokens"] == "100000000":
            assert row["skipped"]
            assert row["seconds"] == ""
        else:
            assert float(row["low"]) <= float(row["seconds"]) <= float(row["high"])
            assert row["runs"] == "3"
            assert int(row["peak_bytes"]) > 0
    results = json.loads((folder / "results.json").read_text())
    assert "float32" in results["conditions"]
    assert len(results["points"]) == len(rows)
    assert [entry["fitted_tokens"] for entry in results["growth"]] == [[32, 64, 128, 256]] * 12
    summary = (folder / "summary.md").read_text()
    assert summary.startswith("# ")
    assert "linclip eval runtime --out" in summary
    assert "| layer | training | softmax | 100000000 |" in summary
    for name in ("figure.png", "memory.png"):
        assert f"({name})" in summary
        assert (folder / name).stat().st_size > 10_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_command_on_a_gpu(tmp_path):
    arguments = ["--out", str(tmp_path), "--device", "cuda", "--tokens", "256", "1024", "4096"]
    assert (
        main(
            ["eval", "runtime", *arguments, "--runs", "10", "--what", "attention", "block", "text"]
        )
        == 0
    )
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 3 * 3
    assert all(row["runs"] and int(row["peak_bytes"]) > 0 for row in rows)


def test_folder_that_cannot_be_created_is_reported_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["eval", "runtime", "--out", str(tmp_path / "file"), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


class Sleeper:
    """Workload that sleeps for a millisecond, with 1000 sequences in the calls of long inputs."""

    what, device, directions, growth = "sleep", torch.device("cpu"), ("inference",), {"softmax": 2}

    def num_sequences(self, num_tokens: int) -> int:
        return 1000 if num_tokens > 16 else 1

    def inputs(self, num_tokens: int) -> Inputs:
        return (torch.zeros(num_tokens),), torch.zeros(num_tokens)

    def call(self, attention: str, direction: str, inputs: Inputs) -> Callable[[], object]:
        return lambda: time.sleep(1e-3)


def test_prediction_counts_the_sequences_of_a_call():
    limits = Limits(runs=1, warmup=0, max_seconds_per_point=1000, max_seconds_per_call=0.9)
    one, many = measure(Sleeper(), [16, 17], limits)
    assert one.measured is not None
    assert many.skipped.startswith("a call predicted to take")


def test_every_workload_gets_a_share_of_the_time(monkeypatch):
    limits = Limits(runs=1, warmup=0)
    workloads = [Sleeper(), Sleeper()]
    deadline = time.monotonic() + 1000
    found = [
        list(points) for points in measure_in_turn(workloads, 2, [16], limits, deadline=deadline)
    ]
    assert [len(points) for points in found] == [1, 2]
    assert all(point.measured for point in found[-1])
    deadlines = []

    def record(workload: Sleeper, tokens: list[int], limits: Limits, *, deadline: float) -> list:
        deadlines.append(deadline - time.monotonic())
        return []

    monkeypatch.setattr(module, "measure", record)
    deadline = time.monotonic() + 1000
    list(measure_in_turn(workloads, 2, [16], limits, deadline=deadline))
    assert deadlines == pytest.approx([500, 1000], rel=0.1)
