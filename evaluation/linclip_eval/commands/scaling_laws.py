"""Fit scaling laws of loss and zero-shot error over compute to finished runs."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from linclip_eval.commands import outputs
from linclip_eval.results import markdown_table
from linclip_eval.scaling_laws.figure import draw_scaling_laws
from linclip_eval.scaling_laws.power_law import Interval, ScalingLaw
from linclip_eval.scaling_laws.runs import (
    QUANTITIES,
    FinishedRun,
    Kind,
    LawComparison,
    Quantity,
    UnfinishedRun,
    check_comparable,
    compare_laws,
    fit_laws,
    read_run,
)

__all__ = ["main"]

Laws = Mapping[Quantity, Mapping[Kind, ScalingLaw]]

_RULES = """\
- Compute: three forwards (the backward counts two) of both towers for every sample seen, matrix
  products of the model's definition, linear attention with its own.
- Loss: training loss, mean over the logged steps of the last tenth. Error: 1 - top-1 after the last
  step. Earlier evaluations are not used: under a cosine schedule they are not those of a shorter
  run.
- Frontier: the lower envelope. Runs that differ only in their seed are one point, their mean; a
  point counts when no point with as much compute or less has a value as low.
- Law: E = beta C^alpha, least squares in the logarithms over the frontier. Intervals: 95 %
  percentiles of bootstrap resamples, of settings and of seeds within each, frontier included; few
  settings give rough ones."""


def main(arguments: Sequence[str]) -> None:
    """Run the command; errors in its input are ValueError or OSError."""
    parser = argparse.ArgumentParser(prog="linclip-eval scaling-laws", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN_FOLDER",
        help="a run folder, or a folder that holds only run folders",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--note", help="a sentence for the summary, on the limits of the runs")
    parser.add_argument(
        "--skip-unfinished",
        action="store_true",
        help="leave out, name and count runs that did not reach their last step or were not "
        "evaluated after it",
    )
    options = parser.parse_args(arguments)
    runs, skipped = _read(_run_folders(options.runs), skip_unfinished=options.skip_unfinished)
    check_comparable(runs)
    laws: Laws = {quantity: fit_laws(runs, quantity) for quantity in QUANTITIES}
    comparisons = {
        quantity: compare_laws(found["linear"], found["softmax"])
        for quantity, found in laws.items()
        if len(found) == 2
    }
    rows = [run.row() for run in runs]
    outputs.write_csv(options.out / "runs.csv", rows[0], (row.values() for row in rows))
    draw_scaling_laws(runs, laws).savefig(options.out / "figure.png")
    outputs.publish(
        options.out,
        command=("scaling-laws", *arguments),
        title="Scaling laws: softmax and linear attention",
        paragraphs=[
            _introduction(runs),
            f"Skipped, {len(skipped)} not finished:\n\n{outputs.bullets(skipped)}"
            if skipped
            else "",
            options.note or "",
            _verdicts(comparisons),
            "![Loss and zero-shot error over compute](figure.png)",
            _law_table(laws),
            _setting_table(runs),
            _RULES,
        ],
        numbers={
            "num_runs": len(runs),
            "skipped": skipped,
            "runs_made_with": _provenance(runs),
            "laws": [
                {"quantity": quantity, "attention": kind, **_law_numbers(law)}
                for quantity, found in laws.items()
                for kind, law in found.items()
            ],
            "comparisons": [
                {"quantity": quantity, "verdict": found.verdict, **vars(found)}
                for quantity, found in comparisons.items()
            ],
        },
        device=torch.device("cpu"),
    )


def _run_folders(given: Sequence[Path]) -> list[Path]:
    """Return the given folders; one that holds run folders is replaced by them."""
    folders: list[Path] = []
    for folder in given:
        is_run = not folder.is_dir() or (folder / "config.yaml").exists()
        inside = [] if is_run else sorted(path for path in folder.iterdir() if path.is_dir())
        holds_runs = any((path / "config.yaml").exists() for path in inside)
        folders += inside if holds_runs else [folder]
    return folders


def _read(folders: Sequence[Path], *, skip_unfinished: bool) -> tuple[list[FinishedRun], list[str]]:
    """Return the finished runs, and the reasons why the others are not finished."""
    runs, skipped = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UnfinishedRun as error:
            if not skip_unfinished:
                raise
            print(f"skipped: {error}", file=sys.stderr)
            skipped.append(str(error))
    if not runs:
        raise ValueError(f"runs (0 of {len(folders)} finished) must hold at least one finished run")
    return runs, skipped


def _provenance(runs: Sequence[FinishedRun]) -> dict[str, list[str]]:
    """Return every device, commit, version and world size that trained a run."""
    found: dict[str, set[str]] = {}
    for run in runs:
        found.setdefault("devices", set()).update(run.provenance.get("devices", {}))
        for name in ("git_commit", "torch", "deepspeed", "world_size"):
            found.setdefault(name, set()).add(str(run.provenance.get(name)))
    return {name: sorted(values) for name, values in found.items()}


def _law_numbers(law: ScalingLaw) -> dict[str, Any]:
    compute, value = law.frontier
    return {
        "alpha": law.alpha,
        "alpha_interval": law.alpha_interval,
        "log_beta": law.log_beta,
        "frontier": [
            {"compute": float(c), "value": float(v)} for c, v in zip(compute, value, strict=True)
        ],
        "num_resamples": len(law.resampled),
    }


def _introduction(runs: Sequence[FinishedRun]) -> str:
    config = runs[0].config
    trained_with = "; ".join(
        f"{name.replace('_', ' ')} {', '.join(values)}"
        for name, values in _provenance(runs).items()
    )
    return (
        f"{len(runs)} finished runs of {len({run.setting for run in runs})} settings on "
        f"{', '.join(f'`{source.shards}`' for source in config.data.train)}, global batch "
        f"{config.train.global_batch_size}, scored on `{config.eval.data}`. Trained with: "
        f"{trained_with}."
    )


def _verdicts(comparisons: Mapping[Quantity, LawComparison]) -> str:
    if not comparisons:
        return "Only one kind of attention: nothing is compared."
    lines = []
    for quantity, found in comparisons.items():
        low, high = found.alpha_interval
        line = (
            f"**{quantity.capitalize()}: {found.verdict}** between the exponents; linear minus "
            f"softmax {_with_interval(found.alpha_difference, found.alpha_interval, '+.3f')}."
        )
        if found.verdict == "no difference seen":
            line += f" This does not prove equality: {low:+.3f} and {high:+.3f} fit as well."
        if found.ratio is not None and found.ratio_interval is not None:
            line += (
                f" At {found.compute:.2g} FLOPs linear has "
                f"{_with_interval(found.ratio, found.ratio_interval, '.2f')} times the "
                f"{quantity} of softmax."
            )
        lines.append(line)
    return outputs.bullets(lines)


def _law_table(laws: Laws) -> str:
    rows = [
        (
            quantity,
            kind,
            law.frontier.shape[1],
            _with_interval(law.alpha, law.alpha_interval, ".3f"),
            f"exp({law.log_beta:.2f})",
        )
        for quantity, found in laws.items()
        for kind, law in found.items()
    ]
    header = ("quantity", "attention", "frontier points", "alpha (95 %)", "beta")
    return markdown_table(header, rows, align="llrrr")


def _setting_table(runs: Sequence[FinishedRun]) -> str:
    """Return a table of means over seeds, by attention and compute."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in sorted(runs, key=lambda run: (run.kind != "softmax", run.compute)):
        groups.setdefault(run.setting, []).append(run)
    rows = []
    for group in groups.values():
        run = group[0]
        values = (sum(each.value(q) for each in group) / len(group) for q in QUANTITIES)
        rows.append(
            (
                run.kind,
                f"{run.num_parameters / 1e6:.3g}",
                run.samples_seen,
                f"{run.compute:.3g}",
                len(group),
                *(f"{value:.3f}" for value in values),
            )
        )
    header = ("attention", "parameters, M", "samples seen", "FLOPs", "seeds", *QUANTITIES)
    return markdown_table(header, rows)


def _with_interval(value: float, interval: Interval, form: str) -> str:
    low, high = interval
    return f"{value:{form}} ({low:{form}} to {high:{form}})"
