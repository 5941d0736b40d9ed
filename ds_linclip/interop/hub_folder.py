"""Writing the folder that open_clip opens: whole or not at all, and one tensor at a time."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ds_linclip.checkpoint.sharded_safetensors import (
    TensorSpec,
    write_tensors,
)
from ds_linclip.config import ModelConfig
from ds_linclip.interop.state_dict import CONFIG_FILE, WEIGHTS_FILE, open_clip_config
from ds_linclip.process.atomic import sync, write_atomically

__all__ = ["DTYPES", "layout_of", "new_folder", "write_hub_folder"]

#: By the names that the config and the commands give them.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` that takes its place when the context ends well, or is removed.

    Raises:
        ValueError: when ``output`` exists and is not an empty folder.
        OSError: when it cannot be written.
    """
    output = Path(os.path.abspath(output))
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"output folder ({output}) must not exist, or be empty")
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    staging.mkdir()
    try:
        yield staging
        sync(staging)
        staging.rename(output)
        sync(output.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def layout_of(
    shapes: Mapping[str, tuple[int, ...]], dtype: Callable[[str], torch.dtype]
) -> dict[str, TensorSpec]:
    """The order of a weights file, which follows from what is in it: wide types first, so that
    every tensor is aligned, then by name.

    Args:
        shapes: By key.
        dtype: Of a key. Scalars are never made narrower than fp32: the logit scale counts a
            logarithm, and bf16 would change the temperature by a percent.
    """
    layout = {
        key: TensorSpec(dtype(key) if shape else torch.float32, shape)
        for key, shape in shapes.items()
    }
    order = sorted(layout, key=lambda key: (-layout[key].dtype.itemsize, key))
    return {key: layout[key] for key in order}


def write_hub_folder(
    folder: Path,
    config: ModelConfig,
    layout: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
) -> None:
    """Write config and weights; no more than one tensor is held at a time.

    Args:
        folder: Where to.
        config: The architecture.
        layout: What the weights file will hold, in its order.
        read: The tensor of a key, in open_clip's layout and any floating dtype.

    Raises:
        ValueError: when a weight is beyond the range of its dtype.
        OSError: when a file cannot be written.
    """
    content = open_clip_config(config, with_bias="logit_bias" in layout)
    write_atomically(folder / CONFIG_FILE, json.dumps(content, indent=2) + "\n", durable=True)
    size = sum(facts.num_bytes for facts in layout.values())
    with tqdm(
        desc="weights", total=size, unit="B", unit_scale=True, delay=2, leave=False
    ) as progress:

        def converted() -> Iterator[Tensor]:
            for key, facts in layout.items():
                yield _convert(key, read(key), facts)
                progress.update(facts.num_bytes)

        write_tensors(folder / WEIGHTS_FILE, layout, converted())


def _convert(key: str, value: Tensor, facts: TensorSpec) -> Tensor:
    largest = torch.finfo(facts.dtype).max
    if torch.finfo(value.dtype).max > largest and value.numel():
        low, high = value.aminmax()
        if max(-low.item(), high.item()) > largest:
            raise ValueError(
                f"{key} holds values beyond {facts.dtype} ({largest:.4g}): take another --dtype"
            )
    return value.reshape(facts.shape).to(facts.dtype)
