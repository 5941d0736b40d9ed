"""Training that starts from the weights of a hub folder."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ds_linclip.config import Attention, InitConfig, ModelConfig, TextTower, VisionTower
from ds_linclip.interop.state_dict import (
    WEIGHTS_FILE,
    from_open_clip,
    named_keys,
    read_config,
)
from ds_linclip.model.clip import CLIP
from ds_linclip.model.towers import resample_positions

__all__ = ["load_pretrained"]

logger = logging.getLogger(__name__)

#: What our parameters are called that a field of InitConfig asks for, and the towers they are in.
_PARTS = {
    "pretrained": ("", ("vision", "text")),
    "pretrained_image": ("visual.", ("vision",)),
    "pretrained_text": ("text.", ("text",)),
}
#: Of a tower's config, what weights of another value still fit.
_MAY_DIFFER = ("image_size", "patch_dropout", "attention")


def load_pretrained(model: CLIP, config: InitConfig) -> None:
    """Copy weights from the hub folders of ``config`` into what this process holds of the model.

    Every process reads for itself, and of the weights file only what it needs.

    Raises:
        ValueError: naming the field and the folder, when files are missing or unreadable, or of
            another architecture; also of another attention, unless that is asked for.
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
    pairs = [("embed_dim", theirs.embed_dim, ours.embed_dim)]
    mine = asdict(getattr(ours, tower))
    for name, value in asdict(getattr(theirs, tower)).items():
        if name not in _MAY_DIFFER:
            pairs.append((f"{tower}.{name}", value, mine[name]))
    for name, value, wanted in pairs:
        if value != wanted:
            written = name.replace(".", "_cfg.")
            raise ValueError(f"{written} ({value}) must equal model.{name} ({wanted})")


def _check_attention(tower: str, theirs: ModelConfig, model: CLIP, *, may_change: bool) -> None:
    trained, wanted = (_attention(getattr(config, tower)) for config in (theirs, model.config))
    if trained == wanted:
        return
    if not may_change:
        raise ValueError(
            f"{tower}_cfg: weights trained with attention ({_words(trained)}) must go into a model "
            f"with the same model.{tower}.attention ({_words(wanted)}), or "
            "init.change_attention=true"
        )
    if model.mesh.rank == 0:
        logger.warning(
            "%s tower: weights trained with %s attention go on with %s attention",
            tower,
            _words(trained),
            _words(wanted),
        )


def _attention(tower: VisionTower | TextTower) -> Attention:
    """With softmax, the other fields have no effect."""
    attention = tower.attention
    return Attention(kind="softmax") if attention.kind == "softmax" else attention


def _words(attention: Attention) -> str:
    if attention.kind == "softmax":
        return "softmax"
    return ", ".join(f"{name} {value}" for name, value in asdict(attention).items())


def _copy(model: CLIP, path: Path, theirs: ModelConfig, prefix: str) -> None:
    with safe_open(path, framework="pt") as file:
        weights = _Weights(file, theirs, model.config)
        wanted = {key for name, key, _ in named_keys(model) if name.startswith(prefix)}
        if "logit_bias" in wanted and "logit_bias" not in weights:
            raise ValueError(
                "the weights hold no logit_bias, which loss.kind sigmoid needs: take the folder as "
                "init.pretrained_image and init.pretrained_text, and the bias starts anew"
            )
        gains = {key for key in wanted if ".head_norm." in key and not _has_gains(key, theirs)}
        from_open_clip(model, weights, only=wanted - gains)


def _has_gains(key: str, config: ModelConfig) -> bool:
    tower = config.vision if key.startswith("visual.") else config.text
    return tower.attention.kind == "linear" and tower.attention.head_norm


class _Weights(Mapping[str, Tensor]):
    """What a safetensors file holds, read when it is asked for; positions on the model's grid."""

    def __init__(self, file: Any, theirs: ModelConfig, ours: ModelConfig) -> None:
        self._file = file
        self._keys = set(file.keys())
        self._grids = [
            (config.image_size[0] // config.patch_size, config.image_size[1] // config.patch_size)
            for config in (theirs.vision, ours.vision)
        ]

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        value = self._file.get_tensor(key)
        grid, wanted = self._grids
        if key == "visual.positional_embedding" and len(value) == 1 + grid[0] * grid[1]:
            return resample_positions(value, grid, wanted)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
