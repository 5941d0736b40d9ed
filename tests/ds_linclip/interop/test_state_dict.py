import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from ds_linclip.config import (
    Attention,
    LinearAttention,
    ModelConfig,
    ParallelConfig,
    SoftmaxAttention,
    TextTower,
    VisionTower,
    load_config,
)
from ds_linclip.interop import hub_folder
from ds_linclip.interop.hub_folder import open_clip_config
from ds_linclip.interop.state_dict import export_folder, from_open_clip, load_folder, to_open_clip
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.consensus import AgreedError
from helpers import REPOSITORY

EXPERIMENTS = REPOSITORY / "ds_configs" / "train"
#: open_clip's name -> (our experiment, parameters)
MODELS = {
    "ViT-S-16": ("vit_s16", 62_257_537),
    "ViT-B-16": ("vit_b16", 149_620_737),
    "ViT-L-16": ("vit_l16", 427_739_393),
}
SOFTMAX = SoftmaxAttention()


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create(ParallelConfig(device="cpu"))


def small_config(
    attention: Attention = SOFTMAX, image_size: tuple[int, int] = (32, 32)
) -> ModelConfig:
    return ModelConfig(
        embed_dim=24,
        vision=VisionTower(
            image_size=image_size,
            patch_size=8,
            width=64,
            layers=2,
            head_width=16,
            attention=attention,
        ),
        text=TextTower(
            context_length=12, vocab_size=60, width=48, heads=3, layers=2, attention=attention
        ),
    )


def stock_model(config: ModelConfig) -> open_clip.CLIP:
    """open_clip's model of that architecture, with random weights and biases everywhere."""
    content = open_clip_config(config)["model_cfg"]
    model = open_clip.CLIP(**content)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def is_uniform(weight: torch.Tensor) -> bool:
    return bool(weight.abs().max() < 2 * weight.std())


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["ViT-S-16", "ViT-B-16", pytest.param("ViT-L-16", marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_features_and_state_dict_equal_open_clips(mesh: Mesh, name: str) -> None:
    experiment, num_parameters = MODELS[name]
    config = load_config(EXPERIMENTS / f"{experiment}_softmax.yaml").model
    torch.manual_seed(0)
    theirs = open_clip.create_model(name).eval()
    images = torch.randn(2, 3, 224, 224)
    texts = open_clip.tokenize(["a digit", "seven blue squares left of a very large red circle"])
    expected = theirs.encode_image(images), theirs.encode_text(texts)
    weights = theirs.state_dict()
    del theirs

    ours = CLIP(config, mesh)
    from_open_clip(ours, weights)
    assert sum(parameter.numel() for parameter in ours.parameters()) == num_parameters
    assert relative_rms(ours.encode_image(images), expected[0]) <= 1e-5
    assert relative_rms(ours.encode_text(texts), expected[1]) <= 1e-5
    exported = to_open_clip(ours)
    assert exported.keys() == weights.keys()
    for key, value in weights.items():
        assert exported[key].shape == value.shape, key
        assert torch.equal(exported[key], value), key


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (40, 8)])
@torch.no_grad()
def test_features_equal_when_no_weight_is_at_its_initial_value(
    mesh: Mesh, size: tuple[int, int]
) -> None:
    """Norms, biases, head order and the order of patches matter here; fresh weights leave biases
    at zero."""
    config = small_config(image_size=size)
    theirs = stock_model(config)
    ours = CLIP(config, mesh)
    from_open_clip(ours, theirs.state_dict())
    images, texts = torch.randn(3, 3, *size), torch.randint(0, 60, (3, 12))
    expected = theirs.encode_image(images), theirs.encode_text(texts)
    assert relative_rms(ours.encode_image(images), expected[0]) <= 1e-5
    assert relative_rms(ours.encode_text(texts), expected[1]) <= 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_experiment_has_open_clips_architecture(name: str) -> None:
    expected = open_clip.get_model_config(name)
    experiment = MODELS[name][0]
    linear = load_config(EXPERIMENTS / f"{experiment}.yaml")
    softmax = load_config(EXPERIMENTS / f"{experiment}_softmax.yaml")
    content = open_clip_config(softmax.model)["model_cfg"]
    assert content["embed_dim"] == expected["embed_dim"]
    assert CLIPVisionCfg(**content["vision_cfg"]) == CLIPVisionCfg(**expected["vision_cfg"])
    assert CLIPTextCfg(**content["text_cfg"]) == CLIPTextCfg(**expected["text_cfg"])

    for tower in (linear.model.vision, linear.model.text):
        assert tower.attention.kind == "linear"
        tower.attention = SOFTMAX
    assert softmax == replace(linear, name=softmax.name)  # the twins differ in attention alone


def test_initial_weights_are_distributed_as_open_clips(mesh: Mesh) -> None:
    config = small_config()
    config.vision.layers = config.text.layers = 3
    torch.manual_seed(0)
    ours = to_open_clip(CLIP(config, mesh))
    theirs = open_clip.CLIP(**open_clip_config(config)["model_cfg"]).state_dict()
    for key, expected in theirs.items():
        actual = ours[key]
        if expected.numel() < 2 or expected.std() == 0:
            assert torch.equal(actual, expected), key
            continue
        # Five standard errors of the difference between two samples' deviations.
        tolerance = 5 / expected.numel() ** 0.5
        assert actual.std().item() == pytest.approx(expected.std().item(), rel=tolerance), key
        if expected.numel() > 1000:  # uniform samples end at 1.73 deviations, normal ones beyond 3
            assert is_uniform(actual) == is_uniform(expected), key


@pytest.mark.parametrize(("size", "written"), [((32, 32), 32), ((16, 48), [16, 48])])
@torch.no_grad()
def test_open_clip_opens_a_softmax_export(
    mesh: Mesh, tmp_path: Path, size: tuple[int, int], written: int | list[int]
) -> None:
    ours = CLIP(small_config(image_size=size), mesh)
    export_folder(ours, tmp_path)
    content = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert content["model_cfg"]["vision_cfg"]["image_size"] == written
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    images, texts = torch.randn(3, 3, *size), torch.randint(0, 60, (3, 12))
    expected = theirs.encode_image(images), theirs.encode_text(texts)
    assert relative_rms(ours.encode_image(images), expected[0]) <= 1e-5
    assert relative_rms(ours.encode_text(texts), expected[1]) <= 1e-5


@pytest.mark.parametrize("linear_tower", ["vision", "text"])
def test_open_clip_refuses_a_linear_export(mesh: Mesh, tmp_path: Path, linear_tower: str) -> None:
    config = small_config()
    getattr(config, linear_tower).attention = LinearAttention()
    export_folder(CLIP(config, mesh), tmp_path)
    with pytest.raises(TypeError, match="attention"):
        open_clip.create_model(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    "attention",
    [
        SOFTMAX,
        LinearAttention(normalized=True, head_norm=True),
        LinearAttention(length_exponent=0.5, score_scale=0.25),
    ],
)
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
@torch.no_grad()
def test_folder_loads_back_equal(
    mesh: Mesh, tmp_path: Path, attention: Attention, size: tuple[int, int]
) -> None:
    model = CLIP(small_config(attention, size), mesh)
    for parameter in model.parameters():  # gains and biases too are away from ones and zeros
        torch.nn.init.normal_(parameter, std=0.1)
    export_folder(model, tmp_path)
    loaded = load_folder(tmp_path, mesh)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    images = torch.randn(2, 3, *size)
    assert torch.equal(loaded.encode_image(images), model.encode_image(images))


def test_exported_folder_is_complete_or_absent(mesh, tmp_path, monkeypatch):
    """The disk is full after the first tensors: the config was written before them."""

    def fails(path, layout, tensors):
        path.write_bytes(bytes(next(iter(tensors)).nbytes))
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    model = CLIP(small_config(), mesh)
    with monkeypatch.context() as patched:
        patched.setattr(hub_folder, "write_tensors", fails)
        with pytest.raises(AgreedError, match="No space left on device"):
            export_folder(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    export_folder(model, tmp_path / "out")
    assert load_folder(tmp_path / "out", mesh).config == model.config
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_export_refuses_a_folder_that_holds_files(mesh, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    message = rf"output folder \({tmp_path}\) must not exist, or be empty"
    with pytest.raises(AgreedError, match=message):
        export_folder(CLIP(small_config(), mesh), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_bad_state_dict_names_its_keys_and_changes_nothing(mesh: Mesh) -> None:
    model = CLIP(small_config(), mesh)
    before = to_open_clip(model)
    good = {key: torch.zeros_like(value) for key, value in before.items()}
    ln_final, text_projection = good.pop("ln_final.weight"), good.pop("text_projection")
    bad = good | {"visual.extra": ln_final, "text_projection": text_projection[:, :5]}
    with pytest.raises(
        ValueError,
        match=r"it has unexpected visual\.extra; it misses ln_final\.weight; "
        r"it has text_projection of shape \(48, 5\), not \(48, 24\)",
    ):
        from_open_clip(model, bad)
    bad = good | {"ln_final.weight": ln_final * math.nan, "text_projection": text_projection}
    bad["visual.proj"][0, 1] = math.inf
    with pytest.raises(ValueError, match=r"2 of \d+ tensors .*: visual\.proj \(1 of 1536 values\)"):
        from_open_clip(model, bad)
    for key, value in to_open_clip(model).items():
        assert torch.equal(value, before[key]), key


def test_many_problems_are_counted_not_listed(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match=r"misses .* and \d+ more"):
        from_open_clip(CLIP(small_config(), mesh), {})


def test_head_norm_gains_are_required(mesh: Mesh) -> None:
    weights = to_open_clip(CLIP(small_config(LinearAttention()), mesh))
    model = CLIP(small_config(LinearAttention(head_norm=True)), mesh)
    with pytest.raises(ValueError, match=r"misses visual\..*\.attn\.head_norm\.weight"):
        from_open_clip(model, weights)


def test_bad_folder_is_named(mesh: Mesh, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"open_clip folder \(.*nowhere\) cannot be read"):
        load_folder(tmp_path / "nowhere", mesh)
    export_folder(CLIP(small_config(), mesh), tmp_path)
    config_file = tmp_path / "open_clip_config.json"
    good = config_file.read_text()

    for name, message in [("multimodal_cfg", "model_cfg .multi"), ("vision_cfg", "pool_type")]:
        content = json.loads(good)
        if name == "vision_cfg":
            content["model_cfg"][name]["pool_type"] = "none"
        else:
            content["model_cfg"][name] = True
        config_file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load_folder(tmp_path, mesh)

    for given, message in [
        ([32, 32], None),
        ([32, 32, 3], r"vision_cfg\.image_size \(\[32, 32, 3\]\) must be an integer or \[height"),
        (32.0, r"vision_cfg\.image_size \(32\.0\) must be an integer or \[height"),
        ([16, 32], r"has visual\.positional_embedding of shape \(17, 64\), not \(9, 64\)"),
    ]:
        content = json.loads(good)
        content["model_cfg"]["vision_cfg"]["image_size"] = given
        config_file.write_text(json.dumps(content))
        if message is None:
            assert load_folder(tmp_path, mesh).config == small_config()
            continue
        with pytest.raises(ValueError, match=rf"open_clip folder \(.*\): .*{message}"):
            load_folder(tmp_path, mesh)

    config_file.write_text("{}")
    with pytest.raises(ValueError, match="must hold model_cfg with embed_dim"):
        load_folder(tmp_path, mesh)

    config_file.write_text(good)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="cannot be read"):
        load_folder(tmp_path, mesh)
