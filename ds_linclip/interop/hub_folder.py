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
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, cast

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
#: Settings of towers that the config of older folders does not have.
_ADDED = (
    *("activation", "norm_eps", "ls_init_value", "class_token", "pool_type", "no_ln_pre"),
    *("final_ln_after_pool", "proj_type", "no_causal_mask", "proj_bias"),
    *("hf_tokenizer_name", "hf_tokenizer_clean"),
)
#: Settings that are within a mapping of open_clip: its key, and the key in it.
_RENAMED = {
    "norm_eps": ("norm_kwargs", "eps"),
    "hf_tokenizer_clean": ("tokenizer_kwargs", "clean"),
}
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
    towers = {
        "vision_cfg": _tower_to_dict(config, config.vision),
        "text_cfg": _tower_to_dict(config, config.text),
    }
    model_cfg: dict[str, Any] = {"embed_dim": config.embed_dim, **towers}
    # One switch for both towers in open_clip, which does not reach those of timm.
    plain = [each for each in towers.values() if "timm_model_name" not in each]
    if all(each.get("activation") == "quick_gelu" for each in plain):
        model_cfg["quick_gelu"] = True
        for each in plain:
            del each["activation"]
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
    quick_gelu = cfg.pop("quick_gelu", False)
    if cfg:
        raise ValueError(f"model_cfg ({', '.join(sorted(cfg))}) must hold no such keys")
    if type(embed_dim) is not int or embed_dim < 1:
        raise ValueError(f"embed_dim ({embed_dim}) must be a positive integer")
    if not isinstance(quick_gelu, bool):
        raise ValueError(f"quick_gelu ({quick_gelu}) must be true or false")
    config, both = ModelConfig(embed_dim=embed_dim), {"quick_gelu": quick_gelu}
    if "vision" in towers:
        config.vision = _parse_tower(VisionTower, "vision_cfg", vision, embed_dim, **both)
    if "text" in towers:
        config.text = _parse_tower(TextTower, "text_cfg", text, embed_dim, **both)
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


def _tower_to_dict(config: ModelConfig, tower: VisionTower | TextTower) -> dict[str, Any]:
    """Return the tower's settings in open_clip's names; those that it does not know are there only
    if they matter, and make it refuse the tower."""
    is_softmax = tower.attention_text == "softmax"
    content = asdict(tower)
    found = None
    if isinstance(tower, VisionTower):
        if not tower.class_token:
            from ds_linclip.interop.timm_tower import timm_settings  # timm takes seconds

            found = timm_settings(tower, config.embed_dim)
        if tower.image_size[0] == tower.image_size[1]:
            content["image_size"] = tower.image_size[0]  # one number, as in open_clip's own configs
    if found is None:
        found = {key: value for key, value in content.items() if not key.startswith("attention")}
        for each in fields(tower):
            if each.name in _ADDED and found[each.name] == each.default:
                del found[each.name]
        _rename_to_open_clip(found)
    elif content["patch_dropout"]:
        found["patch_dropout"] = content["patch_dropout"]
    if not is_softmax:
        found["attention"] = content["attention"]
        if tower.attention_by_layer:
            found["attention_by_layer"] = content["attention_by_layer"]
    return found


def _rename_to_open_clip(found: dict[str, Any]) -> None:
    """Replace settings that open_clip has under another name, in place."""
    for name, (key, below) in _RENAMED.items():
        if name in found:
            found[key] = {below: found.pop(name)}
    if found.get("activation") == "gelu_tanh":
        del found["activation"]
        found["act_kwargs"] = {"approximate": "tanh"}


def _parse_tower(
    tower: type[Tower], name: str, content: Any, embed_dim: int, *, quick_gelu: bool
) -> Tower:
    try:
        if not isinstance(content, dict):
            return build_section(content, tower, name)
        if tower is VisionTower and content.get("timm_model_name"):
            return cast(Tower, _parse_timm(content, name, embed_dim))
        content = {"attention": {"kind": "softmax"}, **content}
        if quick_gelu:
            content.setdefault("activation", "quick_gelu")
        _rename_from_open_clip(content)
        return build_section(content, tower, name)
    except ValueError as error:
        raise ValueError(f"{name} must describe a plain transformer: {error}") from error


def _parse_timm(content: dict[str, Any], name: str, embed_dim: int) -> VisionTower:
    """Return the tower of a ``vision_cfg`` with a model of timm, and what this project adds."""
    from ds_linclip.interop.timm_tower import timm_tower  # timm takes seconds

    ours = ("attention", "attention_by_layer", "patch_dropout")
    theirs = {key: value for key, value in content.items() if key not in ours}
    made = timm_tower(theirs, embed_dim)
    return build_section(
        asdict(made) | {key: content[key] for key in ours if key in content}, VisionTower, name
    )


def _rename_from_open_clip(content: dict[str, Any]) -> None:
    """Invert :func:`_rename_to_open_clip`; what it does not know stays, and is refused."""
    for name, (key, below) in _RENAMED.items():
        given = content.get(key)
        if given is None or given == {}:
            content.pop(key, None)
        elif isinstance(given, dict) and given.keys() == {below}:
            content[name] = content.pop(key)[below]
    activation = content.get("act_kwargs")
    if activation is None or activation == {}:
        content.pop("act_kwargs", None)
    elif activation == {"approximate": "tanh"} and "activation" not in content:
        del content["act_kwargs"]
        content["activation"] = "gelu_tanh"
