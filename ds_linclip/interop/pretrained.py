"""Initial weights of a run, from hub folders."""

import logging
import re
from collections.abc import Container
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ds_linclip.config import InitConfig, ModelConfig
from ds_linclip.interop.hub_folder import WEIGHTS_FILE, read_config
from ds_linclip.interop.key_mapping import (
    from_open_clip_layout,
    open_clip_key,
    to_open_clip_layout,
)
from ds_linclip.interop.state_dict import from_open_clip, named_keys
from ds_linclip.model.attention import SelfAttention
from ds_linclip.model.clip import CLIP
from ds_linclip.model.towers import resample_positions

__all__ = ["load_pretrained"]

logger = logging.getLogger(__name__)

#: Field of InitConfig -> prefix of the parameters that it loads, and their towers.
_PARTS = {
    "pretrained": ("", ("vision", "text")),
    "pretrained_image": ("visual.", ("vision",)),
    "pretrained_text": ("text.", ("text",)),
}
#: A parameter that softmax attention does not have, by its name in the model.
_OWN_PARAMETER = re.compile(r"(visual|text)\.blocks\.(\d+)\.attn\.(?!qkv\.|out_proj\.)")
_TOWERS = {"visual": "vision", "text": "text"}
#: Fields of a tower's config in which weights and model may differ.
_MAY_DIFFER = ("image_size", "patch_dropout", "attention", "attention_by_layer")


def load_pretrained(model: CLIP, config: InitConfig) -> None:
    """Copy weights from the hub folders of ``config`` into this process's part of the model.

    Every process reads on its own, and only the weights it needs.

    Raises:
        ValueError: naming the field and the folder: files are missing or unreadable, the
            architecture differs, or the attention differs without ``init.change_attention``.
    """
    for field, (prefix, towers) in _PARTS.items():
        folder = getattr(config, field)
        if folder is None:
            continue
        try:
            theirs = read_config(Path(folder), towers)
            for tower in towers:
                _check_tower(tower, theirs, model.config)
                _check_attention(tower, theirs, model, may_change=config.change_attention)
            _copy(model, Path(folder) / WEIGHTS_FILE, theirs, prefix)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"init.{field} ({folder}) cannot be read: {error}") from error
        except ValueError as error:
            raise ValueError(f"init.{field} ({folder}): {error}") from error


def _check_tower(tower: str, theirs: ModelConfig, ours: ModelConfig) -> None:
    found, wanted = (
        {"embed_dim": config.embed_dim}
        | {f"{tower}.{name}": value for name, value in asdict(getattr(config, tower)).items()}
        for config in (theirs, ours)
    )
    for name, value in found.items():
        if value != wanted[name] and name.rpartition(".")[2] not in _MAY_DIFFER:
            written = name.replace(".", "_cfg.")
            raise ValueError(f"{written} ({value}) must equal model.{name} ({wanted[name]})")


def _check_attention(tower: str, theirs: ModelConfig, model: CLIP, *, may_change: bool) -> None:
    trained, wanted = (getattr(each, tower).attention_text for each in (theirs, model.config))
    if trained == wanted:
        return
    if not may_change:
        raise ValueError(
            f"{tower}_cfg: weights trained with attention {trained} need a model with the same "
            f"model.{tower}.attention, not {wanted}, or init.change_attention=true"
        )
    if model.mesh.rank == 0:
        logger.warning(
            "%s tower: weights were trained with attention %s, the model has attention %s",
            *(tower, trained, wanted),
        )


def _copy(model: CLIP, path: Path, theirs: ModelConfig, prefix: str) -> None:
    weights = load_file(path)  # maps the file: only what is copied is read
    wanted = {key for name, key, _ in named_keys(model) if name.startswith(prefix)}
    if "logit_bias" in wanted and "logit_bias" not in weights:
        raise ValueError(
            "the weights hold no logit_bias, which loss.kind sigmoid needs: set the folder as "
            "init.pretrained_image and init.pretrained_text to start with a new bias"
        )
    fresh = _start_changed_attention(model, theirs, weights, wanted)
    name = "visual.positional_embedding"
    if (key := open_clip_key(name, theirs)) in wanted & weights.keys():
        grid, own_grid = _grid(theirs), _grid(model.config)
        positions = from_open_clip_layout(name, weights[key], theirs)
        if len(positions) == theirs.vision.num_tokens:
            positions = resample_positions(positions, grid, own_grid)
            weights[key] = to_open_clip_layout(name, positions, theirs)
    from_open_clip(model, weights, only=wanted - fresh)


def _start_changed_attention(
    model: CLIP, theirs: ModelConfig, weights: Container[str], wanted: Container[str]
) -> set[str]:
    """Prepare the layers whose attention changes; return the keys of parameters that only the new
    attention has, which are not copied."""
    fresh = set()
    for name, key, _ in named_keys(model):
        found = _OWN_PARAMETER.match(name)
        if found is None or key not in wanted:
            continue
        tower, layer = _TOWERS[found[1]], int(found[2])
        before, now = (getattr(each, tower).attentions[layer] for each in (theirs, model.config))
        if before != now and not (before.kind == now.kind and key in weights):
            fresh.add(key)
            module = model.get_submodule(f"{found[1]}.blocks.{layer}.attn")
            assert isinstance(module, SelfAttention)
            module.start_from_softmax()
    return fresh


def _grid(config: ModelConfig) -> tuple[int, int]:
    height, width = config.vision.image_size
    return height // config.vision.patch_size, width // config.vision.patch_size
