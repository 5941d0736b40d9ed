"""``linclip-eval scaling-laws``: loss and zero-shot error over compute, from run folders.

Writes runs.csv, results.json, summary.md and figure.png.
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from linclip_eval.results import markdown_table, write_results
from linclip_eval.scaling_laws.figure import draw
from linclip_eval.scaling_laws.power_law import Interval, SaturatingLaw, ScalingLaw
from linclip_eval.scaling_laws.runs import (
    QUANTITIES,
    Comparison,
    FinishedRun,
    Kind,
    Quantity,
    UnfinishedRun,
    check_comparable,
    compare,
    fit_laws,
    read_run,
)

__all__ = ["main"]

Laws = Mapping[Quantity, Mapping[Kind, ScalingLaw]]

_RULES = """\
- Compute: three forwards (the backward counts two) of both towers for every sample seen, matrix
  products of the model's definition, linear attention with its own.
- Loss: of training, mean over the logged steps of the last tenth. Error: 1 - top-1 after the last
  step. Evaluations before the end are no points: under a cosine schedule they are not what a run of
  that length would have reached.
- Frontier: the lower envelope. Runs that differ in their seed alone are one point, their mean; a
  point counts when none with as much compute or less has a value as low.
- Law: E = beta C^alpha, least squares in the logarithms over the frontier. Intervals: 95 %
  percentiles of bootstrap resamples, of settings and of seeds within each, frontier included; few
  settings give rough ones.
- Floor: c of E = a C^-b + c; identifiable when its interval stays clear of 0."""


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ValueError: for runs that cannot be read, are not finished or do not belong together.
        OSError: for a file that cannot be written.
    """
    parser = argparse.ArgumentParser(prog="linclip-eval scaling-laws", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN_FOLDER",
        help="a run folder, or a folder of nothing but run folders",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--note", help="a sentence for the summary: what the runs do not show")
    parser.add_argument(
        "--skip-unfinished",
        action="store_true",
        help="leave out runs that did not reach their last step or were not scored after it; they "
        "are named and counted",
    )
    options = parser.parse_args(arguments)
    runs, skipped = _read(_run_folders(options.runs), skip_unfinished=options.skip_unfinished)
    check_comparable(runs)
    laws: Laws = {quantity: fit_laws(runs, quantity) for quantity in QUANTITIES}
    comparisons = {
        quantity: compare(found["linear"], found["softmax"])
        for quantity, found in laws.items()
        if len(found) == 2
    }
    options.out.mkdir(parents=True, exist_ok=True)
    _write_csv(options.out / "runs.csv", runs)
    draw(runs, laws).savefig(options.out / "figure.png")
    write_results(
        options.out,
        command=("scaling-laws", *arguments),
        title="Scaling laws: softmax and linear attention",
        body=_summary(runs, skipped, laws, comparisons, options.note),
        numbers={
            "num_runs": len(runs),
            "skipped": skipped,
            "runs_made_with": _made_with(runs),
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
    print((options.out / "summary.md").read_text(encoding="utf-8"))


def _run_folders(given: Sequence[Path]) -> list[Path]:
    """Every folder, or those in it where they are the runs."""
    folders: list[Path] = []
    for folder in given:
        is_run = not folder.is_dir() or (folder / "config.yaml").exists()
        inside = [] if is_run else sorted(path for path in folder.iterdir() if path.is_dir())
        holds_runs = any((path / "config.yaml").exists() for path in inside)
        folders += inside if holds_runs else [folder]
    return folders


def _read(folders: Sequence[Path], *, skip_unfinished: bool) -> tuple[list[FinishedRun], list[str]]:
    """The finished runs, and what is wrong with the others."""
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


def _write_csv(path: Path, runs: Sequence[FinishedRun]) -> None:
    rows = [run.row() for run in runs]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _made_with(runs: Sequence[FinishedRun]) -> dict[str, list[str]]:
    """Where and by what the runs were trained: every value that occurs."""
    found: dict[str, set[str]] = {}
    for run in runs:
        facts = run.facts
        found.setdefault("devices", set()).update(facts.get("devices", {}))
        for name in ("git_commit", "torch", "deepspeed", "world_size"):
            found.setdefault(name, set()).add(str(facts.get(name)))
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
        "saturating": None if law.saturating is None else vars(law.saturating),
    }


def _summary(
    runs: Sequence[FinishedRun],
    skipped: Sequence[str],
    laws: Laws,
    comparisons: Mapping[Quantity, Comparison],
    note: str | None,
) -> str:
    first = runs[0].config
    settings = {run.setting for run in runs}
    made = "; ".join(
        f"{name.replace('_', ' ')} {', '.join(each)}" for name, each in _made_with(runs).items()
    )
    parts = [
        f"{len(runs)} finished runs of {len(settings)} settings on "
        f"{', '.join(f'`{source.shards}`' for source in first.data.train)}, global batch "
        f"{first.train.global_batch_size}, scored on `{first.eval.data}`. Trained with: {made}.",
        note or "",
        "\n".join(_verdicts(comparisons)),
        "![Loss and zero-shot error over compute](figure.png)",
        _law_table(laws),
        _setting_table(runs),
        _RULES,
    ]
    if skipped:
        named = "\n".join(f"- {message}" for message in skipped)
        parts.insert(1, f"Skipped, {len(skipped)} not finished:\n\n{named}")
    return "\n\n".join(part for part in parts if part)


def _verdicts(comparisons: Mapping[Quantity, Comparison]) -> list[str]:
    if not comparisons:
        return ["Runs of one kind of attention alone: nothing is compared."]
    lines = []
    for quantity, found in comparisons.items():
        low, high = found.alpha_interval
        line = (
            f"- **{quantity.capitalize()}: {found.verdict}** between the exponents; linear minus "
            f"softmax {_with_interval(found.alpha_difference, found.alpha_interval, '+.3f')}."
        )
        if found.verdict == "no difference seen":
            line += f" That is no proof of equality: {low:+.3f} and {high:+.3f} fit as well."
        if found.ratio is not None and found.ratio_interval is not None:
            line += (
                f" At {found.compute:.2g} FLOPs linear has "
                f"{_with_interval(found.ratio, found.ratio_interval, '.2f')} times the "
                f"{quantity} of softmax."
            )
        lines.append(line)
    return lines


def _law_table(laws: Laws) -> str:
    rows = []
    for quantity, found in laws.items():
        for kind, law in found.items():
            rows.append(
                (
                    quantity,
                    kind,
                    law.frontier.shape[1],
                    _with_interval(law.alpha, law.alpha_interval, ".3f"),
                    f"exp({law.log_beta:.2f})",
                    _floor(law.saturating),
                )
            )
    header = ("quantity", "attention", "frontier points", "alpha (95 %)", "beta", "floor (95 %)")
    return markdown_table(header, rows, align="llrrrl")


def _setting_table(runs: Sequence[FinishedRun]) -> str:
    """Means over seeds, by attention and compute."""
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


def _floor(floor: SaturatingLaw | None) -> str:
    if floor is None:
        return "not identifiable: too few points"
    value = _with_interval(floor.floor, floor.floor_interval, ".3f")
    return value if floor.is_identifiable else f"not identifiable: {value}"


def _with_interval(value: float, interval: Interval, form: str) -> str:
    low, high = interval
    return f"{value:{form}} ({low:{form}} to {high:{form}})"
