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
from ds_linclip.model.clip import CLIP
from ds_linclip.parallel.mesh import Mesh

__all__ = [
    "WEIGHTS_FILE",
    "export_folder",
    "from_open_clip",
    "load_folder",
    "named_keys",
    "open_clip_config",
    "read_config",
    "to_open_clip",
]

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
#: Scalars in open_clip, of shape [1] here.
_SCALARS = ("logit_scale", "logit_bias")

Tower = TypeVar("Tower", VisionTower, TextTower)


def to_open_clip(model: CLIP) -> dict[str, Tensor]:
    """The weights under open_clip's names and in its layout, unsplit and in their own dtype.

    With tensor parallelism every rank must call this; each receives the whole.
    """
    weights = {}
    for name, key, parameter in named_keys(model):
        full = _gather(parameter, model.mesh)
        if ".attn.qkv." in name:
            full = full.unflatten(0, (_heads(model, name), 3, -1)).transpose(0, 1).flatten(0, 2)
        if key in _SCALARS:
            full = full.reshape(())
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
    expected = {key: _full_shape(key, parameter, model.mesh) for _, key, parameter in named}
    problems = [f"misses {key}" for key in expected if key not in state_dict]
    if only is None:
        problems += [f"has unexpected {key}" for key in state_dict if key not in expected]
    problems += [
        f"has {key} of shape {tuple(state_dict[key].shape)}, not {shape}"
        for key, shape in expected.items()
        if key in state_dict and tuple(state_dict[key].shape) != shape
    ]
    if problems:
        rest = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(
            f"open_clip state dict ({len(state_dict)} tensors) must fit the model: it "
            f"{', '.join(problems[:6])}{rest}"
        )
    with torch.no_grad():
        for name, key, parameter in named:
            full = state_dict[key]
            if ".attn.qkv." in name:
                full = full.unflatten(0, (3, _heads(model, name), -1)).transpose(0, 1).flatten(0, 2)
            parameter.copy_(_split(full, parameter, model.mesh).reshape(parameter.shape))


def open_clip_config(config: ModelConfig) -> dict[str, Any]:
    """What ``open_clip_config.json`` holds for ``config``."""
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "vision_cfg": _tower_to_dict(config.vision),
            "text_cfg": _tower_to_dict(config.text),
        }
    }


def export_folder(model: CLIP, path: str | Path) -> None:
    """Write ``model`` as a hub folder. Every rank must call this; rank 0 writes."""
    weights = to_open_clip(model)
    if model.mesh.rank == 0:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(open_clip_config(model.config), indent=2)
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
    text = (folder / CONFIG_FILE).read_text()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{CONFIG_FILE} cannot be read: {error}") from error
    try:
        cfg = dict(content["model_cfg"])
        embed_dim, vision, text = (cfg.pop(key) for key in ("embed_dim", "vision_cfg", "text_cfg"))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{CONFIG_FILE} must hold model_cfg with embed_dim, vision_cfg and text_cfg"
        ) from error
    if cfg:
        raise ValueError(f"model_cfg ({', '.join(sorted(cfg))}) must hold no such keys")
    config = ModelConfig(embed_dim=embed_dim)
    if "vision" in towers:
        config.vision = _parse_tower(VisionTower, "vision_cfg", vision)
    if "text" in towers:
        config.text = _parse_tower(TextTower, "text_cfg", text)
    return config


def named_keys(model: CLIP) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Our name, open_clip's key and the parameter, for every parameter."""
    for name, parameter in model.named_parameters():
        key = name.removeprefix("text.").replace("blocks.", "transformer.resblocks.")
        key = key.replace(".attn.qkv.", ".attn.in_proj_")
        yield name, "text_projection" if name == "text.proj" else key, parameter


def _heads(model: CLIP, name: str) -> int:
    return model.config.vision.heads if name.startswith("visual.") else model.config.text.heads


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


def _full_shape(key: str, parameter: nn.Parameter, mesh: Mesh) -> tuple[int, ...]:
    if key in _SCALARS:
        return ()
    shape, dim = list(parameter.shape), _split_dim(parameter)
    if dim is not None:
        shape[dim] *= mesh.tp.size
    return tuple(shape)


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
