"""What a run of bench_context.py has found: checks, tables and a picture."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from benchmarks.attention.report import LABEL, MUTED, TITLE, dress, table

__all__ = [
    "CHECK_TOKENS",
    "HEADS",
    "HEAD_DIM",
    "STATE_BYTES",
    "ContextReport",
    "ContextRow",
    "SplitCheck",
]

#: Few, so that 262144 tokens in one process leave room on a machine of 16 GiB.
HEADS, HEAD_DIM = 4, 64
#: A state is [H, D + 1, D + 1] in float32, whatever the number of tokens.
STATE_BYTES = HEADS * (HEAD_DIM + 1) ** 2 * 4
#: Of the check; not divisible by the ranks.
CHECK_TOKENS = 4099
COLOURS = {1: "#64748b", 2: "#58b0e3", 4: "#2563a8"}
NOTES = """\
- A layer here is bidirectional linear attention, Eq. 4, of {heads} heads of {dim}, one image,
  forward and backward, without the projections around it: those work token by token and exchange
  nothing. With one rank it is the whole operator, otherwise its two halves and the sum of the
  state over ranks.
- Bytes are those of the tensors handed to collectives, forward and backward, seen by a dispatch
  mode around the call; a backend may send more or less of them over its links.
- CPU seconds are user and system time of a rank's process in the call, one thread for torch. Every
  figure is that of the slowest rank, or the one with most memory, and the median over repetitions;
  all points are measured once per repetition, in turn.
- Peak memory is what the call adds to the inputs: growth of the peak resident set on a CPU, of
  torch.cuda.max_memory_allocated on a GPU.
- On a CPU all ranks share the machine's {cores} cores with whatever else runs (see the load), so
  that wall time says nothing about machines with more: compare CPU seconds."""


@dataclass(frozen=True, kw_only=True)
class ContextRow:
    """One call on one rank.

    Attributes:
        forward_bytes, backward_bytes: Handed to collectives.
        peak_mib: What the call adds to the inputs.
    """

    num_tokens: int
    num_ranks: int
    rank: int
    repetition: int
    cpu_seconds: float
    wall_seconds: float
    forward_bytes: int
    backward_bytes: int
    peak_mib: float


@dataclass(frozen=True)
class SplitCheck:
    """Relative RMS against one rank in float64: of split attention, and of one rank."""

    num_ranks: int
    tensor: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # NaN does not pass


class ContextReport:
    """The rows of one run, with what was measured where, and the checks."""

    def __init__(
        self,
        facts: dict[str, str],
        checks: Sequence[SplitCheck],
        rows: Sequence[ContextRow],
    ) -> None:
        self.facts, self.checks, self.rows = facts, checks, rows
        self.tokens = sorted({row.num_tokens for row in rows})
        self.ranks = sorted({row.num_ranks for row in rows})

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks) and all(
            {row.forward_bytes, row.backward_bytes} == {_expected_bytes(row.num_ranks)}
            for row in self.rows
        )

    def write(self, folder: Path) -> None:
        """Write context.csv, summary.md and context.png."""
        with (folder / "context.csv").open("w", newline="") as file:
            common = {name: self.facts[name] for name in ("device", "torch", "date_utc", "commit")}
            writer = csv.DictWriter(file, [*asdict(self.rows[0]), *common])
            writer.writeheader()
            for row in self.rows:
                values = asdict(row).items()
                rounded = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values}
                writer.writerow(rounded | common)
        (folder / "summary.md").write_text(self.summary())
        self.draw().savefig(folder / "context.png", dpi=150)

    def values(self, field: str, num_ranks: int) -> list[float]:
        """Per number of tokens: most of all ranks, and its median over repetitions."""
        found = []
        for num_tokens in self.tokens:
            most: dict[int, float] = {}
            for row in self.rows:
                if (row.num_tokens, row.num_ranks) == (num_tokens, num_ranks):
                    value = float(getattr(row, field))
                    most[row.repetition] = max(most.get(row.repetition, value), value)
            found.append(median(most.values()))
        return found

    def summary(self) -> str:
        """All but the picture, in Markdown aligned so that it can be read as it is."""
        notes = NOTES.format(heads=HEADS, dim=HEAD_DIM, cores=self.facts["cores"])
        sections = [
            f"# Context parallelism on {self.facts['device']}",
            table(["", ""], [[*fact] for fact in self.facts.items()], left=2),
            "## Correctness",
            f"Relative RMS against one rank in float64, {CHECK_TOKENS} tokens: the worst rank. "
            "Allowed is twice\nthe error of one rank, and a rounding.",
            self._correctness(),
            "## Exchanged per layer and rank, bytes",
            f"The state has H (D + 1)^2 = {STATE_BYTES // 4} float32 numbers: {STATE_BYTES} bytes.",
            self._bytes(),
            "## CPU seconds per rank",
            self._by_tokens("cpu_seconds", "{:.3g}"),
            "## Wall seconds",
            self._by_tokens("wall_seconds", "{:.3g}"),
            "## Peak memory beyond the inputs per rank, MiB",
            self._by_tokens("peak_mib", "{:.0f}"),
            "## How to read this",
            notes,
        ]
        return "\n\n".join(sections) + "\n"

    def _correctness(self) -> str:
        lines = []
        for size in self.ranks[1:]:
            for name in ("o", "dq", "dk", "dv"):
                same = [c for c in self.checks if (c.num_ranks, c.tensor) == (size, name)]
                worst = max(same, key=lambda check: check.error / check.allowed)
                verdict = "pass" if all(check.passed for check in same) else "FAIL"
                errors = f"{worst.error:.1e}", f"{worst.allowed:.1e}"
                lines.append([f"{size} ranks, {name}", *errors, verdict])
        return table(["", "error", "allowed", ""], lines)

    def _bytes(self) -> str:
        lines = []
        for size, way in product(self.ranks, ("forward", "backward")):
            counts = (
                sorted({getattr(r, f"{way}_bytes") for r in self._of(size, num_tokens)})
                for num_tokens in self.tokens
            )
            cells = [" ... ".join(map(str, count)) for count in counts]
            lines.append([f"{_ranks(size)}, {way}", str(_expected_bytes(size)), *cells])
        return table(["N", "formula", *map(str, self.tokens)], lines)

    def _of(self, num_ranks: int, num_tokens: int) -> Iterable[ContextRow]:
        return (r for r in self.rows if (r.num_ranks, r.num_tokens) == (num_ranks, num_tokens))

    def _by_tokens(self, field: str, form: str) -> str:
        lines = [
            [_ranks(size), *(form.format(value) for value in self.values(field, size))]
            for size in self.ranks
        ]
        return table(["N", *map(str, self.tokens)], lines)

    def draw(self) -> Figure:
        """Time, exchange and memory of a rank over the number of tokens."""
        figure = Figure(figsize=(14, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        on_gpu = self.facts["backend"] == "nccl"
        time_field = "wall_seconds" if on_gpu else "cpu_seconds"
        titles = {
            time_field: ("time per rank, forward + backward", "s" if on_gpu else "CPU seconds"),
            "forward_bytes": ("exchanged per layer and rank, forward", "bytes"),
            "peak_mib": ("peak memory per rank, beyond inputs", "MiB"),
        }
        for axes, (field, (title, unit)) in zip(figure.subplots(1, 3), titles.items(), strict=True):
            for size in self.ranks:
                values = self.values(field, size)
                if any(values):
                    style: dict[str, Any] = {"color": COLOURS.get(size), "marker": "o"}
                    axes.plot(self.tokens, values, label=_ranks(size), markersize=4.5, **style)
            axes.set_title(title, loc="left", **TITLE)
            axes.set_ylabel(unit, **LABEL)
            axes.set_xlabel("tokens N", **LABEL)
            axes.set_yscale("log")
            axes.legend(frameon=False, fontsize=9)
            dress(axes)
            axes.set_xticks(self.tokens, minor=False)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
            axes.set_xlim(0.7 * self.tokens[0], 1.4 * self.tokens[-1])
        facts = self.facts
        figure.suptitle(
            f"Context parallelism: {facts['device']}, {facts['dtype']}, {HEADS} heads of "
            f"{HEAD_DIM}, {facts['date_utc']} UTC, {facts['commit']}",
            x=0.01,
            ha="left",
            fontsize=11,
            color=MUTED,
        )
        return figure


def _expected_bytes(num_ranks: int) -> int:
    return STATE_BYTES if num_ranks > 1 else 0


def _ranks(size: int) -> str:
    return f"{size} rank{'s' if size > 1 else ''}"
