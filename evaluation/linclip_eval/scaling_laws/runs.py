"""Scaling laws from run folders: finished runs as points, a law for each kind of attention.

A run is one point: its compute, its final training loss and its zero-shot error after the last
step. Earlier evaluations are not used: under a cosine schedule, the weights before the end are not
those of a shorter run.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ds_linclip.config import Config, load_config
from ds_linclip.model.flops import forward_flops, num_parameters, training_flops
from linclip_eval.scaling_laws.power_law import (
    Interval,
    RunPoint,
    ScalingLaw,
    fit_scaling_law,
    percentile_interval,
)

__all__ = [
    "QUANTITIES",
    "FinishedRun",
    "LawComparison",
    "UnfinishedRun",
    "check_comparable",
    "compare_laws",
    "fit_laws",
    "read_run",
]

Kind = Literal["softmax", "linear"]
Quantity = Literal["loss", "zero-shot error"]
QUANTITIES: tuple[Quantity, ...] = ("loss", "zero-shot error")

#: Config keys that all runs of a study must share. Sizes, lengths, seeds and the learning rate may
#: differ.
_PROTOCOL = (
    *("data.train", "data.sampling", "data.crop_scale"),
    *("eval.data", "eval.classes", "eval.names", "eval.templates"),
    *("train.global_batch_size", "train.precision", "loss.kind"),
    *("optim.kind", "optim.weight_decay", "optim.ema_decay"),
)
#: Config keys that must be the same at every start of a run.
_FIXED = ("model", "init", "data.train", "train.steps", "train.global_batch_size", "loss", "optim")
_TOP1 = "eval/zeroshot_top1"


class UnfinishedRun(ValueError):
    """A run that did not reach its last step or was not evaluated after it."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished run, read from its folder.

    Attributes:
        folder: The run folder.
        config: The configuration of its latest start.
        loss: The training loss, mean over the logged steps of the last tenth.
        top1: Zero-shot accuracy after the last step, in [0, 1].
        provenance: Commit, versions and devices of its latest start.
    """

    folder: Path
    config: Config
    loss: float
    top1: float
    provenance: dict[str, Any]

    @property
    def kind(self) -> Kind:
        """The kind of attention of both towers."""
        return "softmax" if self.config.model.vision.attention_text == "softmax" else "linear"

    @property
    def compute(self) -> float:
        """The floating-point operations of the whole training."""
        return training_flops(self.config)

    @property
    def num_parameters(self) -> int:
        """The number of parameters of the model."""
        return num_parameters(self.config.model, self.config.loss)

    @property
    def samples_seen(self) -> int:
        """The number of samples of all steps."""
        return self.config.train.steps * self.config.train.global_batch_size

    @property
    def setting(self) -> str:
        """A text that is the same for runs that differ only in their seed."""
        config = self.config
        return repr((config.model, config.train.steps, config.optim, config.data.resolutions))

    def value(self, quantity: Quantity) -> float:
        """Return the final loss or zero-shot error."""
        return self.loss if quantity == "loss" else 1 - self.top1

    def row(self) -> dict[str, Any]:
        """Return the run as a line of ``runs.csv``."""
        config = self.config
        vision, text = config.model.vision, config.model.text
        return {
            "folder": str(self.folder),
            "attention": self.kind,
            "parameters": self.num_parameters,
            "image_width": vision.width,
            "image_layers": vision.layers,
            "text_width": text.width,
            "text_layers": text.layers,
            "forward_flops_per_sample": forward_flops(config.model, vision.image_size),
            "steps": config.train.steps,
            "global_batch_size": config.train.global_batch_size,
            "samples_seen": self.samples_seen,
            "training_flops": self.compute,
            "lr": config.optim.lr,
            "seed": config.train.seed,
            "loss": self.loss,
            "zero_shot_top1": self.top1,
            "zero_shot_error": self.value("zero-shot error"),
        }


@dataclass(frozen=True, kw_only=True)
class LawComparison:
    """The law of linear attention against that of softmax, over independent resamples of both.

    Attributes:
        alpha_difference: The exponent of linear minus that of softmax.
        alpha_interval: The interval of that difference.
        compute: The compute at which levels are compared: the geometric middle of the range that
            both frontiers cover; None when they share no range.
        ratio: The value of linear over that of softmax at that compute.
        ratio_interval: The interval of that ratio.
    """

    alpha_difference: float
    alpha_interval: Interval
    compute: float | None
    ratio: float | None
    ratio_interval: Interval | None

    @property
    def verdict(self) -> str:
        """Whether the interval of the difference of exponents excludes zero, in words."""
        low, high = self.alpha_interval
        return "no difference seen" if low <= 0 <= high else "differs"


def read_run(folder: Path) -> FinishedRun:
    """Read ``config.yaml``, ``metrics.jsonl`` and ``starts.jsonl`` of a run folder.

    Raises:
        UnfinishedRun: when there are fewer steps than ``train.steps``, or no evaluation at the end.
        ValueError: when the folder cannot be read, or the run cannot be a point: it was resumed
            with other settings, started from trained weights, diverged, or its towers differ in
            attention.
    """
    config = load_config(folder / "config.yaml")
    starts = _records(folder / "starts.jsonl")
    if not starts:
        raise ValueError(f"{folder / 'starts.jsonl'} must hold at least one start")
    _check_starts(folder, starts)
    pretrained = (config.init.pretrained, config.init.pretrained_image, config.init.pretrained_text)
    if any(source is not None for source in pretrained):
        raise ValueError(
            f"{folder}: init.pretrained* must be unset: the compute behind trained weights is "
            "unknown"
        )
    metrics = folder / "metrics.jsonl"
    records = _records(metrics) if metrics.exists() else []
    losses = {r["step"]: r["train/loss"] for r in records if "train/loss" in r}
    last_step, steps = max(losses, default=0), config.train.steps
    if last_step < steps:
        raise UnfinishedRun(f"{folder}: steps ({last_step}) must be all {steps} of train.steps")
    scores = [r[_TOP1] for r in records if r["step"] == steps and _TOP1 in r]
    if not scores:
        raise UnfinishedRun(f"{folder}: {_TOP1} must be logged for the last step ({steps})")
    final = [loss for step, loss in losses.items() if step > 0.9 * steps]
    if any(value is None or not math.isfinite(value) for value in (*final, scores[-1])):
        raise ValueError(f"{folder}: loss and {_TOP1} at the end must be finite: it diverged")
    image, text = config.model.vision.attention_text, config.model.text.attention_text
    if image != text:
        raise ValueError(
            f"{folder}: model.text.attention ({text}) must be model.vision.attention ({image})"
        )
    return FinishedRun(
        folder=folder,
        config=config,
        loss=statistics.fmean(final),
        top1=scores[-1],
        provenance=starts[-1],
    )


def check_comparable(runs: Sequence[FinishedRun]) -> None:
    """Check that the runs can be points of one study.

    Raises:
        ValueError: naming two runs that differ in data, batch or protocol, that have different
            variants of linear attention, or that are the same run.
    """
    seen: dict[tuple[str, int], FinishedRun] = {}
    variants: dict[Kind, FinishedRun] = {}
    first = runs[0]
    for run in runs:
        for name in _PROTOCOL:
            mine, others = attrgetter(name)(run.config), attrgetter(name)(first.config)
            if mine != others:
                raise ValueError(
                    f"{name} ({mine}) of {run.folder} must be that of {first.folder} ({others})"
                )
        like = variants.setdefault(run.kind, run)
        if run.config.model.vision.attention_text != like.config.model.vision.attention_text:
            raise ValueError(
                f"attention of {run.folder} must be the variant of {like.folder}: "
                "one law is fitted to runs of one variant"
            )
        key = run.setting, run.config.train.seed
        if key in seen:
            raise ValueError(
                f"{run.folder} must be given once: it is the run of {seen[key].folder}, with "
                "the same settings and seed"
            )
        seen[key] = run


def fit_laws(runs: Sequence[FinishedRun], quantity: Quantity) -> dict[Kind, ScalingLaw]:
    """Fit a law for every kind of attention among the runs, softmax first.

    Raises:
        ValueError: naming kind and quantity, when :func:`fit_scaling_law` fails.
    """
    laws: dict[Kind, ScalingLaw] = {}
    kinds: tuple[Kind, ...] = ("softmax", "linear")
    for index, kind in enumerate(kinds):
        points = [
            RunPoint(setting=run.setting, compute=run.compute, value=run.value(quantity))
            for run in runs
            if run.kind == kind
        ]
        if not points:
            continue
        try:
            # Different seeds make the resamples, which compare_laws pairs, independent.
            laws[kind] = fit_scaling_law(points, seed=index)
        except ValueError as error:
            raise ValueError(f"{quantity} of {kind} runs: {error}") from error
    return laws


def compare_laws(linear: ScalingLaw, softmax: ScalingLaw) -> LawComparison:
    """Compare the exponents of two laws, and their levels where both have runs."""
    count = min(len(linear.resampled), len(softmax.resampled))
    difference = linear.resampled[:count] - softmax.resampled[:count]  # [R, (alpha, log_beta)]
    start = max(float(law.frontier[0, 0]) for law in (linear, softmax))
    end = min(float(law.frontier[0, -1]) for law in (linear, softmax))
    compute = ratio = ratio_interval = None
    if start <= end:
        compute = math.sqrt(start * end)
        where = np.array([compute])
        ratio = float((linear.at(where) / softmax.at(where))[0])
        ratio_interval = percentile_interval(
            np.exp(difference[:, 0] * math.log(compute) + difference[:, 1])
        )
    return LawComparison(
        alpha_difference=linear.alpha - softmax.alpha,
        alpha_interval=percentile_interval(difference[:, 0]),
        compute=compute,
        ratio=ratio,
        ratio_interval=ratio_interval,
    )


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, one per line; a torn last line is skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: must be JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} ({line.strip()}) must be a JSON object")
        records.append(record)
    return records


def _check_starts(folder: Path, starts: Sequence[dict[str, Any]]) -> None:
    """Check that a run was never resumed with other settings, such as another length."""
    for name in _FIXED:
        values = [reduce(_entry, name.split("."), start.get("config")) for start in starts]
        if any(value != values[-1] for value in values):
            raise ValueError(f"{folder}: {name} must be the same at every start of the run")


def _entry(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, dict) else None
