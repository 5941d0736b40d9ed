"""Weights and configs to and from open_clip: its state-dict keys and its hub folder.

A hub folder holds ``open_clip_config.json`` and ``open_clip_model.safetensors``; open_clip opens
it as ``local-dir:<folder>``. The config of a linear-attention tower carries an ``attention`` entry
that stock open_clip refuses, so that such weights are never run as softmax by mistake.
"""

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ds_linclip.config import ModelConfig, TextTower, VisionTower, as_image_size
from ds_linclip.interop.key_mapping import (
    check_shapes,
    from_open_clip_layout,
    open_clip_key,
    open_clip_shapes,
    to_open_clip_layout,
)
from ds_linclip.model.clip import CLIP
from ds_linclip.parallel.mesh import Mesh

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "export_folder",
    "from_open_clip",
    "load_folder",
    "named_keys",
    "open_clip_config",
    "parse_config",
    "read_config",
    "read_content",
    "to_open_clip",
]

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
#: Of a model_cfg: values of scalars before training, of no account where there are weights.
_INITIAL_VALUES = ("init_logit_scale", "init_logit_bias")
#: What open_clip's sigmoid models start from; with it, its models have a ``logit_bias`` at all.
_INITIAL_BIAS = -10.0

Tower = TypeVar("Tower", VisionTower, TextTower)


def to_open_clip(model: CLIP) -> dict[str, Tensor]:
    """The weights under open_clip's names and in its layout, unsplit and in their own dtype.

    With tensor parallelism every rank must call this; each receives the whole.
    """
    weights = {}
    for name, key, parameter in named_keys(model):
        full = to_open_clip_layout(name, _gather(parameter, model.mesh), model.config)
        weights[key] = full.clone(memory_format=torch.contiguous_format)
    return weights


def from_open_clip(
    model: CLIP, state_dict: Mapping[str, Tensor], *, only: Container[str] | None = None
) -> None:
    """Copy the state dict of an open_clip ``CLIP`` into ``model``, in place.

    Args:
        model: same architecture; attention may differ, except that head norms have gains of their
            own, which the state dict must hold.
        state_dict: with the keys of open_clip's ``CLIP`` (image tower under ``visual.``). No more
            than one of its values is held at a time.
        only: keys of the state dict to copy, whatever others it has; None: all, and the model has
            all of them.

    Raises:
        ValueError: naming the missing, unexpected and mis-shaped keys; nothing is copied then.
    """
    named = [entry for entry in named_keys(model) if only is None or entry[1] in only]
    shapes = open_clip_shapes(model.config, with_bias=True)
    expected = {key: shapes[key] for _, key, _ in named}
    given = (key for key in state_dict if only is None or key in expected)
    check_shapes({key: tuple(state_dict[key].shape) for key in given}, expected)
    with torch.no_grad():
        for name, key, parameter in named:
            full = from_open_clip_layout(name, state_dict[key], model.config)
            parameter.copy_(_split(full, parameter, model.mesh))


def open_clip_config(config: ModelConfig, *, with_bias: bool = False) -> dict[str, Any]:
    """What ``open_clip_config.json`` holds for ``config``.

    Args:
        config: The architecture.
        with_bias: Whether the weights have a ``logit_bias``, as with the sigmoid loss.
    """
    model_cfg: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "vision_cfg": _tower_to_dict(config.vision),
        "text_cfg": _tower_to_dict(config.text),
    }
    if with_bias:
        model_cfg["init_logit_bias"] = _INITIAL_BIAS
    return {"model_cfg": model_cfg}


def export_folder(model: CLIP, path: str | Path) -> None:
    """Write ``model`` as a hub folder. Every rank must call this; rank 0 writes."""
    weights = to_open_clip(model)
    if model.mesh.rank == 0:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        content = open_clip_config(model.config, with_bias="logit_bias" in weights)
        config = json.dumps(content, indent=2)
        (folder / CONFIG_FILE).write_text(config + "\n")
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    model.mesh.barrier()


def load_folder(path: str | Path, mesh: Mesh) -> CLIP:
    """The model of a hub folder, ours or open_clip's, with its weights.

    Raises:
        ValueError: when a file is missing or unreadable, or describes another architecture.
    """
    folder = Path(path)
    try:
        config = read_config(folder)
        weights = load_file(folder / WEIGHTS_FILE)
        loss: Literal["softmax", "sigmoid"] = "sigmoid" if "logit_bias" in weights else "softmax"
        model = CLIP(config, mesh, loss=loss)
        from_open_clip(model, weights)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"open_clip folder ({folder}) cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"open_clip folder ({folder}): {error}") from error
    return model


def read_config(folder: Path, towers: Container[str] = ("vision", "text")) -> ModelConfig:
    """The architecture that a hub folder describes; a tower that is not asked for is a default one.

    Raises:
        OSError: when there is no such file.
        ValueError: when it describes another kind of model.
    """
    return parse_config(read_content(folder / CONFIG_FILE), towers)


def read_content(path: Path) -> dict[str, Any]:
    """``model_cfg`` of an ``open_clip_config.json``, or of one of open_clip's ``model_configs``.

    Raises:
        OSError: when there is no such file.
        ValueError: when it is no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # neither JSON nor text
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    found = content.get("model_cfg", content) if isinstance(content, dict) else None
    return dict(found) if isinstance(found, dict) else {}


def parse_config(
    model_cfg: Mapping[str, Any], towers: Container[str] = ("vision", "text")
) -> ModelConfig:
    """The architecture that a ``model_cfg`` describes; a tower not asked for is a default one.

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


def named_keys(model: CLIP) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Our name, open_clip's key and the parameter, for every parameter."""
    for name, parameter in model.named_parameters():
        yield name, open_clip_key(name), parameter


def _split_dim(parameter: nn.Parameter) -> int | None:
    """The dimension that tensor parallelism splits, as megatron's layers mark it."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return getattr(parameter, "partition_dim")  # noqa: B009 - not an attribute of Parameter itself


def _gather(parameter: nn.Parameter, mesh: Mesh) -> Tensor:
    own, dim = parameter.detach().contiguous(), _split_dim(parameter)
    if mesh.tp.size == 1 or dim is None:
        return own
    parts = [torch.empty_like(own) for _ in range(mesh.tp.size)]
    dist.all_gather(parts, own, group=mesh.tp.group)
    return torch.cat(parts, dim)


def _split(full: Tensor, parameter: nn.Parameter, mesh: Mesh) -> Tensor:
    dim = _split_dim(parameter)
    return full if dim is None else full.chunk(mesh.tp.size, dim)[mesh.tp.rank]


def _tower_to_dict(tower: VisionTower | TextTower) -> dict[str, Any]:
    content = asdict(tower)
    if isinstance(tower, VisionTower) and tower.image_size[0] == tower.image_size[1]:
        content["image_size"] = tower.image_size[0]  # one number, as in open_clip's own configs
    if tower.attention.kind == "softmax":
        del content["attention"]
    return content


def _parse_tower(tower: type[Tower], name: str, content: Any) -> Tower:
    defaults = {"attention": {"kind": "softmax"}}
    if isinstance(content, dict) and "image_size" in content:
        size = as_image_size(f"{name}.image_size", content["image_size"])
        content = {**content, "image_size": size}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(tower), defaults, content)
        parsed = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name} must describe a plain transformer: {reason}") from error
    assert isinstance(parsed, tower)
    return parsed
