"""The README of an exported model: what was trained, on what, how it scored; nothing else."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_linclip.config import Attention, Config
from ds_linclip.data.remote import redact

__all__ = ["model_card"]

_WEIGHTS = {"ema": "running average (EMA)", "raw": "as trained, no average"}
_OPEN_CLIP = """```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{name}")
tokenizer = open_clip.get_tokenizer("local-dir:{name}")
```

ds_linclip starts from it with `init.pretrained={name}`.
"""
_DS_LINCLIP = """A tower of this model has linear attention, which open_clip does not know: stock
open_clip refuses `open_clip_config.json`, so that the weights are never run with softmax instead.

```python
from ds_linclip.interop.state_dict import load_folder
from ds_linclip.parallel.mesh import Mesh

model = load_folder("{name}", Mesh.create())
image_features = model.encode_image(images, normalize=True)
text_features = model.encode_text(texts, normalize=True)
```

Training starts from it with `init.pretrained={name}`.
"""


def model_card(
    name: str,
    config: Config,
    manifest: Mapping[str, Any],
    *,
    run_dir: Path,
    num_parameters: int,
    weights: str,
    dtype: str,
) -> str:
    """Markdown with the front matter of the Hugging Face hub; the license is left to be chosen.

    Args:
        name: Of the exported folder.
        config: The run's.
        manifest: The checkpoint's.
        run_dir: Where the run has left its metrics, if it has.
        num_parameters: Of the model.
        weights: "ema" or "raw".
        dtype: Of the weights.
    """
    towers = (config.model.vision, config.model.text)
    is_open_clips = all(tower.attention.kind == "softmax" for tower in towers)
    facts = [
        *_architecture(config),
        ("parameters", f"{num_parameters:,}, {dtype}"),
        ("weights", _WEIGHTS[weights]),
        *_training(config, manifest),
    ]
    front = [
        "---",
        "# The license is yours to choose.",
        "license: unknown",
        f"library_name: {'open_clip' if is_open_clips else 'ds_linclip'}",
        "pipeline_tag: zero-shot-image-classification",
        "tags:",
        "- clip",
        *([] if is_open_clips else ["- linear-attention"]),
        "---",
    ]
    return "\n".join(
        [
            *front,
            f"# {name}",
            "",
            f"CLIP, trained with ds_linclip as run `{config.name}`. What this model is good for, "
            "and for whom, is not written here: nobody has said so yet.",
            "",
            "## Training",
            "",
            *_table(("", ""), facts),
            "",
            "## Metrics",
            "",
            *_metrics(config, run_dir / "metrics.jsonl", manifest["step"], weights),
            "",
            "## Loading",
            "",
            (_OPEN_CLIP if is_open_clips else _DS_LINCLIP).format(name=name),
        ]
    )


def _architecture(config: Config) -> Iterator[tuple[str, str]]:
    vision, text = config.model.vision, config.model.text
    height, width = vision.image_size
    yield (
        "image tower",
        f"ViT, {height} x {width} px in patches of {vision.patch_size}, {vision.layers} layers of "
        f"width {vision.width}, {vision.heads} heads, {_words(vision.attention)} attention",
    )
    yield (
        "text tower",
        f"{text.context_length} tokens of {text.vocab_size}, {text.layers} layers of width "
        f"{text.width}, {text.heads} heads, {_words(text.attention)} attention",
    )
    yield "shared space", f"{config.model.embed_dim}"


def _words(attention: Attention) -> str:
    if attention.kind == "softmax":
        return "softmax"
    fields = (f"{name} {value}" for name, value in asdict(attention).items() if name != "kind")
    return f"linear ({', '.join(fields)})"


def _training(config: Config, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    train, optim, init, step = config.train, config.optim, config.init, manifest["step"]
    layout = manifest["layout"]
    yield "data", ", ".join(redact(source.shards) for source in config.data.train)
    yield "steps", f"{step} of {train.steps}"
    yield "global batch", f"{train.global_batch_size} pairs; {step * train.global_batch_size} seen"
    yield "loss", config.loss.kind
    yield (
        "optimizer",
        f"{optim.kind}, lr {optim.lr:g}, betas {optim.beta1:g} and {optim.beta2:g}, weight decay "
        f"{optim.weight_decay:g}, {optim.warmup_steps} warm-up steps, then cosine",
    )
    if optim.ema_decay:
        yield "decay of the running average", f"{optim.ema_decay:g}"
    yield "precision", train.precision
    yield "seed", f"{train.seed}"
    starts = {k: v for k, v in asdict(init).items() if v and k.startswith("pretrained")}
    if starts:
        yield "started from", ", ".join(f"{k} {Path(v).name}" for k, v in starts.items())
    locked = {k: v for k, v in asdict(init).items() if v and k.startswith("lock")}
    if locked:
        yield "locked", ", ".join(f"{k} {v}" for k, v in locked.items())
    axes = ", ".join(f"{axis} {layout[axis]}" for axis in ("dp", "tp", "pp", "cp"))
    yield "layout", f"{axes}, ZeRO stage {layout['zero']}"
    yield "versions", ", ".join(f"{k} {v}" for k, v in manifest["versions"].items())


def _metrics(config: Config, path: Path, step: int, weights: str) -> Iterator[str]:
    """The loss and the evaluation that were logged last, up to ``step``."""
    rows = []
    found = _last(path, step)
    for tag, (logged, value) in sorted(found.items(), key=lambda entry: entry[0] != "train/loss"):
        rows.append((f"`{tag}`", f"{value:.4f}", f"{logged}"))
    if not rows:
        yield "None were found beside the checkpoint."
        return
    yield from _table(("metric", "value", "after step"), rows)
    yield ""
    if "train/loss" in found:
        yield "The training loss is that of one batch."
    if any(tag.startswith("eval/") for tag in found):
        data = "the run's held-out data" if config.eval.data is None else redact(config.eval.data)
        average = ", with the running average of the weights" if config.optim.ema_decay else ""
        other = ", which this folder does not hold" if average and weights == "raw" else ""
        yield f"Evaluation is on {data}{average}{other}."


def _last(path: Path, step: int) -> dict[str, tuple[int, float]]:
    """Step and value by tag; what a resumed run has logged again counts."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    found: dict[str, tuple[int, float]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # cut off by a crash
            continue
        for tag, value in record.items():
            if tag != "train/loss" and not tag.startswith("eval/"):
                continue
            if value is not None and found.get(tag, (0, 0))[0] <= record["step"] <= step:
                found[tag] = record["step"], value
    return found


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (heads, [":---"] * len(heads), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
