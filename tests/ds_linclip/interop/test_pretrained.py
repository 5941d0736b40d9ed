"""Pretrained weights from a folder, and frozen towers."""

import json
import logging
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.attention.zoo import ZOO, settings_of
from ds_linclip.config import (
    Attention,
    DepthwiseLocal,
    InitConfig,
    LinearAttention,
    ModelConfig,
    ParallelConfig,
    SoftmaxAttention,
    TextTower,
    VisionTower,
    load_config,
)
from ds_linclip.engine.optim import weight_decay_groups
from ds_linclip.interop.hub_folder import WEIGHTS_FILE, open_clip_config
from ds_linclip.interop.pretrained import load_pretrained
from ds_linclip.interop.state_dict import export_folder, to_open_clip
from ds_linclip.model import CLIP
from ds_linclip.model.freeze import lock_towers
from ds_linclip.parallel.mesh import Mesh

SOFTMAX = SoftmaxAttention()


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create(ParallelConfig(device="cpu"))


def small_config(
    attention: Attention = SOFTMAX, image_size: tuple[int, int] = (32, 32), width: int = 48
) -> ModelConfig:
    return ModelConfig(
        embed_dim=24,
        vision=VisionTower(
            image_size=image_size,
            patch_size=8,
            width=64,
            layers=3,
            head_width=16,
            attention=attention,
        ),
        text=TextTower(
            context_length=12, vocab_size=60, width=width, heads=3, layers=2, attention=attention
        ),
    )


def random_model(config: ModelConfig, mesh: Mesh, **kwargs: object) -> CLIP:
    model = CLIP(config, mesh, **kwargs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="module")
def folder(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pretrained")
    export_folder(random_model(small_config(), mesh), path)
    return path


@pytest.fixture(scope="module")
def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The weights as open_clip reads them."""
    return open_clip.create_model(f"local-dir:{folder}").state_dict()


def is_image(key: str) -> bool:
    return key.startswith("visual.")


def is_text(key: str) -> bool:
    return not is_image(key) and not key.startswith("logit")


@pytest.mark.parametrize(
    ("field", "is_loaded"),
    [
        ("pretrained", lambda key: True),
        ("pretrained_image", is_image),
        ("pretrained_text", is_text),
    ],
)
def test_only_the_named_weights_are_loaded(mesh, folder, stored, field, is_loaded):
    model = random_model(small_config(), mesh)
    before = to_open_clip(model)
    load_pretrained(model, InitConfig(**{field: str(folder)}))
    for key, value in to_open_clip(model).items():
        assert torch.equal(value, stored[key] if is_loaded(key) else before[key]), key


def test_towers_come_from_different_folders(mesh, folder, stored, tmp_path):
    other = random_model(small_config(), mesh)
    export_folder(other, tmp_path)
    model = random_model(small_config(), mesh)
    load_pretrained(model, InitConfig(pretrained_image=str(folder), pretrained_text=str(tmp_path)))
    texts = to_open_clip(other)
    for key, value in to_open_clip(model).items():
        if not key.startswith("logit"):
            assert torch.equal(value, stored[key] if is_image(key) else texts[key]), key


def test_only_the_named_tower_must_fit(mesh, tmp_path):
    export_folder(random_model(small_config(width=96), mesh), tmp_path)
    content = json.loads((tmp_path / "open_clip_config.json").read_text())
    content["model_cfg"]["text_cfg"] = {"hf_model_name": "some/model"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    load_pretrained(random_model(small_config(), mesh), InitConfig(pretrained_image=str(tmp_path)))
    with pytest.raises(ValueError, match="text_cfg must describe a plain transformer"):
        load_pretrained(
            random_model(small_config(), mesh), InitConfig(pretrained_text=str(tmp_path))
        )


@pytest.mark.parametrize("units", [range(2), range(1, 4), range(3, 7), range(7, 9)])
def test_a_pipeline_stage_loads_its_own_weights(mesh, folder, units):
    whole = random_model(small_config(), mesh)
    load_pretrained(whole, InitConfig(pretrained=str(folder)))
    part = CLIP(small_config(), mesh, units=units)
    load_pretrained(part, InitConfig(pretrained=str(folder)))
    expected = whole.state_dict()
    assert part.state_dict()
    for name, value in part.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("size", [(16, 16), (48, 48)])
@torch.no_grad()
def test_positions_are_interpolated_as_open_clip_does(mesh, folder, size):
    model = random_model(small_config(image_size=size), mesh)
    load_pretrained(model, InitConfig(pretrained=str(folder)))
    theirs = open_clip.create_model(f"local-dir:{folder}", force_image_size=size[0]).eval()
    torch.testing.assert_close(
        model.visual.positional_embedding, theirs.visual.positional_embedding
    )
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(
        model.encode_image(images), theirs.encode_image(images), rtol=1e-4, atol=1e-5
    )


def test_another_attention_is_accepted_on_request_and_reported(mesh, folder, stored, caplog):
    linear = LinearAttention(head_norm=True)
    model = random_model(small_config(linear), mesh)
    with pytest.raises(
        ValueError,
        match=r"init\.pretrained \(.*\): vision_cfg: .* attention softmax .*"
        r"model\.vision\.attention, not linear \(.*\), or init\.change_attention=true",
    ):
        load_pretrained(model, InitConfig(pretrained=str(folder)))
    before = to_open_clip(model)
    with caplog.at_level(logging.WARNING):
        load_pretrained(model, InitConfig(pretrained=str(folder), change_attention=True))
    assert (
        "text tower: weights were trained with attention softmax, the model has attention linear ("
        in caplog.text
    )
    for key, value in to_open_clip(model).items():
        assert torch.equal(value, stored.get(key, before[key])), key


@pytest.mark.parametrize("name", [name for name in ZOO if name != "softmax"])
def test_every_kind_starts_from_softmax_weights(mesh, folder, stored, name):
    config = small_config(settings_of(name))
    config.text.attention = settings_of(name, causal=True)
    model = CLIP(config, mesh)
    load_pretrained(model, InitConfig(pretrained=str(folder), change_attention=True))
    found = to_open_clip(model)
    assert stored.keys() <= found.keys()
    for key, value in stored.items():
        assert torch.equal(found[key], value), key
    images, texts = torch.randn(2, 3, *config.vision.image_size), torch.randint(1, 50, (2, 8))
    assert model.encode_image(images).isfinite().all()
    assert model.encode_text(texts).isfinite().all()


def test_a_new_local_part_adds_nothing_at_first(mesh, folder):
    plain, local = LinearAttention(), LinearAttention(local=DepthwiseLocal())
    images = torch.randn(2, 3, *small_config().vision.image_size)
    features = []
    for attention in (plain, local):
        model = random_model(small_config(attention), mesh)
        load_pretrained(model, InitConfig(pretrained=str(folder), change_attention=True))
        features.append(model.encode_image(images))
    assert torch.equal(*features)


def test_parameters_of_an_unchanged_kind_are_copied_and_not_left_out(mesh, tmp_path):
    attention = LinearAttention(local=DepthwiseLocal())
    model = random_model(small_config(attention), mesh)
    export_folder(model, tmp_path / "hub")
    other = random_model(small_config(attention), mesh)
    load_pretrained(other, InitConfig(pretrained=str(tmp_path / "hub")))
    for key, value in to_open_clip(model).items():
        assert torch.equal(to_open_clip(other)[key], value), key
    weights = load_file(tmp_path / "hub" / WEIGHTS_FILE)
    key = next(key for key in weights if "local_weight" in key)
    save_file({k: v for k, v in weights.items() if k != key}, tmp_path / "hub" / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=f"misses {key}"):
        load_pretrained(other, InitConfig(pretrained=str(tmp_path / "hub")))


def test_sigmoid_loss_needs_its_bias(mesh, folder):
    model = random_model(small_config(), mesh, loss="sigmoid")
    with pytest.raises(ValueError, match=r"no logit_bias.* init\.pretrained_image and init\.pre"):
        load_pretrained(model, InitConfig(pretrained=str(folder)))
    towers = InitConfig(pretrained_image=str(folder), pretrained_text=str(folder))
    load_pretrained(model, towers)


def change(folder: Path, target: Path, **values: object) -> str:
    """A copy of the folder with other values in its vision_cfg."""
    content = json.loads((folder / "open_clip_config.json").read_text())
    content["model_cfg"]["vision_cfg"] |= values
    (target / "open_clip_config.json").write_text(json.dumps(content))
    (target / "open_clip_model.safetensors").symlink_to(folder / "open_clip_model.safetensors")
    return str(target)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": 4}, r"vision_cfg\.layers \(4\) must equal model\.vision\.layers \(3\)"),
        ({"head_width": 32}, r"vision_cfg\.head_width \(32\) must equal model\.vision\.head_width"),
        (
            {"pool_type": "avg"},
            r"vision_cfg\.pool_type \(avg\) must equal model\.vision\.pool_type",
        ),
        ({"pool_type": "none"}, r"vision_cfg must describe a plain transformer: .*pool_type"),
        (
            {"image_size": 48},
            r"has visual\.positional_embedding of shape \(17, 64\), not \(37, 64\)",
        ),
    ],
)
def test_another_architecture_is_named(mesh, folder, tmp_path, values, message):
    path = change(folder, tmp_path, **values)
    size = values.get("image_size", 32)
    model = random_model(small_config(image_size=(size, size)), mesh)
    before = to_open_clip(model)
    with pytest.raises(ValueError, match=rf"init\.pretrained_image \(.*\): .*{message}"):
        load_pretrained(model, InitConfig(pretrained_image=path))
    assert all(torch.equal(value, before[key]) for key, value in to_open_clip(model).items())


def test_weights_that_are_not_those_of_the_config_are_named(mesh, folder, tmp_path):
    path = change(folder, tmp_path, layers=4)
    model = random_model(small_config(), mesh)
    model.config.vision.layers = 4
    model.visual.blocks["3"] = CLIP(small_config(), mesh).visual.blocks["0"]
    with pytest.raises(ValueError, match=r"init\.pretrained \(.*misses .*resblocks\.3\.ln_1"):
        load_pretrained(model, InitConfig(pretrained=path))


def test_missing_and_broken_files_are_named(mesh, folder, tmp_path):
    model = random_model(small_config(), mesh)
    init = InitConfig(pretrained_text=str(tmp_path))
    reason = rf"^init\.pretrained_text \({tmp_path}\)"
    with pytest.raises(ValueError, match=f"{reason} cannot be read: .*open_clip_config.json"):
        load_pretrained(model, init)
    config = tmp_path / "open_clip_config.json"
    config.write_text("{")
    with pytest.raises(ValueError, match=f"{reason}: open_clip_config.json cannot be read"):
        load_pretrained(model, init)
    config.write_bytes(b"\xef\xbb\xbf" + (folder / "open_clip_config.json").read_bytes())
    with pytest.raises(ValueError, match=f"{reason} cannot be read: .*open_clip_model.safet"):
        load_pretrained(model, init)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match=f"{reason} cannot be read"):
        load_pretrained(model, init)


@pytest.mark.parametrize("unlocked", range(1, 6))
def test_groups_are_open_clips(mesh, unlocked):
    config = small_config()
    config.text.layers = 3  # as many groups as the image tower has
    theirs = open_clip.CLIP(**open_clip_config(config)["model_cfg"])
    theirs.lock_image_tower(unlocked_groups=unlocked)
    theirs.lock_text_tower(unlocked_layers=unlocked)
    model = CLIP(config, mesh)
    init = InitConfig(
        lock_image=True,
        lock_image_unlocked_groups=unlocked,
        lock_text=True,
        lock_text_unlocked_layers=unlocked,
    )
    lock_towers(model, init)
    expected = {key for key, value in theirs.named_parameters() if value.requires_grad}
    ours = CLIP(config, mesh)  # carries what is trained as ones
    with torch.no_grad():
        for mine, parameter in zip(ours.parameters(), model.parameters(), strict=True):
            mine.fill_(float(parameter.requires_grad))
    assert {key for key, value in to_open_clip(ours).items() if value.all()} == expected


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_locked_tower_makes_no_graph_and_gets_no_optimizer_state(mesh, recompute):
    model = CLIP(small_config(LinearAttention()), mesh)
    lock_towers(model, InitConfig(lock_image=True))
    model.recompute_activations(recompute)
    image, text, *_ = model(torch.randn(2, 3, 32, 32), torch.randint(0, 60, (2, 12)))
    assert image.grad_fn is None
    assert text.requires_grad
    trained = [p for group in weight_decay_groups(model, 0.1) for p in group["params"]]
    visual = set(model.visual.parameters())
    assert not visual.intersection(trained)
    assert len(trained) == len(set(model.parameters()) - visual)


def test_the_locked_blocks_below_trained_ones_make_no_graph(mesh):
    model = CLIP(small_config(LinearAttention()), mesh)
    lock_towers(model, InitConfig(lock_image=True, lock_image_unlocked_groups=2))
    seen = {}
    for name, block in model.visual.blocks.items():
        block.register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: out}))
    model.visual(torch.randn(2, 3, 32, 32)).sum().backward()
    assert [seen[name].requires_grad for name in "012"] == [False, False, True]
    assert all((p.grad is not None) == p.requires_grad for p in model.visual.parameters())


@pytest.mark.parametrize(
    ("units", "unlocked", "added"),
    [
        (range(3), 0, {"nothing_in_a_vector", "nothing_in_a_matrix"}),
        (range(3, 5), 1, {"nothing_in_a_vector"}),  # the projection is trained
        (range(3, 5), 2, set()),
        (range(9), 0, set()),
    ],
)
def test_every_pipeline_stage_has_something_in_both_groups(mesh, units, unlocked, added):
    part = CLIP(small_config(), mesh, units=units)
    names = {name for name, _ in part.named_parameters()}
    lock_towers(part, InitConfig(lock_image=True, lock_image_unlocked_groups=unlocked))
    assert {name for name, _ in part.named_parameters()} - names == added
    assert all(group["params"] for group in weight_decay_groups(part, 0.1))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["init.pretrained=a", "init.pretrained_text=b"],
            r"init\.pretrained_text \(.*/b\) must not be set with init\.pretrained \(.*/a\)",
        ),
        (
            ["init.lock_image=true"],
            r"init\.lock_image \(true\) would freeze random .*pretrained_image",
        ),
        (
            ["init.lock_text=true", "init.pretrained_image=a"],
            r"init\.lock_text \(true\) would freeze random .*pretrained_text",
        ),
        (
            ["init.lock_text_unlocked_layers=1", "init.pretrained=a"],
            r"init\.lock_text_unlocked_layers \(1\) needs init\.lock_text=true",
        ),
        (
            ["init.pretrained=a", "init.lock_image=true", "init.lock_image_unlocked_groups=7"],
            r"init\.lock_image_unlocked_groups \(7\) must be in 0\.\.6: the blocks",
        ),
        (
            ["init.pretrained=a", "init.lock_image=true", "init.lock_text=true"],
            r"init\.lock_image \(true\) and init\.lock_text \(true\) must leave something to tr",
        ),
    ],
)
def test_bad_value_is_named_with_its_rule(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config("ds_configs/train/embedded.yaml", overrides)
