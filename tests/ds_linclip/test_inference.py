"""Models of every origin return their own features; unusable sources are refused."""

import io
import json
import math
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ds_linclip.config import LinearAttention, ModelConfig, TextTower, VisionTower
from ds_linclip.inference import load_model
from ds_linclip.interop.state_dict import export_folder
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from helpers import REPOSITORY

VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def image_file(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 32), (shade, 90, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create()


@pytest.fixture
def ours(mesh: Mesh, tmp_path: Path) -> tuple[CLIP, Path]:
    torch.manual_seed(0)
    config = ModelConfig(
        embed_dim=16,
        vision=VisionTower(image_size=(32, 32), patch_size=8, width=32, layers=1, head_width=16),
        text=TextTower(context_length=16, width=32, heads=2, layers=1),
    )
    config.vision.attention = config.text.attention = LinearAttention()
    model = CLIP(config, mesh).eval()
    export_folder(model, tmp_path / "ours")
    return model, tmp_path / "ours"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_hub_folder_of_this_project(ours, mesh, precision):
    model, folder = ours
    images = torch.randn(2, 3, 32, 32)
    loaded = load_model(folder, mesh, precision=precision)
    assert loaded.image_size == (32, 32)
    texts = loaded.tokenizer(["a tench", "a hen"])
    assert texts.shape == (2, 16)
    tolerance = 1e-6 if precision == "fp32" else 0.05
    for found, expected in (
        (loaded.encode_image(images), model.encode_image(images)),
        (loaded.encode_text(texts), model.encode_text(texts)),
    ):
        assert found.dtype == loaded.dtype
        torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


def test_mesh_is_optional(ours):
    model, folder = ours
    loaded = load_model(folder)
    images = torch.stack([loaded.transform(image_file(shade)) for shade in (0, 200)])
    texts = loaded.tokenizer(["a tench", "a hen"])
    assert torch.equal(loaded.encode_image(images), model.encode_image(images))
    assert torch.equal(loaded.encode_text(texts), model.encode_text(texts))


def test_other_image_sizes(ours, mesh):
    model, folder = ours
    loaded = load_model(folder, mesh, image_size=64)
    assert loaded.image_size == (64, 64)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.encode_image(images), model.encode_image(images))
    with pytest.raises(ValueError, match=r"image_size \(60\) must be a .* multiple .*\(8\)"):
        load_model(folder, mesh, image_size=60)


def test_fingerprint_identifies_a_model(ours, mesh, tmp_path):
    model, folder = ours
    first = load_model(folder, mesh).fingerprint
    shutil.copytree(folder, tmp_path / "softmax")
    config = json.loads((folder / "open_clip_config.json").read_text())
    for tower in ("vision_cfg", "text_cfg"):
        del config["model_cfg"][tower]["attention"]
    (tmp_path / "softmax" / "open_clip_config.json").write_text(json.dumps(config))
    assert load_model(tmp_path / "softmax", mesh).fingerprint != first  # of the same weights
    assert load_model(folder, mesh, image_size=64).fingerprint == first
    assert load_model(folder, mesh, precision="bf16").fingerprint != first
    with torch.no_grad():
        model.logit_scale.add_(1e-3)
    export_folder(model, tmp_path / "other")
    assert load_model(tmp_path / "other", mesh).fingerprint != first


@pytest.mark.parametrize("kind", ["linear", "softmax", "avg"])
def test_weights_that_are_not_finite_are_refused(ours, mesh, kind):
    """In this project's models and in those that open_clip loads, and after a cast."""
    _, folder = ours
    config = json.loads((folder / "open_clip_config.json").read_text())
    if kind != "linear":
        for tower in ("vision_cfg", "text_cfg"):
            del config["model_cfg"][tower]["attention"]
    if kind == "avg":
        config["model_cfg"]["vision_cfg"]["pool_type"] = "avg"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    file = folder / "open_clip_model.safetensors"
    weights = load_file(file)
    weights["ln_final.bias"][:2] = 1e6
    save_file(weights, file)
    load_model(folder, mesh, precision="bf16")
    with pytest.raises(ValueError, match=rf"{folder}\) in torch\.float16: .*ln_final\.bias \(2 "):
        load_model(folder, mesh, precision="fp16")
    weights["ln_final.bias"][:2] = math.nan
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"finite, but 1 of .*ln_final\.bias \(2 of 32 val"):
        load_model(folder, mesh)


def test_folder_that_only_open_clip_can_run(mesh, tmp_path):
    """The model uses average pooling and its own normalisation."""
    vision = {**VISION, "pool_type": "avg"}
    torch.manual_seed(0)
    theirs = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT).eval()
    model_cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess})
    )
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    loaded = load_model(tmp_path, mesh)
    images, texts = torch.randn(2, 3, 32, 32), loaded.tokenizer(["a tench", "a hen"])
    torch.testing.assert_close(loaded.encode_image(images), theirs.encode_image(images))
    torch.testing.assert_close(loaded.encode_text(texts), theirs.encode_text(texts))
    white = (REPOSITORY / "docs" / "results" / "data" / "inspection.png").read_bytes()
    assert loaded.transform(white).abs().max() <= 1.0  # (x - 0.5) / 0.5


def test_hub_folder_keeps_its_preprocessing(ours, mesh, tmp_path):
    _, folder = ours
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": 99}
    path.write_text(json.dumps(content))
    preprocess = load_model(folder, mesh).transform.preprocess
    assert (preprocess.mean, preprocess.size) == ([0.5] * 3, (32, 32))


def test_folder_of_open_clip_without_weights_is_refused(ours, mesh):
    _, folder = ours
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model \(local-dir:.*\): open_clip cannot open it"):
        load_model(folder, mesh)


def test_open_clip_name_without_tag_has_reproducible_random_weights(mesh):
    state = torch.get_rng_state()
    first = load_model("ViT-S-32-alt", mesh, image_size=64)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert load_model("ViT-S-32-alt", mesh, image_size=64).fingerprint == first.fingerprint
    assert first.encode_image(torch.randn(1, 3, 64, 64)).shape == (1, 256)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ViT-S-17", r"model \(ViT-S-17\) must be a run folder, a hub folder, or NAME"),
        ("ViT-S-32-alt:laion9b", r"model \(ViT-S-32-alt:laion9b\): open_clip cannot open it"),
        ("empty", r"run folder \(.*empty\) holds no checkpoint"),
    ],
)
def test_source_that_is_no_model_is_refused(mesh, tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    source = str(tmp_path / source) if source == "empty" else source
    with pytest.raises(ValueError, match=message):
        load_model(source, mesh)
