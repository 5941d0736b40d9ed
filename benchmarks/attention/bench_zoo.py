"""Every kind of attention in one run: parameters, FLOPs, time and memory over the number of tokens.

``python -m benchmarks.attention.bench_zoo [OUTPUT_FOLDER]`` runs a self-attention layer of
ViT-B/16's image tower (12 heads of 64, with its projections) forward and backward on one image, and
writes zoo.csv, figure.png and summary.md.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks import BenchmarkParser
from benchmarks.attention.zoo import ZOO, settings_of
from ds_linclip.model.attention import Patches, SelfAttention, attention_class
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.number_text import format_figure
from linclip_eval.plotting import COLOURS, add_legend, dress, new_figure, set_token_axis
from linclip_eval.results import markdown_table, write_report
from linclip_eval.runtime.fit import RuntimePoint, Scaling
from linclip_eval.runtime.measure import Inputs, Limits, measure

MEASURED = (
    "kernels",
    "ds_linclip/model",
    "benchmarks/attention",
    "evaluation/linclip_eval/runtime",
)
WIDTH, HEADS = 768, 12
TOKENS = (197, 1025, 4097)
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
LIMITS = Limits(passes=2, runs=50, warmup=2, max_seconds_per_point=2.0, max_seconds_per_call=30.0)
DIRECTION = "forward+backward"


class Layers:
    """A layer of every kind, with the same projections, on one image."""

    what = "layer"
    directions: Sequence[str] = (DIRECTION,)

    def __init__(self, names: Sequence[str], mesh: Mesh, dtype: torch.dtype) -> None:
        self.device, self._dtype = mesh.device, dtype
        self.layers = {name: make_layer(name, mesh).to(mesh.device, dtype) for name in names}
        self.growth: Mapping[str, int] = {
            name: 2 if flops_per_token(each, 2048) > 1.5 * flops_per_token(each, 1024) else 1
            for name, each in self.layers.items()
        }

    def num_sequences(self, num_tokens: int) -> int:
        """Return 1."""
        return 1

    def inputs(self, num_tokens: int) -> Inputs:
        """Return random tokens of one image, and a gradient."""
        like: Any = {"device": self.device, "dtype": self._dtype}
        x = torch.randn(1, num_tokens, WIDTH, requires_grad=True, **like)
        return (x,), torch.randn(1, num_tokens, WIDTH, **like)

    def call(self, attention: str, direction: str, inputs: Inputs) -> Callable[[], object]:
        """Return a forward and the gradients of input and weights."""
        layer, ((x,), grad) = self.layers[attention], inputs
        weights = list(layer.parameters())
        patches = square_grid(x.shape[1])
        return lambda: torch.autograd.grad(layer(x, patches), [x, *weights], grad)


def make_layer(name: str, mesh: Mesh) -> SelfAttention:
    """Return the layer of a name in the zoo, with the weights of seed 0."""
    settings, init = settings_of(name), partial(nn.init.normal_, std=WIDTH**-0.5)
    torch.manual_seed(0)
    kind = attention_class(settings)
    return kind(WIDTH, HEADS, settings, mesh, causal=False, init_qkv=init, init_out=init)


def square_grid(num_tokens: int) -> Patches:
    """Return the grid of an image of that many tokens, class token included."""
    side = math.isqrt(num_tokens - 1)
    return Patches(side, side)


def flops_per_token(layer: SelfAttention, num_tokens: int) -> float:
    """Return the forward FLOPs of a token in the whole layer."""
    own = layer.flops(layer.settings, WIDTH // HEADS, num_tokens, causal=False)
    projections = layer.projection_flops(layer.settings, WIDTH, HEADS, causal=False)
    return 8 * WIDTH**2 + projections + HEADS * own


def main() -> int:
    start = time.monotonic()
    parser = BenchmarkParser("zoo", __doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--kinds", nargs="+", default=list(ZOO), help=", ".join(ZOO))
    parser.add_argument("--budget-seconds", type=float, default=420)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, on a CPU")
    arguments = parser.parse_args()
    device, tokens = arguments.device, sorted(set(arguments.tokens))
    if device not in DTYPE or (device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"device ({device!r}) must be 'cpu', or 'cuda' where there is a GPU")
    parser.check_positive(arguments, "tokens", "budget_seconds", "threads")
    for num_tokens in tokens:
        if math.isqrt(num_tokens - 1) ** 2 != num_tokens - 1:
            side = max(1, round((num_tokens - 1) ** 0.5))
            parser.error(
                f"tokens ({num_tokens}) must be a square of patches and the class token: "
                f"{side**2 + 1} would do"
            )
    unknown = [name for name in arguments.kinds if name not in ZOO]
    if unknown:
        parser.error(f"kinds ({unknown[0]}) must be of {', '.join(ZOO)}")
    names = list(dict.fromkeys(["softmax", *arguments.kinds]))
    output, facts = parser.begin(arguments, device, MEASURED, ("torch", "triton"))
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    layers = Layers(names, Mesh.create(), DTYPE[device])
    deadline = start + arguments.budget_seconds
    points = measure(layers, tokens, LIMITS, deadline=deadline)
    facts["dtype"] = str(DTYPE[device]).removeprefix("torch.")
    facts["threads"] = str(arguments.threads)
    facts["duration"] = f"{time.monotonic() - start:.0f} s"
    scaling = Scaling(points, fit_from=tokens[0])
    rows = [row(layers.layers[name], name, points, scaling, tokens) for name in names]
    print(
        write_report(
            output,
            title="Kinds of attention",
            sections=[
                "A self-attention layer of ViT-B/16's image tower with its projections, forward "
                "and backward on one image; the kinds are called in turn. Times are medians in ms, "
                "and in brackets softmax's over it; memory is the peak that torch allocated, in "
                "MiB. "
                "The exponent of the number of tokens N is that between the last two lengths. "
                "FLOPs are those of the forward pass of a token, at the last length.",
                "![Time over the number of tokens](figure.png)",
                to_markdown(rows, tokens),
                *(f"{p.attention}, N = {p.num_tokens}: {p.skipped}." for p in points if p.skipped),
            ],
            facts=facts,
            tables={"zoo.csv": rows},
            figures={"figure.png": draw(scaling, names, tokens)},
        )
    )
    return 0


def row(
    layer: SelfAttention,
    name: str,
    points: Sequence[RuntimePoint],
    scaling: Scaling,
    tokens: Sequence[int],
) -> dict[str, Any]:
    """Return the line of a kind in zoo.csv."""
    line = scaling.line(Layers.what, DIRECTION, name)
    softmax = scaling.line(Layers.what, DIRECTION, "softmax")
    found: dict[str, Any] = {
        "attention": name,
        "parameters": sum(each.numel() for each in layer.parameters()),
        "mflops_per_token": 1e-6 * flops_per_token(layer, tokens[-1]),
    }
    for n in tokens:
        cost = line.get(n)
        found[f"ms_{n}"] = 1e3 * cost.seconds if cost else ""
        found[f"times_faster_{n}"] = (
            softmax[n].seconds / cost.seconds if cost and n in softmax else ""
        )
        found[f"mib_{n}"] = cost.peak_bytes / 2**20 if cost else ""
    last = [n for n in tokens if n in line][-2:]
    found["exponent"] = (
        math.log(line[last[1]].seconds / line[last[0]].seconds) / math.log(last[1] / last[0])
        if len(last) == 2
        else ""
    )
    return found


def to_markdown(rows: Sequence[Mapping[str, Any]], tokens: Sequence[int]) -> str:
    """Return the table of the summary."""
    header = ["attention", "parameters, k", "MFLOP per token"]
    header += [f"ms at {n}" for n in tokens] + [f"MiB at {n}" for n in tokens] + ["exponent"]
    cells = []
    for each in rows:
        cell = [each["attention"], f"{1e-3 * each['parameters']:.0f}"]
        cell.append(f"{each['mflops_per_token']:.2f}")
        for n in tokens:
            shown = "-"
            if each[f"ms_{n}"] != "":
                shown = format_figure(each[f"ms_{n}"])
            if each[f"times_faster_{n}"] != "":
                shown += f" ({each[f'times_faster_{n}']:.2f})"
            cell.append(shown)
        cell += [f"{each[f'mib_{n}']:.0f}" if each[f"mib_{n}"] != "" else "-" for n in tokens]
        cell.append(f"{each['exponent']:.2f}" if each["exponent"] != "" else "-")
        cells.append(cell)
    return markdown_table(header, cells)


def draw(scaling: Scaling, names: Sequence[str], tokens: Sequence[int]) -> Figure:
    """Return a picture of times over the number of tokens, both logarithmic."""
    figure = new_figure(8.5, 5)
    axes = figure.subplots()
    markers = "^osDvPX*"
    for place, name in enumerate(names):
        line = scaling.line(Layers.what, DIRECTION, name)
        look: dict[str, Any] = {
            "color": COLOURS[place % len(COLOURS)],
            "marker": markers[place // len(COLOURS) % len(markers)],
            "markersize": 4,
            "linewidth": 2 if name == "softmax" else 1.1,
        }
        axes.plot(list(line), [1e3 * cost.seconds for cost in line.values()], label=name, **look)
    set_token_axis(axes, tokens)
    axes.set_yscale("log")
    dress(axes, "Forward and backward of a layer, ms", xlabel="tokens")
    add_legend(figure, axes.get_lines())
    return figure


if __name__ == "__main__":
    sys.exit(main())
