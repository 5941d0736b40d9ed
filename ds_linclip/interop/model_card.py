"""The model card of an exported model: architecture, training, metrics and how to load it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_linclip.config import Config
from ds_linclip.data.remote import is_remote, redact

__all__ = ["model_card"]

_WEIGHTS = {"ema": "running average (EMA)", "raw": "as trained, no average"}
_CARD = """---
# Choose a license.
license: unknown
library_name: {library}
pipeline_tag: zero-shot-image-classification
tags:
- clip
{tags}---
# {name}

CLIP, trained with ds_linclip as run `{run}`. Intended use and limitations are not documented yet.

## Training

{training}

## Metrics

{metrics}

## Loading

{loading}"""
_OPEN_CLIP = """```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{name}")
tokenizer = open_clip.get_tokenizer("local-dir:{name}")
```

ds_linclip starts from it with `init.pretrained={name}`.
"""
_DS_LINCLIP = """A tower of this model has attention that open_clip does not support: stock
open_clip refuses `open_clip_config.json`, so the weights are never run with softmax by mistake.

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
    """Return Markdown with the front matter of the Hugging Face hub, with the license left open.

    ``name`` is that of the exported folder, ``manifest`` the checkpoint's, ``weights`` "ema" or
    "raw"; the metrics of ``run_dir`` are read if it has any.
    """
    towers = (config.model.vision, config.model.text)
    kinds = {each.kind for tower in towers for each in tower.attentions}
    fits_open_clip = kinds == {"softmax"}
    facts = [
        *_architecture(config),
        ("parameters", f"{num_parameters:,}, {dtype}"),
        ("weights", _WEIGHTS[weights]),
        *_training(config, manifest),
    ]
    return _CARD.format(
        library="open_clip" if fits_open_clip else "ds_linclip",
        tags="- linear-attention\n" if kinds - {"softmax", "window"} else "",
        name=name,
        run=config.name,
        training="\n".join(_table(("", ""), facts)),
        metrics="\n".join(_metrics(config, run_dir / "metrics.jsonl", manifest["step"], weights)),
        loading=(_OPEN_CLIP if fits_open_clip else _DS_LINCLIP).format(name=name),
    )


def _architecture(config: Config) -> Iterator[tuple[str, str]]:
    vision, text = config.model.vision, config.model.text
    height, width = vision.image_size
    yield (
        "image tower",
        f"ViT, {height} x {width} px in patches of {vision.patch_size}, {vision.layers} layers of "
        f"width {vision.width}, {vision.heads} heads, {vision.attention_text} attention",
    )
    yield (
        "text tower",
        f"{text.context_length} tokens of {text.vocab_size}, {text.layers} layers of width "
        f"{text.width}, {text.heads} heads, {text.attention_text} attention",
    )
    yield "shared space", f"{config.model.embed_dim}"


def _training(config: Config, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    train, optim, init, step = config.train, config.optim, config.init, manifest["step"]
    layout, (beta1, beta2) = manifest["layout"], optim.betas
    yield "data", ", ".join(_public(source.shards) for source in config.data.train)
    yield "steps", f"{step} of {train.steps}"
    yield "global batch", f"{train.global_batch_size} pairs; {step * train.global_batch_size} seen"
    yield "loss", config.loss.kind
    yield (
        "optimizer",
        f"{optim.kind}, lr {optim.lr:g}, betas {beta1:g} and {beta2:g}, weight decay "
        f"{optim.weight_decay:g}, {optim.warmup_steps} warm-up steps, then {optim.schedule.kind}",
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


def _public(path: str) -> str:
    """Return a URL without secrets, or the last two parts of a local path."""
    return redact(path) if is_remote(path) else "/".join(Path(path).parts[-2:])


def _metrics(config: Config, path: Path, step: int, weights: str) -> Iterator[str]:
    """Yield the lines of the last logged loss and evaluation up to ``step``."""
    rows = []
    found = _last_values(path, step)
    for tag, (logged, value) in sorted(found.items(), key=lambda entry: entry[0] != "train/loss"):
        rows.append((f"`{tag}`", f"{value:.4f}", f"{logged}"))
    if not rows:
        yield "The run folder of the checkpoint has no metrics."
        return
    yield from _table(("metric", "value", "after step"), rows)
    yield ""
    if "train/loss" in found:
        yield "The training loss is that of one batch."
    if any(tag.startswith("eval/") for tag in found):
        data = "the run's held-out data" if config.eval.data is None else _public(config.eval.data)
        average = ", with the running average of the weights" if config.optim.ema_decay else ""
        other = ", which this folder does not contain" if average and weights == "raw" else ""
        yield f"Evaluation is on {data}{average}{other}."


def _last_values(path: Path, step: int) -> dict[str, tuple[int, float]]:
    """Return step and value by tag; of a step that a resumed run logged twice, the later line."""
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
