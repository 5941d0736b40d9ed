"""``linclip import``: convert open_clip's weights to a folder for ``init.pretrained``.

The input is not trusted: only safetensors and JSON are read; pickles are refused without opening
them.
"""

import argparse
import difflib
import json
import logging
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from safetensors import SafetensorError, safe_open

from ds_linclip.config import check_model
from ds_linclip.interop.hub_folder import (
    CONFIG_FILE,
    DTYPES,
    WEIGHTS_FILE,
    new_folder,
    parse_config,
    read_model_cfg,
    write_hub_folder,
)
from ds_linclip.interop.key_mapping import SCALARS, check_shapes, open_clip_shapes

__all__ = ["import_weights", "run"]

logger = logging.getLogger(__name__)

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
#: First bytes of files that torch or pickle write: a zip archive, or pickle's protocols 2 to 5.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_REFUSED = (
    "is a pickle, which can run code when it is opened: open it with open_clip in a sandbox, and "
    "write model.state_dict() with safetensors.torch.save_file"
)
_HUGGING_FACE = (
    "CLIP in the names of Hugging Face's transformers: open the same model with open_clip, from a "
    "repository with open_clip_model.safetensors or by one of open_clip.list_pretrained(), and "
    "write model.state_dict() with safetensors.torch.save_file"
)
_DTYPES_READ = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Names of modules around a model or a part of it: of torch's parallel, compiled and checkpointed
#: modules, anywhere in a key; of trainers, at its beginning.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_TRAINERS = re.compile(r"^(?:(?:model|net|state_dict|clip)\.)+")
#: Beginnings of keys -> what state dicts with them are, and what to do; the first that fits.
_OTHERS = {
    "weight/": "a file of one of ds_linclip's checkpoints: use linclip export",
    "vision_model.head.": "SigLIP, in Hugging Face's names, whose towers are of another kind",
    "vision_model.": _HUGGING_FACE,
    "text_model.": _HUGGING_FACE,
    "visual.trunk.": "open_clip's with another image tower of timm than that of its config",
    "visual.blocks.": "EVA-CLIP, whose image tower is of another kind",
    "visual.layer1.": "CLIP with a ResNet as its image tower, not a transformer",
    "transformer.e": "an open_clip model with a text tower of Hugging Face, not a plain one",
    "text_decoder.": "CoCa, which has a third tower",
    "patch_embed.": "an image tower of timm (ViT) without a text tower",
    "blocks.": "an image tower of timm (ViT) without a text tower",
    "base_model.": "a model with adapters (peft): merge them into the weights first",
}
#: Entries of old state dicts, such as OpenAI's, that are settings and a constant mask, not weights.
_NOT_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")


def import_weights(
    source: Path,
    output: Path,
    *,
    config: Path | None = None,
    architecture: str | None = None,
    dtype: Literal["fp32", "fp16", "bf16"] | None = None,
) -> int:
    """Write the weights of open_clip's plain transformer CLIP as a folder for ``init.pretrained``.

    Args:
        source: A hub folder, or a safetensors file.
        output: The folder to write; must not exist, or be empty.
        config: For a safetensors file: its ``open_clip_config.json``.
        architecture: For a safetensors file, instead of ``config``: open_clip's name of the
            architecture, such as ViT-B-16.
        dtype: Dtype of the weights; None: unchanged. Scalars are always fp32.

    Returns:
        The number of parameters.

    Raises:
        ValueError: when the weights are not those of a plain transformer CLIP, do not fit their
            config or are a pickle, or when ``output`` holds something.
        OSError: when a file cannot be read or written.
    """
    path, model_cfg = _open_source(source, config, architecture)
    if model_cfg.get("custom_text"):  # its text tower may still be a plain one
        model_cfg = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    try:
        model = parse_config(model_cfg)
        check_model(model)
    except ValueError as error:
        raise ValueError(f"{config or source}: not a plain transformer CLIP: {error}") from error
    with new_folder(output) as folder, _opened(path) as file:
        stored = _stored_keys(path, file.keys())
        slices = {key: file.get_slice(name) for key, name in stored.items()}
        found = {key: tuple(part.get_shape()) for key, part in slices.items()}
        found |= {key: () for key in SCALARS if found.get(key) == (1,)}
        shapes = open_clip_shapes(model, with_bias="logit_bias" in found)
        try:
            check_shapes(found, shapes)
        except ValueError as error:
            raise ValueError(f"{path}{_looks_like(found)}: {error}") from error
        dtypes = {key: _dtype(path, key, part.get_dtype()) for key, part in slices.items()}
        try:
            return write_hub_folder(
                *(folder, model, shapes),
                dtype=lambda key: DTYPES[dtype] if dtype else dtypes[key],
                read=lambda key: file.get_tensor(stored[key]),
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _open_source(
    source: Path, config: Path | None, architecture: str | None
) -> tuple[Path, Mapping[str, Any]]:
    """Return the weights file and its ``model_cfg``."""
    if source.is_dir():
        if config is not None or architecture is not None:
            raise ValueError(f"{source} is a folder: --config and --model are for files")
        path = source / WEIGHTS_FILE
        names = [] if path.exists() else sorted(p.name for p in source.iterdir())
        if others := [name for name in names if name.endswith(".safetensors")]:
            raise ValueError(
                f"{source} has no {WEIGHTS_FILE}, only {others[0]}: give that file, with --config "
                "or --model"
            )
        if pickles := [name for name in names if name.endswith(_PICKLES)]:
            raise ValueError(f"{source} has no {WEIGHTS_FILE}, and {pickles[0]} {_REFUSED}")
        _refuse_pickle(path)
        _note_preprocessing(source / CONFIG_FILE)
        return path, read_model_cfg(source / CONFIG_FILE)
    _refuse_pickle(source)
    if (config is None) == (architecture is None):
        raise ValueError(
            f"{source} needs --config or --model: a weights file does not hold its architecture"
        )
    if config is not None:
        _note_preprocessing(config)
        return source, read_model_cfg(config)
    names = open_clip.list_models()
    if architecture not in names:  # with other names open_clip may access the network
        near = difflib.get_close_matches(str(architecture), names, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"--model ({architecture}) must be one of open_clip's names{hint}")
    return source, open_clip.get_model_config(architecture)


def _note_preprocessing(path: Path) -> None:
    """Warn when images were not normalized with OpenAI's statistics, as ds_linclip does."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return  # reported when the config is read
    found = content.get("preprocess_cfg") if isinstance(content, dict) else None
    ours = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    for name, value in ours.items():
        theirs = found.get(name, value) if isinstance(found, dict) else value
        if theirs != value and theirs != list(value):
            logger.warning(
                "%s: images were normalized with %s %s; ds_linclip uses %s, so features differ "
                "until the model is trained with it",
                *(path, name, theirs, value),
            )


def _refuse_pickle(path: Path) -> None:
    """Check by its first bytes, whatever its name, that a file is safetensors and not a pickle."""
    with path.open("rb") as file:
        start = file.read(300)
    is_safetensors = start[8:9] == b"{"  # the length before it may look like a pickle
    is_pickle = start.startswith(_PICKLE_STARTS) or start[257:262] == b"ustar"
    if path.suffix in _PICKLES or (is_pickle and not is_safetensors):
        raise ValueError(f"{path} {_REFUSED}")
    if not is_safetensors:
        is_pointer = start.startswith(b"version https://git-lfs")
        hint = ": it is a Git LFS pointer; fetch the file with: git lfs pull" if is_pointer else ""
        raise ValueError(f"{path} is not a safetensors file{hint}")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _stored_keys(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the names in a file by the keys of open_clip's ``CLIP``; old and wrapped models have
    prefixes."""
    stored: dict[str, str] = {}
    for name in names:
        key = _TRAINERS.sub("", _WRAPPERS.sub("", name)).removeprefix("text.")
        if key in _NOT_WEIGHTS:
            continue
        if key in stored:
            raise ValueError(f"{path} holds {key} twice, as {stored[key]} and {name}")
        stored[key] = name
    return stored


def _looks_like(keys: Collection[str]) -> str:
    """Return what a state dict is that is not a whole plain CLIP of open_clip, if that shows."""
    for beginning, kind in _OTHERS.items():
        if any(key.startswith(beginning) for key in keys):
            return f" looks like {kind}"
    has_image = any(key.startswith("visual.") for key in keys)
    has_text = any(key.startswith(("token_embedding.", "transformer.")) for key in keys)
    if has_image != has_text:
        return f" looks like the {'image' if has_image else 'text'} tower only"
    first = {key.partition(".")[0] for key in keys}
    if len(first) == 1 and not (has_image or has_text):
        return f" looks like a model inside another one: all keys begin with {first.pop():.120}"
    return ""


def _dtype(path: Path, key: str, stored: str) -> torch.dtype:
    if stored not in _DTYPES_READ:
        raise ValueError(f"{path}: {key} ({stored}) must be one of {', '.join(_DTYPES_READ)}")
    return _DTYPES_READ[stored]


def run(options: argparse.Namespace) -> None:
    """Import what a command line names, and print one line; see :func:`import_weights`."""
    num_parameters = import_weights(
        options.source,
        options.output,
        config=options.config,
        architecture=options.architecture,
        dtype=options.dtype,
    )
    sys.stdout.write(
        f"{options.output}: {num_parameters:,} parameters of {options.source}; train from it with "
        f"init.pretrained={options.output}\n"
    )
