"""The folder format of open_clip's models on the Hugging Face hub: its config, and writing it.

A hub folder holds ``open_clip_config.json`` and ``open_clip_model.safetensors``; open_clip opens it
as ``local-dir:<folder>``. The config of a tower that is not all softmax has an ``attention`` entry,
which stock open_clip refuses, so that such weights are never run as softmax by mistake.
"""

import json
import math
import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ds_linclip.checkpoint.finite_weights import FiniteCheck
from ds_linclip.checkpoint.sharded_safetensors import TensorSpec, write_tensors
from ds_linclip.config import ModelConfig, TextTower, VisionTower, build_section
from ds_linclip.process.atomic import atomic_directory, sync, write_atomically
from ds_linclip.process.progress import progress

__all__ = [
    "CONFIG_FILE",
    "DTYPES",
    "WEIGHTS_FILE",
    "new_folder",
    "open_clip_config",
    "parse_config",
    "read_config",
    "read_model_cfg",
    "write_hub_folder",
]

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
#: Dtypes by their names in the config and on the command line.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: Keys of a ``model_cfg`` that only matter without weights.
_INITIAL_VALUES = ("init_logit_scale", "init_logit_bias")
#: Initial bias of open_clip's sigmoid models. Without this entry they have no ``logit_bias``.
_INITIAL_BIAS = -10.0

Tower = TypeVar("Tower", VisionTower, TextTower)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder; rename it to ``output`` when the context ends without an error.

    Raises:
        ValueError: when ``output`` exists and is not an empty folder.
        OSError: when it cannot be written.
    """
    output = Path(os.path.abspath(output))
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"output folder ({output}) must not exist, or be empty")
    with atomic_directory(output) as folder:
        yield folder
        sync(folder)
    sync(output.parent)


def write_hub_folder(
    folder: Path,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: Callable[[str], torch.dtype],
    read: Callable[[str], Tensor],
) -> int:
    """Write config and weights, holding no more than one tensor at a time.

    Args:
        folder: The folder that :func:`new_folder` yields.
        config: The architecture.
        shapes: Shape of every key.
        dtype: Returns the dtype for a key. Scalars are always fp32: the logit scale is a logarithm,
            and bf16 would change the temperature by a percent.
        read: Returns the tensor of a key on the CPU, in open_clip's layout and any floating dtype.

    Returns:
        The number of weights.

    Raises:
        ValueError: when a weight is not finite, or exceeds the range of its dtype.
        OSError: when a file cannot be written.
    """
    content = open_clip_config(config, with_bias="logit_bias" in shapes)
    write_atomically(folder / CONFIG_FILE, json.dumps(content, indent=2) + "\n", durable=True)
    specs = {
        k: TensorSpec(dtype(k) if shape else torch.float32, shape) for k, shape in shapes.items()
    }
    # Wide dtypes first, so that every tensor is aligned.
    order = sorted(specs, key=lambda key: (-specs[key].dtype.itemsize, key))
    layout = {key: specs[key] for key in order}
    size = sum(spec.num_bytes for spec in layout.values())
    style = {"desc": "weights", "unit": "B", "unit_scale": True, "delay": 2, "leave": False}
    check = FiniteCheck()
    with progress(total=size, **style) as bar:

        def converted() -> Iterator[Tensor]:
            for key, spec in layout.items():
                tensor = read(key)
                check.see(key, tensor)
                yield _convert(key, tensor, spec)
                bar.update(spec.num_bytes)

        write_tensors(folder / WEIGHTS_FILE, layout, converted())
    check.conclude()
    return sum(math.prod(shape) for shape in shapes.values())


def open_clip_config(config: ModelConfig, *, with_bias: bool = False) -> dict[str, Any]:
    """Return the content of ``open_clip_config.json``; with ``with_bias`` the weights have a
    ``logit_bias``, as with the sigmoid loss."""
    model_cfg: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "vision_cfg": _tower_to_dict(config.vision),
        "text_cfg": _tower_to_dict(config.text),
    }
    if with_bias:
        model_cfg["init_logit_bias"] = _INITIAL_BIAS
    return {"model_cfg": model_cfg}


def read_config(folder: Path, towers: Container[str] = ("vision", "text")) -> ModelConfig:
    """Read the architecture of a hub folder; see :func:`parse_config`.

    Raises:
        OSError: when the folder has no config file.
        ValueError: when the file describes another kind of model.
    """
    return parse_config(read_model_cfg(folder / CONFIG_FILE), towers)


def read_model_cfg(path: Path) -> dict[str, Any]:
    """Read ``model_cfg`` from an ``open_clip_config.json`` or one of open_clip's ``model_configs``.

    Raises:
        OSError: when there is no such file.
        ValueError: when it is not JSON.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # neither JSON nor text
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    found = content.get("model_cfg", content) if isinstance(content, dict) else None
    return dict(found) if isinstance(found, dict) else {}


def parse_config(
    model_cfg: Mapping[str, Any], towers: Container[str] = ("vision", "text")
) -> ModelConfig:
    """Return the architecture that a ``model_cfg`` of open_clip describes; a tower that is not in
    ``towers`` is not read and keeps its default values.

    Raises:
        ValueError: when it describes another kind of model.
    """
    cfg = {key: value for key, value in model_cfg.items() if key not in _INITIAL_VALUES}
    try:
        embed_dim, vision, text = (cfg.pop(key) for key in ("embed_dim", "vision_cfg", "text_cfg"))
    except KeyError as error:
        raise ValueError(
            f"{CONFIG_FILE} must hold model_cfg with embed_dim, vision_cfg and text_cfg"
        ) from error
    if cfg:
        raise ValueError(f"model_cfg ({', '.join(sorted(cfg))}) must hold no such keys")
    if type(embed_dim) is not int or embed_dim < 1:
        raise ValueError(f"embed_dim ({embed_dim}) must be a positive integer")
    config = ModelConfig(embed_dim=embed_dim)
    if "vision" in towers:
        config.vision = _parse_tower(VisionTower, "vision_cfg", vision)
    if "text" in towers:
        config.text = _parse_tower(TextTower, "text_cfg", text)
    return config


def _convert(key: str, value: Tensor, facts: TensorSpec) -> Tensor:
    largest = torch.finfo(facts.dtype).max
    if torch.finfo(value.dtype).max > largest and value.numel():
        low, high = value.aminmax()
        if largest < max(-low.item(), high.item()) < math.inf:
            raise ValueError(
                f"{key} holds values beyond {facts.dtype} ({largest:.4g}): take another --dtype"
            )
    return value.reshape(facts.shape).to(facts.dtype)


def _tower_to_dict(tower: VisionTower | TextTower) -> dict[str, Any]:
    content = asdict(tower)
    if isinstance(tower, VisionTower) and tower.image_size[0] == tower.image_size[1]:
        content["image_size"] = tower.image_size[0]  # one number, as in open_clip's own configs
    is_softmax = tower.attention_text == "softmax"
    if is_softmax or not tower.attention_by_layer:
        del content["attention_by_layer"]
    if is_softmax:
        del content["attention"]
    return content


def _parse_tower(tower: type[Tower], name: str, content: Any) -> Tower:
    if isinstance(content, dict):
        content = {"attention": {"kind": "softmax"}, **content}
    try:
        return build_section(content, tower, name)
    except ValueError as error:
        raise ValueError(f"{name} must describe a plain transformer: {error}") from error
