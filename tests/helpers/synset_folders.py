"""A hub folder with a tiny random model, and folders of noise images named by synsets."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ds_linclip.config import LinearAttention, ModelConfig, TextTower, VisionTower
from ds_linclip.interop.state_dict import export_folder
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh


def write_hub_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = ModelConfig(
        embed_dim=32,
        vision=VisionTower(image_size=(16, 16), patch_size=8, width=32, layers=1, head_width=16),
        text=TextTower(context_length=24, width=32, heads=2, layers=1),
    )
    config.vision.attention = config.text.attention = LinearAttention()
    export_folder(CLIP(config, Mesh.create()), folder)
    return folder


def write_images(folder: Path, synsets: Iterable[str], per_class: int) -> Path:
    generator = np.random.default_rng(0)
    for synset in synsets:
        (folder / synset).mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.integers(0, 256, (20, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / synset / f"{synset}_{number}.JPEG")
    return folder
