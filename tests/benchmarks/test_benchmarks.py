"""The attention benchmarks: arithmetic by hand, and the commands on short inputs."""

import csv
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.attention import bench_attention, operators, prediction
from benchmarks.attention.operators import WORKS, Implementation
from benchmarks.attention.report import AttentionReport
from benchmarks.context.report import STATE_BYTES, ContextReport, Row
from benchmarks.correctness import Check
from linclip_eval.runtime.fit import CallCost, RuntimePoint
from linclip_eval.runtime.measure import Limits

FACTS = {
    name: name
    for name in ("device", "torch", "triton", "date_utc", "commit", "dtype", "command", "cores")
}
CHECKS = [Check("linclip Eq. 7", 77, "o", 1e-7, 1e-6)]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Run the benchmark in this process, in very few calls."""
    limits = {"max_seconds_per_point": 0.001, "max_seconds_per_call": 1e4, "quantiles": (0.2, 0.8)}
    monkeypatch.setattr(bench_attention, "LIMITS", {"cpu": Limits(**limits)})
    monkeypatch.setattr(bench_attention, "COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(bench_attention, "CHECK_TOKENS", (15, 77))
    threads = torch.get_num_threads()

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["bench_attention.py", *map(str, arguments)])
        return bench_attention.main()

    yield run
    torch.set_num_threads(threads)


def point(implementation: Implementation, num_tokens: int, us_per_head: float) -> RuntimePoint:
    batch, heads = operators.batch_and_heads("cpu", num_tokens)
    seconds = 1e-6 * us_per_head * batch * heads
    cost = CallCost(seconds=seconds, low=seconds, high=seconds, runs=9, peak_bytes=2**20)
    return RuntimePoint(
        what="causal" if implementation.causal else "bidirectional",
        attention=implementation.name,
        direction="forward",
        num_tokens=num_tokens,
        measured=cost,
    )


def test_speed_up_is_over_the_fastest_sdpa_and_slopes_are_those_of_long_sequences(tmp_path: Path):
    implementations = [
        Implementation("linclip Eq. 7", "linclip", torch.add),
        Implementation("SDPA flash", "sdpa", torch.add),
        Implementation("SDPA cuDNN", "sdpa", torch.add),
    ]
    ours, flash, cudnn = implementations
    times = {
        ours: {77: 500.0, 2000: 7.0, 4000: 28.0, 8000: 112.0},
        flash: {77: 1000.0, 2000: 42.0, 4000: 28.0, 8000: 112.0},
        cudnn: {77: 250.0, 2000: 21.0, 4000: 280.0, 8000: 336.0},
    }
    points = [point(one, n, us) for one, line in times.items() for n, us in line.items()]
    report = AttentionReport("cpu", torch.float32, implementations, 1e9, CHECKS, points)
    summary = report.write(tmp_path, FACTS)
    assert "| 77 | 0.5 (0.5 to 0.5) |" in summary
    assert "| 2000 | 3 (3 to 3) |" in summary
    growth = "2.00 (2.00 to 2.00), N = 2000 to 8000"
    assert f"| bidirectional, linclip Eq. 7 | {growth} | above 8000 |" in summary
    assert "| 4000 | 28 | 28 | 280 |" in summary  # time per head
    # 4 tensors of 2000 * 64 float32 in 7 us, against 1 GB/s.
    assert f"| 2000 | {4 * 2000 * 64 * 4 / 7e-6 / 1e9:.1%} |" in summary


def test_predictions_stand_beside_measured_times(tmp_path: Path):
    ours = Implementation("linclip Eq. 7", "linclip", torch.add)
    flash = Implementation("SDPA flash", "sdpa", torch.add)
    points = [point(one, n, 100.0) for one in (ours, flash) for n in (2000, 4000, 8000)]
    milliseconds = 1e3 * points[0].measured.seconds
    predicted = {points[0]: points[0].measured.seconds / 2}
    report = AttentionReport("cpu", torch.float32, [ours, flash], 1e9, CHECKS, points, predicted)
    summary = report.write(tmp_path, FACTS)
    assert "| linclip Eq. 7 | forward | 2000 |" in summary
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["predicted_ms"]) == pytest.approx(milliseconds / 2, 1e-3)
    assert float(rows[0]["measured_over_predicted"]) == 2
    assert {row["predicted_ms"] for row in rows[1:]} == {""}
    assert {row["measured_over_predicted"] for row in rows[1:]} == {""}


@pytest.mark.long
def test_points_of_our_operator_are_predicted_on_known_gpus(monkeypatch: pytest.MonkeyPatch):
    found = SimpleNamespace(name="NVIDIA H200", multi_processor_count=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    speed = prediction.speed_of("cuda", 1e12)
    assert speed is not None
    assert (speed.capability, speed.num_sms) == (90, 100)
    assert speed.copy_bytes == pytest.approx(1e12)
    ours = Implementation("linclip Eq. 4", "linclip", torch.add)
    forward = point(ours, 197, 1.0)
    both = replace(forward, direction="forward+backward")
    skipped = replace(forward, measured=None)
    other = replace(forward, attention="SDPA flash")
    composed = replace(forward, attention="linclip Eq. 4, quadratic")
    times = prediction.predicted_seconds(
        [forward, both, skipped, other, composed], torch.bfloat16, speed
    )
    assert times.keys() == {forward, both}
    least = 4 * 4096 * 197 * 64 * 2 / 1e12  # 4096 heads on a GPU
    assert least < times[forward] < times[both]
    found.name = "Unknown"
    assert prediction.speed_of("cuda", 1e12) is None
    assert prediction.speed_of("cpu", 1e12) is None
    assert prediction.predicted_seconds([forward], torch.bfloat16, None) == {}


@pytest.mark.long
@pytest.mark.timeout(120)
def test_command_measures_and_writes(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert command(tmp_path, "--device", "cpu", "--tokens", 77, 15) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "summary.md").read_text().strip()
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    places = [(r["num_tokens"], r["work"], r["implementation"]) for r in rows]
    assert places == [
        (n, work, one.name)
        for causal in (False, True)
        for n in ("15", "77")
        for work in WORKS
        for one in Implementation.available("cpu")
        if one.causal == causal
    ]
    for r in rows:
        assert not r["skipped"]
        assert 0 < float(r["p20_ms"]) <= float(r["median_ms"]) <= float(r["p80_ms"])
        heads = int(r["batch"]) * int(r["num_heads"])
        assert float(r["us_per_head"]) == pytest.approx(1e3 * float(r["median_ms"]) / heads, 1e-3)
        tensors = {"forward": 4, "forward+backward": 11}[r["work"]]
        num_bytes = tensors * int(r["num_tokens"]) * heads * 64 * 4
        rate = 1e-6 * num_bytes / float(r["median_ms"])
        assert float(r["gb_per_s"]) == pytest.approx(rate, 1e-3)
        assert (r["dtype"], r["torch"]) == ("float32", version("torch"))
        assert float(r["peak_mib"]) > 0
        assert r["predicted_ms"] == r["measured_over_predicted"] == ""  # a CPU


@pytest.mark.long
def test_skipped_points_are_recorded_with_their_reason(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench_attention, "check_forms", lambda device, tokens: CHECKS)
    assert command(tmp_path, "--device", "cpu", "--tokens", 2**30, 2**40) == 0
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    for r in rows:
        assert not r["median_ms"]
        assert r["skipped"].startswith(("a call predicted to take", "a call predicted to fill"))
    reasons = {(r["implementation"], r["work"]): r["skipped"] for r in reversed(rows)}
    assert all(reason in (tmp_path / "summary.md").read_text() for reason in reasons.values())
    assert command(tmp_path, "--device", "cpu", "--tokens", 15, "--budget-seconds", 1e-9) == 0
    with (tmp_path / "results.csv").open() as file:
        assert {r["skipped"] for r in csv.DictReader(file)} == {"no time left of the budget"}


def test_nothing_is_timed_when_the_operator_is_wrong(
    command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    right = bench_attention.linear_attention

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **form: bool) -> torch.Tensor:
        return right(q, k, v, **form) * (1 + 1e-4)

    monkeypatch.setattr(bench_attention, "linear_attention", wrong)
    assert command(tmp_path, "--device", "cpu", "--tokens", 15) == 1
    output = capsys.readouterr()
    assert not output.out
    assert output.err.startswith("error: 40 of 40 checks failed: linclip Eq. 7, N = 15, o: ")
    assert output.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_failing_call_costs_no_other_result(
    command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    right = bench_attention.linear_attention

    def fails_when_long(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **form: bool):
        if q.shape[1] == 100 and form["causal"]:
            raise RuntimeError("no such kernel")
        return right(q, k, v, **form)

    monkeypatch.setattr(bench_attention, "check_forms", lambda device, tokens: CHECKS)
    monkeypatch.setattr(operators, "linear_attention", fails_when_long)
    assert command(tmp_path, "--device", "cpu", "--tokens", 15, 100) == 1
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    failed = [r for r in rows if r["skipped"]]
    assert {(r["num_tokens"], r["implementation"]) for r in failed} == {
        ("100", "linclip Eq. 7, causal"),
        ("100", "linclip Eq. 4, causal"),
    }
    assert {r["skipped"] for r in failed} == {"failed (no such kernel) at 100 tokens"}
    assert "error: linclip Eq. 7, causal, forward, N = 100: failed" in capsys.readouterr().err


def test_nan_does_not_pass():
    assert not Check("linclip Eq. 7", 77, "o", math.nan, 1e-6).passed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "device ('tpu') must be 'cpu' or 'cuda'"),
        (["--tokens"], "argument --tokens: expected at least one argument"),
        (["--tokens", 0, 77], "tokens (0) must be positive"),
        (["--threads", 0], "threads (0) must be positive"),
        (["--budget-seconds", 0], "budget-seconds (0.0) must be positive"),
        ([__file__], "must be a folder one can write to"),
    ],
)
def test_bad_arguments_give_one_line(
    arguments: list[object],
    message: str,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
):
    with pytest.raises(SystemExit) as stopped:
        command(*arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_context_report_takes_the_slowest_rank_and_the_median(tmp_path: Path):
    rows = [
        context_row(num_ranks, rank, repetition, seconds)
        for num_ranks, rank, times in ((1, 0, (8, 9, 7)), (2, 0, (3, 5, 4)), (2, 1, (4, 2, 9)))
        for repetition, seconds in enumerate(times)
    ]
    checks = [Check("2 ranks", 16, name, 1e-7, 1e-6) for name in ("o", "dq", "dk", "dv")]
    facts = FACTS | {"backend": "gloo"}
    report = ContextReport(facts, checks, rows)
    assert report.values("cpu_seconds", 1) == [8]
    assert report.values("cpu_seconds", 2) == [5]
    assert report.passed
    assert f"| {STATE_BYTES} |" in report.write(tmp_path)
    assert not ContextReport(facts, [Check("2 ranks", 16, "o", math.nan, 1e-6)], rows).passed
    more = context_row(2, 0, 0, 1, num_tokens=32, forward_bytes=STATE_BYTES + 4)
    assert not ContextReport(facts, checks, [*rows, more]).passed


def context_row(
    num_ranks: int,
    rank: int,
    repetition: int,
    seconds: float,
    *,
    num_tokens: int = 16,
    forward_bytes: int = STATE_BYTES,
) -> Row:
    return {
        "num_tokens": num_tokens,
        "num_ranks": num_ranks,
        "rank": rank,
        "repetition": repetition,
        "cpu_seconds": seconds,
        "wall_seconds": seconds,
        "forward_bytes": forward_bytes if num_ranks > 1 else 0,
        "backward_bytes": STATE_BYTES if num_ranks > 1 else 0,
        "peak_mib": 1.0,
    }


@pytest.mark.slow
@pytest.mark.distributed
def test_context_command_checks_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = ["bench_context.py", str(tmp_path), "--quick", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", arguments)
    assert importlib.import_module("benchmarks.context.bench_context").main() == 0
    with (tmp_path / "context.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + 2 + 4)  # lengths, ranks
    exchanged = {row["forward_bytes"] for row in rows if row["num_ranks"] != "1"}
    assert exchanged == {str(4 * 65 * 65 * 4)}
    assert (tmp_path / "context.png").read_bytes().startswith(b"\x89PNG")
