"""Report of bench_attention.py: comparisons, tables and a picture."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.attention.operators import HEAD_DIM, Implementation, batch_and_heads
from benchmarks.correctness import Check, correctness_table
from ds_linclip.process.number_text import format_figure
from linclip_eval.results import markdown_table, write_report
from linclip_eval.runtime.figure import draw_times
from linclip_eval.runtime.fit import CallCost, RuntimePoint, Scaling
from linclip_eval.runtime.report import comparison_sections, tables_by_tokens

__all__ = ["AttentionReport"]

#: Slopes are fitted from this number of tokens on.
FIT_FROM = 1025
#: Minimum traffic in tensors of B * N * H * D elements: q, k, v -> o, and in the backward
#: q, do -> dq and k, v -> dk, dv.
TENSORS = {"forward": 4, "forward+backward": 4 + 7}


#: Columns of what was measured at a point.
COSTS = (
    *("median_ms", "p20_ms", "p80_ms", "calls", "us_per_head"),
    *("peak_mib", "gb_per_s", "copy_share"),
)
#: The model's time of our operator on a GPU, and the measured time over it.
PREDICTIONS = ("predicted_ms", "measured_over_predicted")


@dataclass(frozen=True)
class AttentionReport:
    """The points of one run, and the checks before it.

    Attributes:
        device, dtype: "cuda" or "cpu", and the type of the inputs.
        implementations: Everything that was measured.
        copy_bandwidth: Bytes that a copy reads and writes per second.
        predicted: Seconds that the model of the kernels predicts, of the points that it knows.
    """

    device: str
    dtype: torch.dtype
    implementations: Sequence[Implementation]
    copy_bandwidth: float
    checks: Sequence[Check]
    points: Sequence[RuntimePoint]
    predicted: Mapping[RuntimePoint, float] = field(default_factory=dict)

    def write(self, folder: Path, facts: dict[str, str]) -> str:
        """Write results.csv, figure.png and summary.md, whose text is returned."""
        sdpa = [one.name for one in self.implementations if one.family == "sdpa"]
        scaling = Scaling(map(self._per_head, self.points), softmax=sdpa, fit_from=FIT_FROM)

        def time(what: str, work: str, num_tokens: int, cost: CallCost) -> str:
            return format_figure(1e6 * cost.seconds)

        def share(what: str, work: str, num_tokens: int, cost: CallCost) -> str:
            return f"{self._traffic(work, num_tokens) / cost.seconds / self.copy_bandwidth:.1%}"

        return write_report(
            folder,
            title="Linear attention and SDPA",
            sections=[
                "Time of one head, B and H being what gives enough work at every number of "
                "tokens. Times are medians; a range is that of the quantiles 0.2 and 0.8. The "
                "implementations are called in turn. On a GPU calls under 5 ms are replayed from "
                "a CUDA graph, longer ones have the L2 cache cleared before each.",
                "![Time over the number of tokens](figure.png)",
                "## Correctness",
                "Relative RMS against the float64 definition: the worst of all lengths, of output "
                "and gradients.",
                correctness_table(self.checks),
                *comparison_sections(scaling, f"the numbers of tokens from {FIT_FROM} on"),
                "## Time per head, us",
                *tables_by_tokens(scaling, time),
                "## Share of the copy bandwidth",
                "Minimum traffic (4 tensors forward, 11 forward and backward) over time.",
                *tables_by_tokens(scaling, share),
                *self._predictions(),
            ],
            facts=facts,
            tables={"results.csv": [self._row(point) for point in self.points]},
            table_facts=("device", "torch", "triton", "date_utc", "commit", "dtype"),
            figures={"figure.png": draw_times(scaling, of="one head")},
        )

    def _per_head(self, point: RuntimePoint) -> RuntimePoint:
        cost = point.measured
        if cost is None:
            return point
        batch, heads = batch_and_heads(self.device, point.num_tokens)
        times = {name: getattr(cost, name) / (batch * heads) for name in ("seconds", "low", "high")}
        return replace(point, measured=replace(cost, **times))

    def _predictions(self) -> Iterator[str]:
        """Yield the section of measured and predicted times, if there are predictions."""
        if not self.predicted:
            return
        yield "## Predicted time"
        yield "Of a whole call, from counts of the machine code; the model is uncalibrated."
        rows = []
        for point, seconds in self.predicted.items():
            assert point.measured is not None
            times = 1e3 * seconds, 1e3 * point.measured.seconds, point.measured.seconds / seconds
            place = point.attention, point.direction, point.num_tokens
            rows.append([*place, *map(format_figure, times)])
        header = ["", "work", "N", "predicted, ms", "measured, ms", "measured / predicted"]
        yield markdown_table(header, rows)

    def _traffic(self, work: str, num_tokens: int) -> int:
        """Return the fewest bytes that one head must read and write."""
        return TENSORS[work] * num_tokens * HEAD_DIM * self.dtype.itemsize

    def _row(self, point: RuntimePoint) -> dict[str, object]:
        (one,) = (each for each in self.implementations if each.name == point.attention)
        batch, heads = batch_and_heads(self.device, point.num_tokens)
        measured: dict[str, object] = dict.fromkeys(COSTS)
        if (cost := point.measured) is not None:
            per_head = cost.seconds / (batch * heads)
            rate = self._traffic(point.direction, point.num_tokens) / per_head
            values = (
                *(1e3 * cost.seconds, 1e3 * cost.low, 1e3 * cost.high, cost.runs, 1e6 * per_head),
                *(cost.peak_bytes / 2**20, 1e-9 * rate, rate / self.copy_bandwidth),
            )
            measured = dict(zip(COSTS, values, strict=True))
        prediction: dict[str, object] = dict.fromkeys(PREDICTIONS)
        if cost is not None and (seconds := self.predicted.get(point)):
            prediction = dict(
                zip(PREDICTIONS, (1e3 * seconds, cost.seconds / seconds), strict=True)
            )
        return {
            "implementation": one.name,
            "family": one.family,
            "causal": one.causal,
            "work": point.direction,
            "num_tokens": point.num_tokens,
            "batch": batch,
            "num_heads": heads,
            "head_dim": HEAD_DIM,
            **measured,
            **prediction,
            "skipped": point.skipped,
        }
