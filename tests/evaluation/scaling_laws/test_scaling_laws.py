"""Scaling laws of run folders that follow known laws, and errors for invalid folders."""

import csv
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection

from ds_linclip.config import ATTENTION_KINDS, Config, SoftmaxAttention, load_config, save_config
from ds_linclip.model.flops import num_parameters, training_flops
from helpers import EMBEDDED
from linclip_eval.scaling_laws.figure import draw_scaling_laws
from linclip_eval.scaling_laws.runs import (
    QUANTITIES,
    FinishedRun,
    check_comparable,
    compare_laws,
    fit_laws,
    read_run,
)
from linclip_launch.cli import main

WIDTHS, STEPS = (32, 64, 128), (100, 400)
Law = Callable[[float], float]


def loss_law(compute: float, alpha: float = -0.1) -> float:
    return 3 * (compute / 1e12) ** alpha


def error_law(compute: float, alpha: float = -0.2) -> float:
    return 0.5 * (compute / 1e12) ** alpha


@cache
def base_config(*overrides: str) -> Config:
    """Load the config once: it takes longer than anything else here."""
    return load_config(EMBEDDED, overrides)


def write_run(
    folder: Path,
    kind: str,
    width: int,
    steps: int,
    seed: int,
    *overrides: str,
    loss: Law = loss_law,
    error: Law = error_law,
    noise: float = 0.0,
) -> Path:
    name = f"{kind}_{width}_{steps}_{seed}"
    config = deepcopy(base_config(*overrides))
    config.name, config.train.steps, config.train.seed = name, steps, seed
    for tower in (config.model.vision, config.model.text):
        tower.width = width
        if tower.attention.kind != kind:
            tower.attention = ATTENTION_KINDS[kind]()
    path = folder / name
    path.mkdir(parents=True)
    save_config(config, path / "config.yaml")
    (path / "starts.jsonl").write_text(json.dumps(start_of(config)) + "\n")
    generator = np.random.default_rng([seed, width, steps, kind == "linear"])
    factors = np.exp(noise * generator.normal(size=2))
    compute = training_flops(config)
    records: list[dict[str, Any]] = [
        # The first nine tenths must not enter the mean of the last tenth.
        {"step": step, "train/loss": 50.0 if step <= 0.9 * steps else factors[0] * loss(compute)}
        for step in range(10, steps + 1, 10)
    ]
    # Earlier accuracies are not used; a run that is restarted is evaluated again.
    top1 = 1 - factors[1] * error(compute)
    records += [{"step": step, "eval/zeroshot_top1": top1} for step in (steps, steps)]
    records.insert(1, {"step": 10, "eval/zeroshot_top1": 0.999})
    write_metrics(path, records)
    return path


def start_of(config: Config) -> dict[str, Any]:
    facts = {"git_commit": "abc123", "torch": "2.11.0", "deepspeed": "0.19.8", "world_size": 1}
    return {**facts, "devices": {"some chip": 1}, "config": asdict(config)}


def write_metrics(path: Path, records: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    (path / "metrics.jsonl").write_text(text)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def write_study(folder: Path, kinds: tuple[str, ...] = ("softmax", "linear"), **how: Any) -> None:
    for kind in kinds:
        for width in WIDTHS:
            for steps in STEPS:
                for seed in range(2):
                    write_run(folder, kind, width, steps, seed, **how)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Runs of both kinds of attention that follow one law, with noise."""
    folder = tmp_path_factory.mktemp("study")
    write_study(folder, noise=0.02)
    return folder


@pytest.fixture(scope="module")
def runs(study) -> list[FinishedRun]:
    return [read_run(path) for path in sorted(study.iterdir())]


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "one", "linear", 64, 100, 0)


def command(*arguments: object) -> int:
    return main(["eval", "scaling-laws", *map(str, arguments)])


def test_run_is_read(run):
    found = read_run(run)
    config = load_config(run / "config.yaml")
    assert found.kind == "linear"
    assert found.samples_seen == 100 * 128
    assert found.compute == training_flops(config)
    assert found.num_parameters == num_parameters(config.model, config.loss)
    assert found.loss == pytest.approx(loss_law(found.compute))
    assert found.value("zero-shot error") == pytest.approx(error_law(found.compute))
    assert found.provenance["git_commit"] == "abc123"


@pytest.mark.long
def test_law_is_recovered_within_its_interval(runs):
    for quantity, alpha in (("loss", -0.1), ("zero-shot error", -0.2)):
        for law in fit_laws(runs, quantity).values():
            low, high = law.alpha_interval
            assert low < alpha < high
            assert high - low < 0.1


def test_same_law_gives_no_difference(runs):
    laws = fit_laws(runs, "loss")
    found = compare_laws(laws["linear"], laws["softmax"])
    low, high = found.alpha_interval
    assert low < 0 < high
    assert found.verdict == "no difference seen"
    assert found.ratio_interval[0] < 1 < found.ratio_interval[1]


@pytest.mark.long
def test_other_exponent_and_level_are_told_apart(tmp_path):
    write_study(tmp_path, ("softmax",), noise=0.01)
    write_study(tmp_path, ("linear",), noise=0.01, loss=lambda c: 2 * loss_law(c, -0.3))
    laws = fit_laws([read_run(path) for path in sorted(tmp_path.iterdir())], "loss")
    found = compare_laws(laws["linear"], laws["softmax"])
    assert found.verdict == "differs"
    assert found.alpha_interval[0] < found.alpha_difference < found.alpha_interval[1] < 0
    assert found.alpha_difference == pytest.approx(-0.2, abs=0.03)
    expected = 2 * loss_law(found.compute, -0.3) / loss_law(found.compute)
    assert found.ratio == pytest.approx(expected, rel=0.05)


def test_levels_are_not_compared_without_shared_compute(tmp_path):
    steps = {"softmax": (100, 200, 300), "linear": (4000, 8000, 16000)}
    for kind, lengths in steps.items():
        for length in lengths:
            write_run(tmp_path, kind, 64, length, 0)
    laws = fit_laws([read_run(path) for path in sorted(tmp_path.iterdir())], "loss")
    found = compare_laws(laws["linear"], laws["softmax"])
    assert (found.compute, found.ratio, found.ratio_interval) == (None, None, None)


@pytest.mark.long
def test_command_writes_everything(study, runs, tmp_path, capsys):
    out = tmp_path / "out"
    folders = sorted(study.iterdir())
    assert command(study, "--out", out, "--note", "Digits are not photographs.") == 0
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["folder"] for row in rows] == [str(folder) for folder in folders]
    assert float(rows[0]["training_flops"]) == runs[0].compute
    assert float(rows[0]["loss"]) == runs[0].loss
    results = json.loads((out / "results.json").read_text())
    assert (results["num_runs"], results["skipped"]) == (24, [])
    assert results["runs_made_with"]["git_commit"] == ["abc123"]
    named = [(law["quantity"], law["attention"]) for law in results["laws"]]
    assert named == [(quantity, kind) for quantity in QUANTITIES for kind in ("softmax", "linear")]
    again = fit_laws(runs, "loss")["linear"]  # resampled with the same seed
    assert results["laws"][1]["alpha_interval"] == list(again.alpha_interval)
    assert {found["verdict"] for found in results["comparisons"]} == {"no difference seen"}
    summary = (out / "summary.md").read_text()
    assert summary.startswith("# Scaling laws")
    assert "**Loss: no difference seen** between the exponents" in summary
    assert "This does not prove equality" in summary
    assert "](figure.png)" in summary
    assert "\n\nDigits are not photographs.\n\n" in summary
    assert summary in capsys.readouterr().out
    assert (out / "figure.png").stat().st_size > 20_000


@pytest.mark.long
def test_one_kind_of_attention_is_fitted_and_not_compared(tmp_path):
    write_study(tmp_path / "runs", ("linear",))
    out = tmp_path / "out"
    assert command(tmp_path / "runs", "--out", out) == 0
    results = json.loads((out / "results.json").read_text())
    assert [law["attention"] for law in results["laws"]] == ["linear", "linear"]
    assert results["comparisons"] == []
    assert "nothing is compared" in (out / "summary.md").read_text()


def test_figure_has_a_dot_per_run_on_logarithmic_axes(runs):
    figure = draw_scaling_laws(
        runs, {quantity: fit_laws(runs, quantity) for quantity in QUANTITIES}
    )
    assert len(figure.axes) == 2
    for axes, quantity in zip(figure.axes, QUANTITIES, strict=True):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        dots = [each for each in axes.collections if isinstance(each, PathCollection)]
        places = sorted(tuple(map(float, dot.get_offsets()[0])) for dot in dots)
        assert places == sorted((run.compute, run.value(quantity)) for run in runs)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == ["softmax", "linear"]
    assert sum("M parameters" in label for label in labels) == len(WIDTHS)


@pytest.mark.long
def test_unfinished_runs_are_named_and_skipped_on_request(study, tmp_path, capsys):
    cut = write_run(tmp_path, "linear", 32, 800, 0)
    write_metrics(cut, [r for r in read_metrics(cut) if r["step"] <= 700])
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 710, "train/lo')  # torn by a kill
    blind = write_run(tmp_path, "linear", 32, 600, 0)
    write_metrics(blind, [r for r in read_metrics(blind) if "train/loss" in r])
    unborn = write_run(tmp_path, "linear", 32, 500, 0)
    (unborn / "metrics.jsonl").unlink()
    messages = {
        cut: f"{cut}: steps (700) must be all 800 of train.steps",
        blind: f"{blind}: eval/zeroshot_top1 must be logged for the last step (600)",
        unborn: f"{unborn}: steps (0) must be all 500 of train.steps",
    }
    finished = sorted(study.iterdir())
    for folder, message in messages.items():
        assert command(folder, *finished, "--out", tmp_path / "out") == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    out = tmp_path / "out"
    assert not out.exists()
    assert command(*finished, *messages, "--out", out, "--skip-unfinished") == 0
    assert json.loads((out / "results.json").read_text())["skipped"] == list(messages.values())
    assert "Skipped, 3 not finished" in (out / "summary.md").read_text()
    assert command(cut, blind, "--out", out, "--skip-unfinished") == 2
    assert "runs (0 of 2 finished) must hold at least one" in capsys.readouterr().err


def test_folder_of_runs_may_hold_nothing_else(run, tmp_path, capsys):
    stranger = run.parent / "stranger"
    stranger.mkdir()
    assert command(run.parent, "--out", tmp_path / "out") == 2
    assert f"config ({stranger / 'config.yaml'}) cannot be read" in capsys.readouterr().err


def without_config(run: Path) -> None:
    (run / "config.yaml").unlink()


def without_starts(run: Path) -> None:
    (run / "starts.jsonl").unlink()


def with_empty_starts(run: Path) -> None:
    (run / "starts.jsonl").write_text("")


def with_broken_metrics(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1}\n{not json}\n{"step": 2}\n')


def with_a_list_in_metrics(run: Path) -> None:
    (run / "metrics.jsonl").write_text("[1]\n")


def with_a_loss_that_is_not_finite(run: Path) -> None:
    records = read_metrics(run)
    next(r for r in records if r["step"] == 100)["train/loss"] = None
    write_metrics(run, records)


def resumed_with_more_steps(run: Path) -> None:
    earlier = start_of(load_config(run / "config.yaml", ["train.steps=60"]))
    starts = run / "starts.jsonl"
    starts.write_text(json.dumps(earlier) + "\n" + starts.read_text())


def with_trained_weights(run: Path) -> None:
    config = load_config(run / "config.yaml", ["init.pretrained=weights"])
    save_config(config, run / "config.yaml")


def with_towers_of_two_kinds(run: Path) -> None:
    config = load_config(run / "config.yaml")
    config.model.text.attention = SoftmaxAttention()
    save_config(config, run / "config.yaml")


@pytest.mark.long
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_config, "config .* cannot be read"),
        (without_starts, "starts.jsonl cannot be read"),
        (with_empty_starts, "starts.jsonl must hold at least one start"),
        (with_broken_metrics, "metrics.jsonl, line 2: must be JSON"),
        (with_a_list_in_metrics, r"metrics.jsonl, line 1 \(\[1\]\) must be a JSON object"),
        (with_a_loss_that_is_not_finite, "at the end must be finite: it diverged"),
        (resumed_with_more_steps, "train.steps must be the same at every start"),
        (with_trained_weights, r"init.pretrained\* must be unset"),
        (with_towers_of_two_kinds, "model.text.attention .* must be model.vision.attention"),
    ],
)
def test_invalid_run_folder_is_always_an_error(run, spoil, message, tmp_path, capsys):
    spoil(run)
    assert command(run, "--out", tmp_path / "out", "--skip-unfinished") == 2
    captured = capsys.readouterr()
    assert str(run) in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        read_run(run)


@pytest.mark.long
@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("data.train=['other/{00..07}.tar']", "data.train"),
        ("train.global_batch_size=64", "train.global_batch_size"),
        ("train.precision=bf16", "train.precision"),
        ("loss.kind=sigmoid", "loss.kind"),
        ("eval.data=other", "eval.data"),
        ("optim.kind=lamb", "optim.kind"),
    ],
)
def test_mixed_protocols_are_refused(run, tmp_path, override, name):
    other = write_run(tmp_path / "other", "linear", 64, 200, 0, override)
    message = rf"{name} \(.*\) of {other} must be that of {run}"
    with pytest.raises(ValueError, match=message):
        check_comparable([read_run(run), read_run(other)])


def test_learning_rate_may_differ(run, tmp_path):
    other = write_run(tmp_path / "other", "linear", 64, 100, 0, "optim.lr=1e-3")
    check_comparable([read_run(run), read_run(other)])


def test_linear_runs_of_two_variants_are_refused(run, tmp_path):
    forms = [f"model.{tower}.attention.normalized=true" for tower in ("vision", "text")]
    other = write_run(tmp_path / "other", "linear", 64, 200, 0, *forms)
    with pytest.raises(ValueError, match=f"attention of {other} must be the variant of"):
        check_comparable([read_run(run), read_run(other)])


def test_repeated_run_is_refused(run, tmp_path, capsys):
    assert command(run, run, "--out", tmp_path / "out") == 2
    assert f"{run} must be given once: it is the run of {run}" in capsys.readouterr().err
    copy = write_run(tmp_path / "copy", "linear", 64, 100, 0)
    with pytest.raises(ValueError, match=f"{copy} must be given once: it is the run of {run}"):
        check_comparable([read_run(run), read_run(copy)])


def test_too_few_points_are_refused(tmp_path, capsys):
    folders = [write_run(tmp_path, "linear", 64, 100 * n, 0) for n in (1, 2)]
    assert command(*folders, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "loss of linear runs: points on the frontier (2 of 2) must be at least 3" in error


def test_perfect_accuracy_is_refused(tmp_path, capsys):
    folders = [write_run(tmp_path, "linear", 64, 100 * n, 0) for n in (1, 2, 3)]
    folders.append(write_run(tmp_path, "linear", 64, 400, 0, error=lambda compute: 0.0))
    assert command(*folders, "--out", tmp_path / "out") == 2
    assert "zero-shot error of linear runs: value (0.0) must be positive" in capsys.readouterr().err
