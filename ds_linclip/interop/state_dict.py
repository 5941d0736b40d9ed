"""Weights of a live model to and from open_clip: its state dict and its hub folder."""

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ds_linclip.checkpoint.finite_weights import check_finite
from ds_linclip.interop.hub_folder import (
    WEIGHTS_FILE,
    new_folder,
    read_config,
    write_hub_folder,
)
from ds_linclip.interop.key_mapping import (
    check_shapes,
    from_open_clip_layout,
    open_clip_key,
    open_clip_shapes,
    to_open_clip_layout,
)
from ds_linclip.model.clip import CLIP
from ds_linclip.parallel.mesh import Mesh

__all__ = ["export_folder", "from_open_clip", "load_folder", "named_keys", "to_open_clip"]


def to_open_clip(model: CLIP) -> dict[str, Tensor]:
    """Return the weights under open_clip's names and in its layout, unsplit and in their own dtype.

    With tensor parallelism every rank must call this; each receives all weights.
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
        model: Same architecture; attention may differ, except that the state dict must hold the
            gains of head norms that the model has.
        state_dict: With the keys of open_clip's ``CLIP`` (image tower under ``visual.``).
        only: Keys of the state dict to copy, ignoring its other keys; None: all, and the model must
            have all of them.

    Raises:
        ValueError: naming the missing, unexpected and mis-shaped keys, or those of weights that are
            not finite; nothing is copied then.
    """
    named = [entry for entry in named_keys(model) if only is None or entry[1] in only]
    shapes = open_clip_shapes(model.config, with_bias=True)
    expected = {key: shapes[key] for _, key, _ in named}
    given = (key for key in state_dict if only is None or key in expected)
    check_shapes({key: tuple(state_dict[key].shape) for key in given}, expected)
    check_finite((key, state_dict[key]) for key in expected)
    with torch.no_grad():
        for name, key, parameter in named:
            full = from_open_clip_layout(name, state_dict[key], model.config)
            parameter.copy_(_split(full, parameter, model.mesh))


def export_folder(model: CLIP, path: str | Path) -> None:
    """Write ``model`` as a hub folder, complete or not at all.

    Every rank must call this; rank 0 writes.

    Raises:
        AgreedError: on all ranks, when ``path`` is neither absent nor an empty folder, or cannot be
            written.
    """
    weights = to_open_clip(model)

    def write() -> None:
        if model.mesh.rank == 0:
            shapes = {key: tuple(value.shape) for key, value in weights.items()}
            with new_folder(Path(path)) as folder:
                write_hub_folder(
                    *(folder, model.config, shapes),
                    dtype=lambda key: weights[key].dtype,
                    read=lambda key: weights[key].cpu(),
                )

    model.mesh.agree(write, errors=(ValueError, OSError))


def load_folder(path: str | Path, mesh: Mesh) -> CLIP:
    """Return the model of a hub folder, from this project or open_clip, with its weights.

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


def named_keys(model: CLIP) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield the name in ``model``, open_clip's key and the parameter, for every parameter."""
    for name, parameter in model.named_parameters():
        yield name, open_clip_key(name, model.config), parameter


def _split_dim(parameter: nn.Parameter) -> int | None:
    """Return the dimension that tensor parallelism splits, as megatron's layers mark it."""
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
