"""Fit scaling laws of loss and zero-shot error over compute to finished runs."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch

from linclip_eval.commands import outputs
from linclip_eval.results import markdown_table
from linclip_eval.scaling_laws.figure import draw_scaling_laws
from linclip_eval.scaling_laws.power_law import Interval
from linclip_eval.scaling_laws.runs import (
    QUANTITIES,
    FinishedRun,
    LawComparison,
    Quantity,
    UnfinishedRun,
    check_comparable,
    compare_laws,
    fit_laws,
    read_run,
)

__all__ = ["run"]

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


def run(options: argparse.Namespace) -> None:
    """Run the command; errors in its input are ValueError or OSError."""
    runs, skipped = _read(_run_folders(options.runs), skip_unfinished=options.skip_unfinished)
    check_comparable(runs)
    laws = {quantity: fit_laws(runs, quantity) for quantity in QUANTITIES}
    named = [(quantity, *pair) for quantity in QUANTITIES for pair in laws[quantity].items()]
    comparisons = {
        quantity: compare_laws(found["linear"], found["softmax"])
        for quantity, found in laws.items()
        if len(found) == 2
    }
    provenance = _provenance(runs)
    unfinished = f"Skipped, {len(skipped)} not finished:\n\n{outputs.bullets(skipped)}"
    outputs.publish(
        options.out,
        options.words,
        torch.device("cpu"),
        title="Scaling laws: softmax and linear attention",
        sections=[
            _introduction(runs, provenance),
            unfinished if skipped else "",
            options.note,
            _verdicts(comparisons),
            "![Loss and zero-shot error over compute](figure.png)",
            markdown_table(
                ("quantity", "attention", "frontier points", "alpha (95 %)", "beta"),
                [
                    (
                        *(quantity, kind, law.frontier.shape[1]),
                        _with_interval(law.alpha, law.alpha_interval, ".3f"),
                        f"exp({law.log_beta:.2f})",
                    )
                    for quantity, kind, law in named
                ],
                align="llrrr",
            ),
            _setting_table(runs),
            _RULES,
        ],
        tables={"runs.csv": [run.row() for run in runs]},
        figures={"figure.png": draw_scaling_laws(runs, laws)},
        numbers={
            "num_runs": len(runs),
            "skipped": skipped,
            "runs_made_with": provenance,
            "laws": [
                {
                    "quantity": quantity,
                    "attention": kind,
                    "alpha": law.alpha,
                    "alpha_interval": law.alpha_interval,
                    "log_beta": law.log_beta,
                    "frontier": [
                        {"compute": compute, "value": value}
                        for compute, value in law.frontier.T.tolist()
                    ],
                    "num_resamples": len(law.resampled),
                }
                for quantity, kind, law in named
            ],
            "comparisons": [
                {"quantity": quantity, "verdict": found.verdict, **vars(found)}
                for quantity, found in comparisons.items()
            ],
        },
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
    starts = [run.provenance for run in runs]
    found = {"devices": {device for start in starts for device in start.get("devices", {})}}
    for name in ("git_commit", "torch", "deepspeed", "world_size"):
        found[name] = {str(start.get(name)) for start in starts}
    return {name: sorted(values) for name, values in found.items()}


def _introduction(runs: Sequence[FinishedRun], provenance: Mapping[str, Sequence[str]]) -> str:
    config = runs[0].config
    words = [f"{name.replace('_', ' ')} {', '.join(found)}" for name, found in provenance.items()]
    return (
        f"{len(runs)} finished runs of {len({run.setting for run in runs})} settings on "
        f"{', '.join(f'`{source.shards}`' for source in config.data.train)}, global batch "
        f"{config.train.global_batch_size}, scored on `{config.eval.data}`. Trained with: "
        f"{'; '.join(words)}."
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


def _setting_table(runs: Sequence[FinishedRun]) -> str:
    """Return a table of means over seeds, by attention and compute."""
    groups: dict[str, list[FinishedRun]] = {}
    for run in sorted(runs, key=lambda run: (run.kind != "softmax", run.compute)):
        groups.setdefault(run.setting, []).append(run)
    rows = [
        (
            group[0].kind,
            f"{group[0].num_parameters / 1e6:.3g}",
            group[0].samples_seen,
            f"{group[0].compute:.3g}",
            len(group),
            *(f"{fmean(run.value(quantity) for run in group):.3f}" for quantity in QUANTITIES),
        )
        for group in groups.values()
    ]
    header = ("attention", "parameters, M", "samples seen", "FLOPs", "seeds", *QUANTITIES)
    return markdown_table(header, rows)


def _with_interval(value: float, interval: Interval, form: str) -> str:
    low, high = interval
    return f"{value:{form}} ({low:{form}} to {high:{form}})"
