"""The benchmark of training data: its arithmetic by hand, and the command itself on few images."""

import csv
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

SMALL = ["--repetitions", 1, "--batch-size", 5, "--batches-per-shard", 5]


@pytest.fixture
def bench() -> ModuleType:
    """The script as a module."""
    return importlib.import_module("benchmarks.data.bench_data")


@pytest.fixture
def command(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the benchmark on 100 images."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["bench_data.py", *map(str, [*SMALL, *arguments])])
        return bench.main()

    return run


@pytest.fixture
def row(bench: ModuleType) -> Callable[..., object]:
    def make(case: str, loader: str, repetition: int, rate: float, skipped: int = 0) -> object:
        """A measurement of ``rate`` samples per second, and half of it per CPU-second."""
        return {
            "case": case,
            "repetition": repetition,
            "bytes_per_image": 30_000,
            "loader": loader,
            "skipped": skipped,
            "samples_per_second": rate,
            "samples_per_cpu_second": rate / 2,
        }

    return make


def test_requirements_by_hand(bench: ModuleType, row: Callable[..., object]):
    ours, theirs, dirty = (400, 600, 500), (200, 200, 300), (450, 450, 440)
    rows = [row(bench.CLEAN, "ds_linclip", i, rate) for i, rate in enumerate(ours)]
    rows += [row(bench.CLEAN, "open_clip", i, rate) for i, rate in enumerate(theirs)]
    rows += [row(bench.DIRTY, "ds_linclip", i, rate, skipped=5) for i, rate in enumerate(dirty)]
    wall, cpu, loss, cpu_loss, skipped = bench.check_requirements(rows, 5)
    for ratio in (wall, cpu):
        assert ratio.found == "2.50x (1.67 ... 3.00)"
        assert ratio.passed
    for share in (loss, cpu_loss):
        assert share.found == "10.0% (-12.5% ... 25.0%)"
        assert share.passed
    assert skipped.found == "5 in each of 3 runs; 0 where none is"
    assert skipped.passed
    assert not bench.check_requirements(rows, 6)[-1].passed
    extra = row(bench.CLEAN, "ds_linclip", 3, 1000, skipped=1)
    verdicts = bench.check_requirements(
        [*rows, extra, row(bench.DIRTY, "ds_linclip", 3, 1, skipped=5)], 5
    )
    assert [verdict.passed for verdict in verdicts] == [True, True, False, False, False]


def test_waiting_share_leaves_out_the_first_interval(bench: ModuleType):
    values = [(9.0, 10.0), (1.0, 10.0), (0.0, 30.0)]
    metrics = [{"perf/data_seconds_per_step": w, "perf/seconds_per_step": s} for w, s in values]
    assert bench.waiting_share([*metrics, {"eval/zeroshot_top1": 0.5}]) == pytest.approx(1 / 40)


def test_shards_hold_photos_and_the_promised_number_of_bad_ones(bench: ModuleType, tmp_path: Path):
    sets = bench.write_shards(tmp_path, 40)
    assert [sets[name].num_bad for name in ("clean", "dirty", "large")] == [0, 8, 0]
    assert [sets[name].num_samples for name in ("clean", "dirty", "large")] == [160, 160, 40]
    assert 25_000 < sets["clean"].bytes_per_image < 35_000
    share = sets["dirty"].bytes_per_image / sets["clean"].bytes_per_image
    assert share == pytest.approx(1 - 0.05 / 2, abs=0.01)


@pytest.mark.long
@pytest.mark.timeout(120)
def test_command_measures_counts_and_writes(
    bench: ModuleType,
    command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    loaders = importlib.import_module("benchmarks.data.loaders")
    threads = torch.get_num_threads()
    # A process for each measurement would import torch each time.
    monkeypatch.setattr(bench, "measure_apart", lambda settings, _: loaders.measure(**settings))
    code = command(tmp_path / "out", "--without-open-clip", "--training-steps", 0)
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert code in (0, 1)  # by how fast this machine is just now
    assert printed.strip() == (tmp_path / "out" / "summary.md").read_text().strip()
    assert "5 in each of 1 runs; 0 where none is" in printed
    assert (tmp_path / "out" / "data.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "out" / "data.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [bench.CLEAN, bench.DIRTY, bench.LARGE, bench.SMALL]
    assert [row["skipped"] for row in rows] == ["0", "5", "0", "0"]
    for row in rows:
        assert int(row["samples"]) == int(row["num_samples"])
        rate = int(row["samples"]) / float(row["wall_seconds"])
        assert float(row["samples_per_second"]) == pytest.approx(rate, rel=1e-3)
        assert float(row["samples_per_cpu_second"]) > 0
        assert row["torch"] == torch.__version__.partition("+")[0]


def test_a_failing_measurement_is_reported_in_one_line(
    bench: ModuleType,
    command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "loaders.py").write_text("raise SystemExit('error: no such loader')")
    monkeypatch.setattr(bench, "LOADERS_SCRIPT", tmp_path / "loaders.py")
    assert command(tmp_path / "out", "--without-open-clip") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: no such loader"
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["workers", "repetitions", "batch-size"])
def test_bad_arguments_are_named(
    name: str, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        command(f"--{name}", 0)
    assert stopped.value.code == 2
    assert f"{name} (0) must be positive" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_both_loaders_and_the_embedded_run(
    bench: ModuleType, command: Callable[..., int], tmp_path: Path
):
    assert command(tmp_path, "--training-steps", 20) in (0, 1)
    with (tmp_path / "data.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["loader"] for row in rows} == {"ds_linclip", "open_clip"}
    assert {row["webdataset"] for row in rows if row["loader"] == "open_clip"} == {"0.2.86"}
    assert "spent waiting for data" in (tmp_path / "summary.md").read_text()
