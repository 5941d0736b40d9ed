"""CLIP families of open_clip, with random weights: the same features, and the same bits back."""

import json

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file
from timm.models import register_model
from timm.models import vision_transformer as vit

from ds_linclip.config import ParallelConfig
from ds_linclip.interop import timm_tower
from ds_linclip.interop.hub_folder import open_clip_config, parse_config
from ds_linclip.interop.import_weights import import_weights
from ds_linclip.interop.state_dict import export_folder, load_folder
from ds_linclip.parallel.mesh import Mesh
from linclip_kernels.linear_attention.reference import relative_rms

FAMILIES = (
    *("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14"),
    *("ViT-B-16-SigLIP", "ViT-B-16-SigLIP2"),
)
#: Every setting in one model of each kind that no family above has.
OTHERS = {
    "average": {
        "vision_cfg": {"pool_type": "avg", "ls_init_value": 0.1, "no_ln_pre": True},
        "text_cfg": {"pool_type": "first", "ls_init_value": 0.2, "no_causal_mask": True},
    },
    "norm of the average": {
        "vision_cfg": {"pool_type": "avg", "final_ln_after_pool": True, "patch_size": 8},
        "text_cfg": {"proj_bias": True, "norm_kwargs": {"eps": 1e-3}},
    },
    "gap": {"vision_cfg": {"timm_model_name": "vit_mini_patch16_siglip_gap_32"}},
}
WIDTH = 64


@pytest.fixture(scope="module")
def mesh():
    return Mesh.create(ParallelConfig(device="cpu"))


def _mini_vit(name, **options):
    sizes = {"embed_dim": WIDTH, "depth": 2, "num_heads": 4, "img_size": 32, "class_token": False}

    def make(pretrained=False, **kwargs):
        for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kwargs.pop(key, None)
        model = vit.VisionTransformer(**(sizes | options | kwargs))
        model.default_cfg = {}
        return model

    make.__name__, make.__module__ = name, __name__
    return register_model(make)


@pytest.fixture(scope="module", autouse=True)
def _small_towers():
    """Make timm and the names of towers here know a small SigLIP."""
    timm_tower._SIZES[WIDTH] = "mini"
    _mini_vit("vit_mini_patch16_siglip_32", global_pool="map")
    _mini_vit("vit_mini_patch16_siglip_gap_32", global_pool="avg", fc_norm=False)
    yield
    del timm_tower._SIZES[WIDTH]


def small_config(name):
    """Return the ``model_cfg`` of a family, cut to two layers and a small width."""
    base = "ViT-B-16" if name in OTHERS else name
    cfg = open_clip.get_model_config(base)
    cfg["embed_dim"] = WIDTH
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    text |= {"width": WIDTH, "heads": 4, "layers": 2, "vocab_size": 49408, "context_length": 9}
    if "timm_model_name" in vision:
        vision |= {"timm_model_name": "vit_mini_patch16_siglip_32", "image_size": 32}
    else:
        side = 2 * vision["patch_size"]
        vision |= {"width": WIDTH, "layers": 2, "image_size": [side, 2 * side], "head_width": 16}
        if base == "ViT-H-14":
            vision |= {"width": 160, "head_width": 80}
    changes = OTHERS.get(name, {})
    if "timm_model_name" in changes.get("vision_cfg", {}):
        cfg["vision_cfg"] = {"image_size": 32, "timm_pool": "avg", "timm_proj": "linear"}
    for tower, values in changes.items():
        cfg[tower] |= values
    return cfg


def random_open_clip(cfg):
    """Return open_clip's model with random values in all parameters."""
    settings = dict(cfg)
    make = CustomTextCLIP if settings.pop("custom_text", False) else CLIP
    model = make(**settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                fan = parameter[0].numel() if parameter.shape[0] > 1 else parameter.shape[-1]
                parameter.copy_(noise * fan**-0.5)
            else:
                around = 1.0 if name.endswith(("weight", "gamma")) else 0.0
                parameter.copy_(around + 0.3 * noise)
    return model


def check_family(cfg, mesh, tmp_path):
    """Check features against open_clip, and the weights after import and export."""
    theirs = random_open_clip(cfg)
    weights = {key: value.contiguous() for key, value in theirs.state_dict().items()}
    save_file(weights, tmp_path / "theirs.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    import_weights(
        tmp_path / "theirs.safetensors", tmp_path / "ours", config=tmp_path / "config.json"
    )
    ours = load_folder(tmp_path / "ours", mesh).eval()
    config = ours.config
    images = torch.randn(2, 3, *config.vision.image_size)
    texts = torch.randint(1, config.text.vocab_size, (2, config.text.context_length))
    with torch.no_grad():
        errors = {
            "image": relative_rms(ours.encode_image(images), theirs.encode_image(images).double()),
            "text": relative_rms(ours.encode_text(texts), theirs.encode_text(texts).double()),
        }
    assert max(errors.values()) <= 1e-5, errors

    export_folder(ours, tmp_path / "exported")
    back = open_clip.create_model(f"local-dir:{tmp_path / 'exported'}").eval()
    found = {key.removeprefix("text."): value for key, value in back.state_dict().items()}
    expected = {key.removeprefix("text."): value for key, value in weights.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with torch.no_grad():
        assert torch.equal(back.encode_image(images), theirs.encode_image(images))
        assert torch.equal(back.encode_text(texts), theirs.encode_text(texts))
    return errors


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_a_family_has_the_features_of_open_clip_and_its_weights_back(mesh, tmp_path, name):
    check_family(small_config(name), mesh, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_family_has_the_features_of_open_clip(mesh, tmp_path, name):
    errors = check_family(open_clip.get_model_config(name), mesh, tmp_path)
    print(f"| {name} | {errors['image']:.1e} | {errors['text']:.1e} |")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_config_of_a_family_is_kept(name):
    cfg = open_clip.get_model_config(name)
    cfg.pop("custom_text", None)
    config = parse_config(cfg)
    again = open_clip_config(config)["model_cfg"]
    assert parse_config(again) == config
    assert again.get("quick_gelu", False) == cfg.get("quick_gelu", False)
    for tower in ("vision_cfg", "text_cfg"):
        assert cfg[tower].items() <= again[tower].items()
