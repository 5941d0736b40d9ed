"""Tables and figure of the language-model study, from its recorded runs.

Intervals are 95 %: of bits per byte over the held-out documents, as a ratio of two sums with
Student's t; of recall over the held-out sequences, with Student's t.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from experiments.associative_recall import RecallTask
from experiments.convergence_report import Interval
from linclip_eval.plotting import COLOURS, INK, add_legend, dress, new_figure, set_token_axis
from linclip_eval.results import markdown_table

__all__ = ["bits_per_byte", "draw", "to_sections"]

#: A recorded run: its task, kind, seed and results.
Record = Mapping[str, Any]


def bits_per_byte(bits: Sequence[float] | np.ndarray, sizes: Sequence[int]) -> Interval:
    """Return all bits over all bytes, and the half width of its interval over documents.

    Args:
        bits: Bits of every document, or the bits by which two models differ.
        sizes: Bytes of every document.
    """
    ratio = float(np.sum(bits) / np.sum(sizes))
    count = len(sizes)
    # The first-order error of a ratio of sums.
    residuals = np.asarray(bits) - ratio * np.asarray(sizes)
    error = np.sqrt(count / (count - 1) * np.sum(residuals**2)) / np.sum(sizes)
    return Interval(mean=ratio, half_width=float(student_t.ppf(0.975, count - 1) * error))


def to_sections(
    records: Sequence[Record],
    sizes: Sequence[int],
    pair_bits: Sequence[float],
    recalls: Mapping[int, RecallTask],
) -> list[str]:
    """Return the sections of the summary, Markdown.

    Args:
        records: All runs; kinds are listed in the order of their appearance.
        sizes: Bytes of every held-out document.
        pair_bits: Bits of every held-out document under counted pairs of tokens.
        recalls: The recall tasks by their length.
    """
    return [
        *_text_section(_by_kind(records, "text"), sizes, pair_bits),
        *_recall_section(_by_kind(records, "recall"), recalls),
        *_speed_sections(_by_kind(records, "speed")),
    ]


def _text_section(
    runs: Mapping[str, list[Record]], sizes: Sequence[int], pair_bits: Sequence[float]
) -> list[str]:
    if not runs:
        return []
    first, rows = next(iter(runs)), []
    for kind, own in runs.items():
        seeds = [bits_per_byte(run["document_bits"], sizes).mean for run in own]
        apart = _mean_bits(own) - _mean_bits(runs[first])
        rows.append(
            [
                *(kind, f"{own[0]['parameters']:,}", len(seeds)),
                bits_per_byte(_mean_bits(own), sizes).text(3),
                "" if kind == first else bits_per_byte(apart, sizes).text(3),
                Interval.of(seeds).text(3) if len(seeds) > 1 else "",
                f"{np.mean([run['seconds'] for run in own]):.0f}",
            ]
        )
    header = ["attention", "parameters", "seeds", "bits per byte", f"minus {first}"]
    return [
        f"## Text\n\n{len(sizes)} held-out documents, {sum(sizes):,} bytes. Intervals over the "
        "documents, of the mean over seeds; differences are paired by document. Over seeds: the "
        "interval for other seeds, on the same documents. Counted pairs of bytes give "
        f"{bits_per_byte(pair_bits, sizes).mean:.3f}: a model above that has learned little.",
        markdown_table([*header, "over seeds", "training, s"], rows),
    ]


def _recall_section(
    runs: Mapping[str, list[Record]], recalls: Mapping[int, RecallTask]
) -> list[str]:
    if not runs:
        return []
    rows = []
    for kind, own in runs.items():
        found = (_recall(own, task) for task in recalls.values())
        cells = (interval.text(1, 100) if interval else "" for interval in found)
        seeds = len({run["seed"] for run in own})
        rows.append([kind, seeds, *cells])
    tasks = [f"{task.pairs} pairs in {task.length} tokens, %" for task in recalls.values()]
    chances = " and ".join(f"{100 * task.chance:.1f} %" for task in recalls.values())
    return [
        "## Associative recall\n\nAnswers to queries that are right; chance, for a model that "
        f"knows the values of a sequence but not whose they are, is {chances}. Intervals over "
        "sequences, of the mean over seeds.",
        markdown_table(["attention", "seeds", *tasks], rows),
    ]


def _speed_sections(runs: Mapping[str, list[Record]]) -> list[str]:
    lengths = sorted({run["length"] for own in runs.values() for run in own})
    sections = []
    for title, field, unit in (
        ("Tokens per second", "tokens_per_second", 1.0),
        ("Peak memory beyond the weights, MiB", "peak_bytes", 2.0**20),
    ):
        rows = []
        for kind, own in runs.items():
            found = {run["length"]: run[field] / unit for run in own}
            rows.append([kind, *(f"{found[n]:,.0f}" if n in found else "" for n in lengths)])
        if rows:
            sections += [
                f"## {title}\n\nForward and backward of {max(lengths):,} tokens in sequences of N.",
                markdown_table(["attention", *(f"N = {n}" for n in lengths)], rows),
            ]
    return sections


def draw(
    records: Sequence[Record], sizes: Sequence[int], recalls: Mapping[int, RecallTask]
) -> Figure:
    """Return a figure of what the tables say; see :func:`to_sections` for the arguments."""
    kinds = list(dict.fromkeys(record["kind"] for record in records))
    colours = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}
    figure = new_figure(11, 4.6 + 0.3 * len(kinds))
    (text, recall), (speed, memory) = figure.subplots(2, 2)
    texts, answers, speeds = (_by_kind(records, task) for task in ("text", "recall", "speed"))
    for row, kind in enumerate(kinds):
        colour = colours[kind]
        if runs := texts.get(kind):
            _draw_interval(text, row, bits_per_byte(_mean_bits(runs), sizes), colour)
        for marker, task in zip("so", recalls.values(), strict=False):
            if interval := _recall(answers.get(kind, []), task):
                _draw_interval(recall, row, interval, colour, factor=100, marker=marker)
        if runs := sorted(speeds.get(kind, []), key=lambda run: run["length"]):
            lengths = [run["length"] for run in runs]
            style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 3}
            speed.plot(lengths, [run["tokens_per_second"] for run in runs], **style, label=kind)
            memory.plot(lengths, [run["peak_bytes"] / 2**20 for run in runs], **style)
    for task in recalls.values():
        recall.axvline(100 * task.chance, color=INK, linewidth=0.8, linestyle=":")
    dress(text, "Bits per byte, held-out documents")
    few, many = (task.pairs for task in recalls.values())
    dress(recall, f"Recall, %: {few} pairs (square), {many} (circle); dotted: chance")
    for axes in (text, recall):
        axes.set_yticks(range(len(kinds)), kinds, fontsize=9)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
    every = sorted({run["length"] for runs in speeds.values() for run in runs})
    for axes, title in ((speed, "Tokens per second"), (memory, "Peak memory, MiB")):
        if every:
            set_token_axis(axes, every)
            axes.set_ylim(bottom=0)
        dress(axes, f"{title}, forward and backward", xlabel="tokens of a sequence")
    if every:
        add_legend(figure, speed.get_lines())
    return figure


def _by_kind(records: Sequence[Record], task: str) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["task"] == task:
            found.setdefault(record["kind"], []).append(record)
    return found


def _mean_bits(runs: Sequence[Record]) -> np.ndarray:
    return np.mean([run["document_bits"] for run in runs], axis=0)


def _recall(runs: Sequence[Record], task: RecallTask) -> Interval | None:
    """Return the share of right answers, if there are runs of this task."""
    right = [run["right_answers"] for run in runs if run["length"] == task.length]
    if not right:
        return None
    return Interval.of((np.mean(right, axis=0) / task.pairs).tolist())


def _draw_interval(
    axes: Axes, row: int, interval: Interval, colour: str, factor: float = 1.0, marker: str = "o"
) -> None:
    reach = factor * (interval.half_width or 0.0)
    style: dict[str, Any] = {"fmt": marker, "markersize": 5, "capsize": 3, "color": colour}
    axes.errorbar([factor * interval.mean], [row], xerr=[[reach], [reach]], **style)
