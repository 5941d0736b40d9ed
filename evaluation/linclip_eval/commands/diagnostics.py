"""Measure the attention of every layer, for several models side by side."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from statistics import fmean

from torch import Tensor

from ds_linclip.config import (
    Attention,
    LinearAttention,
    StateAttention,
    TextTower,
    VisionTower,
)
from ds_linclip.data import LabelledData
from ds_linclip.inference import LoadedModel, load_model
from ds_linclip.model import CLIP
from linclip_eval.commands import inputs, outputs
from linclip_eval.diagnostics.figure import draw_diagnostics
from linclip_eval.diagnostics.measure import LayerStatistic, diagnose
from linclip_eval.results import markdown_table
from linclip_eval.zero_shot.classifier import parse_template

__all__ = ["run"]

#: Statistic -> its name in the tables, decimals.
_ROWS = {
    "entropy": ("entropy", 3),
    "contrast": ("contrast", 2),
    "contrast_bound": ("bound of contrast", 2),
    "variation": ("variation", 2),
    "effective_rank": ("effective rank", 3),
    "uniform_rank": ("effective rank if uniform", 3),
    "gain": ("gain", 2),
    "gain_variation": ("variation of the gain", 2),
    "negative_share": ("negative share", 2),
    "token_similarity": ("token cosine", 2),
    "branch_ratio": ("branch over residual", 2),
    "branch_ratio_at_init": ("branch over residual at init", 2),
}
_NOTES = """\
In the tables: means over layers, in brackets the lowest and the highest layer. A layer is a mean
over heads and samples; the bands of the figure are their 5 and 95 % quantiles. A row is the
attention of one token, relative to its sum. A row of the text tower covers the tokens up to its
own; texts end at their end-of-text token.

- Entropy of a row over the logarithm of its number of keys: 1 is uniform, 0 a single key.
- Contrast: largest over mean weight of a row; 1 is uniform. A score 1 + cos is at most 2, so that
  the contrast of affine linear attention is at most 2 / (1 + mean cosine of a query and its keys).
- Variation: standard deviation over mean of the weights of a row; 0 is uniform.
- Effective rank: exp of the entropy of the singular values, over the number of tokens N. Uniform
  attention has 1 / N, and more when causal. Affine scores of heads of width D give bidirectional
  matrices of rank D + 1 at most.
- Gain: sum of a row before it is divided out, 1 except in Eq. 7; its variation is over rows.
- Negative share: what a row subtracts, over the sum of its absolute weights. Where it is not 0, the
  statistics above are those of absolute weights, except for rank and gain.
- Token cosine: mean over all pairs of different tokens after a block; layer 0 is the input.
- Branch over residual: RMS of what attention adds to the residual stream over the RMS of the stream
  before the block; at init: the same in a model of this architecture with the initial weights of
  seed 0.

There is one set of weights per model: differences say nothing about other seeds."""


def run(options: argparse.Namespace) -> None:
    """Run the command; errors in its input are ValueError or OSError."""
    inputs.check_out(options.out)
    sources = inputs.parse_sources(options.models, "models")
    about: list[Sequence[object]] = []
    statistics: dict[str, list[LayerStatistic]] = {}
    with inputs.all_ranks() as mesh:
        if mesh.world_size > 1:
            raise ValueError(f"diagnostics ({mesh.world_size} processes) must run in one process")
        for name, source in sources.items():
            model = load_model(source, mesh, image_size=options.image_size)
            if not isinstance(model.module, CLIP):
                raise ValueError(
                    f"model ({source}) must be ds_linclip's, or a hub folder of a plain ViT: "
                    "open_clip gives no access to its attention"
                )
            images, texts = _samples(options.data, model, options.num_images)
            try:
                statistics[name] = diagnose(model.module, images, texts, options.max_tokens)
            except ValueError as error:
                raise ValueError(f"model ({source}): {error}") from error
            vision, text = model.module.config.vision, model.module.config.text
            heads = f"{vision.head_width}, {text.width // text.heads}"
            num_tokens = vision.num_tokens_at(model.image_size)
            variants = _variant(vision), _variant(text)
            about.append((name, model.name, num_tokens, heads, *variants))
    rows = {name: [asdict(row) for row in found] for name, found in statistics.items()}
    header = ("model", "weights", "image tokens", "head widths", "vision", "text")
    outputs.publish(
        options.out,
        options.words,
        mesh.device,
        title="Attention, layer by layer",
        sections=[
            f"{len(images)} images of `{options.data}` and {len(texts)} texts.",
            markdown_table(header, about, align="llrrll"),
            *_findings(statistics),
            "![Statistics of every layer](figure.png)",
            _NOTES,
        ],
        tables={"layers.csv": [{"model": name, **row} for name in rows for row in rows[name]]},
        figures={"figure.png": draw_diagnostics(statistics)},
        numbers={"models": rows},
    )


def _samples(folder: str, model: LoadedModel, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return batches of one: evenly spaced images, and their captions or, without captions, prompts
    of evenly spaced classes."""
    data = LabelledData(folder, transform=model.transform, batch_size=1)
    batches = list(data.batches(_spread(data.num_batches, count)))
    texts = [caption for batch in batches for caption in batch.captions if caption]
    if not texts:
        prompt = parse_template(data.templates[0])
        chosen = _spread(len(data.classnames), count)
        texts = [prompt(data.classnames[number]) for number in chosen]
    return [batch.images for batch in batches], list(model.tokenizer(texts).split(1))


def _spread(length: int, count: int) -> list[int]:
    """Return at most ``count`` evenly spaced numbers below ``length``."""
    count = min(length, count)
    return [i * length // count for i in range(count)]


def _variant(tower: VisionTower | TextTower) -> str:
    """Return the attention of a tower's layers in short."""
    return ", then ".join(dict.fromkeys(map(_in_short, tower.attentions)))


def _in_short(attention: Attention) -> str:
    if isinstance(attention, LinearAttention):
        words = ["Eq. 4" if attention.normalized else f"Eq. 7, scale {attention.score_scale:g}"]
        if attention.length_exponent and not attention.normalized:
            words.append(f"n^-{attention.length_exponent:g}")
        if attention.feature_map != "affine":
            words.append(attention.feature_map)
    else:
        own = ((each.name, getattr(attention, each.name)) for each in fields(attention))
        common = {"kind", "head_norm", "local"}
        words = [attention.kind, *(f"{name} {value}" for name, value in own if name not in common)]
    if isinstance(attention, StateAttention):
        words += ["norm of heads"] * attention.head_norm
        words += [f"{attention.local.kind} local part"] * (attention.local.kind != "none")
    return ", ".join(words)


def _findings(statistics: Mapping[str, Sequence[LayerStatistic]]) -> list[str]:
    """Return a table for each tower, followed by sentences about it."""
    parts = []
    for tower in ("vision", "text"):
        #: Model -> statistic -> layer -> mean.
        models: dict[str, dict[str, dict[int, float]]] = {name: {} for name in statistics}
        for name, found in statistics.items():
            for row in found:
                if row.tower == tower:
                    models[name].setdefault(row.statistic, {})[row.layer] = row.mean
        rows = [
            (heading, *(_cell(means.get(statistic), digits) for means in models.values()))
            for statistic, (heading, digits) in _ROWS.items()
        ]
        table = markdown_table(("mean over layers", *models), rows)
        parts += [f"## {tower.capitalize()} tower", table, _sentences(models)]
    return parts


def _cell(means: Mapping[int, float] | None, digits: int) -> str:
    if means is None:
        return ""
    blocks = [mean for layer, mean in means.items() if layer > 0]
    values = (fmean(blocks), min(blocks), max(blocks))
    mean, low, high = (f"{value:.{digits}f}" for value in values)
    return mean if low == high else f"{mean} ({low} to {high})"


def _sentences(models: Mapping[str, Mapping[str, Mapping[int, float]]]) -> str:
    entropies = {name: fmean(means["entropy"].values()) for name, means in models.items()}
    selective = sorted(entropies, key=lambda name: entropies[name])
    similarities = {name: means["token_similarity"] for name, means in models.items()}
    order = ", ".join(f"{name} {entropies[name]:.3f}" for name in selective)
    ends = ", ".join(f"{name} {s[0]:.2f} to {s[max(s)]:.2f}" for name, s in similarities.items())
    lines = [f"Entropy, from the most to the least selective: {order}."]
    for name, means in models.items():
        if "contrast_bound" in means:
            contrast, bound = means["contrast"], means["contrast_bound"]
            layer = max(contrast, key=lambda layer: contrast[layer])
            lines.append(
                f"{name}: contrast is highest in layer {layer}, {contrast[layer]:.2f} where 1 + "
                f"cos allows {bound[layer]:.2f}."
            )
    return outputs.bullets([*lines, f"Token cosine, from the input to the last block: {ends}."])
