"""Report of bench_context.py: checks, tables and a picture."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.correctness import Check, correctness_table
from linclip_eval.plotting import COLOURS, add_legend, dress, new_figure, set_token_axis
from linclip_eval.results import markdown_table, write_report

__all__ = ["CHECK_TOKENS", "HEADS", "HEAD_DIM", "STATE_BYTES", "ContextReport", "Row"]

#: A line of context.csv: one call on one rank.
Row = dict[str, Any]
#: Few, so that 262144 tokens in one process leave room on a machine of 16 GiB.
HEADS, HEAD_DIM = 4, 64
#: A state is [H, D + 1, D + 1] in float32, whatever the number of tokens.
STATE_BYTES = HEADS * (HEAD_DIM + 1) ** 2 * 4
#: Tokens of the correctness check; not divisible by the ranks.
CHECK_TOKENS = 4099
NOTES = """\
- A layer here is bidirectional linear attention, Eq. 4, of {heads} heads of {dim}, one image,
  without the projections around it: those work token by token and exchange nothing.
- Bytes are those of the tensors handed to collectives; a backend may send more or less of them.
- Every figure is that of the slowest rank, or the one with most memory, and the median over
  repetitions; all points are measured once per repetition, in turn.
- CPU seconds are user and system time of a rank's process with one thread for torch. Peak memory is
  what the call adds to the inputs: resident set, or torch.cuda.max_memory_allocated.
- On a CPU all ranks share the machine's {cores} cores with whatever else runs (see the load), so
  that wall time says nothing about machines with more: compare CPU seconds."""


class ContextReport:
    """Rows and checks of one run.

    Args:
        facts: Conditions of the run by name; see :func:`linclip_eval.results.write_report`.
        checks: Split attention against one rank.
        rows: All measurements.
    """

    def __init__(self, facts: dict[str, str], checks: Sequence[Check], rows: Sequence[Row]) -> None:
        self.facts, self.checks, self.rows = facts, checks, rows
        self.tokens = sorted({row["num_tokens"] for row in rows})
        self.ranks = sorted({row["num_ranks"] for row in rows})

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks) and all(
            row[f"{way}_bytes"] == _expected_bytes(row["num_ranks"])
            for row, way in product(self.rows, ("forward", "backward"))
        )

    def write(self, folder: Path) -> str:
        """Write context.csv, context.png and summary.md, whose text is returned."""
        return write_report(
            folder,
            title="Context parallelism",
            sections=[
                "![Time, exchange and memory over the number of tokens](context.png)",
                "## Correctness",
                "Relative RMS against one rank in float64: the worst rank and tensor. Allowed is "
                "twice the error of one rank, and a rounding.",
                correctness_table(self.checks),
                "## Exchanged per layer and rank, bytes",
                f"The state has H (D + 1)^2 = {STATE_BYTES // 4} float32 numbers: {STATE_BYTES} "
                "bytes.",
                self._bytes_table(),
                "## CPU seconds per rank",
                self._table_by_tokens("cpu_seconds", "{:.3g}"),
                "## Wall seconds",
                self._table_by_tokens("wall_seconds", "{:.3g}"),
                "## Peak memory beyond the inputs per rank, MiB",
                self._table_by_tokens("peak_mib", "{:.0f}"),
                "## How to read this",
                NOTES.format(heads=HEADS, dim=HEAD_DIM, cores=self.facts["cores"]),
            ],
            facts=self.facts,
            tables={"context.csv": self.rows},
            table_facts=("device", "torch", "date_utc", "commit"),
            figures={"context.png": self._draw()},
        )

    def values(self, field: str, num_ranks: int) -> list[float]:
        """Return the largest value of all ranks, its median over repetitions, for every N."""
        found = []
        for num_tokens in self.tokens:
            by_repetition: dict[int, list[float]] = {}
            for row in self._rows_of(num_ranks, num_tokens):
                by_repetition.setdefault(row["repetition"], []).append(row[field])
            found.append(float(median(map(max, by_repetition.values()))))
        return found

    def _rows_of(self, num_ranks: int, num_tokens: int) -> list[Row]:
        place = num_ranks, num_tokens
        return [row for row in self.rows if (row["num_ranks"], row["num_tokens"]) == place]

    def _bytes_table(self) -> str:
        lines = []
        for size, way in product(self.ranks, ("forward", "backward")):
            cells = []
            for num_tokens in self.tokens:
                rows = self._rows_of(size, num_tokens)
                counts = sorted({row[f"{way}_bytes"] for row in rows})
                cells.append(" ... ".join(map(str, counts)))
            lines.append([f"{_ranks(size)}, {way}", _expected_bytes(size), *cells])
        return markdown_table(["N", "formula", *map(str, self.tokens)], lines)

    def _table_by_tokens(self, field: str, form: str) -> str:
        lines = [
            [_ranks(size), *(form.format(value) for value in self.values(field, size))]
            for size in self.ranks
        ]
        return markdown_table(["N", *map(str, self.tokens)], lines)

    def _draw(self) -> Figure:
        """Draw time, exchange and memory of a rank over the number of tokens."""
        time, unit = "cpu_seconds", "CPU seconds"
        if self.facts["backend"] == "nccl":
            time, unit = "wall_seconds", "s"
        panels = (
            (time, "time per rank, forward + backward", unit),
            ("forward_bytes", "exchanged per layer and rank, forward", "bytes"),
            ("peak_mib", "peak memory per rank, beyond inputs", "MiB"),
        )
        figure = new_figure(14, 4.4)
        for axes, (field, title, unit) in zip(figure.subplots(1, 3), panels, strict=True):
            for size, colour in zip(self.ranks, COLOURS, strict=False):
                values = self.values(field, size)
                if any(values):
                    axes.plot(self.tokens, values, "o-", color=colour, label=_ranks(size))
            axes.set_yscale("log")
            set_token_axis(axes, self.tokens)
            dress(axes, title, xlabel="tokens N", ylabel=unit)
            add_legend(axes)
        return figure


def _expected_bytes(num_ranks: int) -> int:
    return STATE_BYTES if num_ranks > 1 else 0


def _ranks(size: int) -> str:
    return f"{size} rank{'s' if size > 1 else ''}"
