"""Imports from open_clip: what is accepted and refused, and that nothing is executed."""

import json
import logging
import math
import pickle
import re
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ds_linclip.config import (
    Config,
    InitConfig,
    LinearAttention,
    ParallelConfig,
    check_model,
    load_config,
)
from ds_linclip.interop.export import export_checkpoint
from ds_linclip.interop.hub_folder import CONFIG_FILE, WEIGHTS_FILE, parse_config, read_config
from ds_linclip.interop.import_weights import _stored_keys, import_weights
from ds_linclip.interop.key_mapping import open_clip_shapes
from ds_linclip.interop.pretrained import load_pretrained
from ds_linclip.interop.state_dict import export_folder, load_folder, to_open_clip
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.trainer import train
from linclip_launch.cli import main

MODEL_CFG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create(ParallelConfig(device="cpu"))


def stock_weights(**more: object) -> dict[str, torch.Tensor]:
    model = open_clip.CLIP(**MODEL_CFG, **more)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.state_dict()


def write_folder(path: Path, weights: dict[str, torch.Tensor], **more: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / CONFIG_FILE).write_text(json.dumps({"model_cfg": MODEL_CFG | more}))
    save_file(weights, path / WEIGHTS_FILE)
    return path


def loaded(folder: Path, mesh: Mesh, loss: str = "softmax") -> dict[str, torch.Tensor]:
    """Return the weights of a run that starts from the folder."""
    model = CLIP(read_config(folder), mesh, loss=loss)
    load_pretrained(model, InitConfig(pretrained=str(folder)))
    return to_open_clip(model)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_hub_folder_is_converted_for_init_pretrained(mesh, tmp_path, loss):
    bias = {"init_logit_bias": -10.0} if loss == "sigmoid" else {}
    weights = stock_weights(**bias)
    source = write_folder(tmp_path / "in", weights, **bias)
    assert main(["import", str(source), str(tmp_path / "out")]) == 0
    found = loaded(tmp_path / "out", mesh, loss)
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert found[key].equal(value), key
    assert open_clip.create_model(f"local-dir:{tmp_path}/out").logit_scale == weights["logit_scale"]


@given(
    st.lists(
        st.sampled_from(["model.", "net.", "state_dict.", "module.", "_orig_mod."]), max_size=4
    ),
    st.lists(st.sampled_from(["module", "_orig_mod", "_checkpoint_wrapped_module"]), max_size=2),
    st.integers(0, 5),
    st.booleans(),
)
def test_wrappers_are_taken_off_in_any_nesting(around, within, place, is_custom_text):
    keys = open_clip_shapes(parse_config(MODEL_CFG), with_bias=True)
    stored = {}
    for key in keys:
        name = f"text.{key}" if is_custom_text and not key.startswith("visual.") else key
        parts = name.split(".")
        parts[min(place, len(parts) - 1) : 0] = within
        stored["".join(around) + ".".join(parts)] = key
    assert _stored_keys(Path("x"), stored) == {key: name for name, key in stored.items()}


LAYERS = {
    "vision_model.encoder.layers.{}.self_attn.k_proj.weight": "the names of Hugging Face's",
    "text_model.encoder.layers.{}.mlp.fc1.bias": "the names of Hugging Face's",
    "vision_model.head.attention.{}": "SigLIP, in Hugging Face's names",
    "visual.trunk.blocks.{}.attn.qkv.weight": "another image tower of timm",
    "module.blocks.{}.attn.qkv.weight": "an image tower of timm",
    "visual.blocks.{}.attn.q_proj.weight": "EVA-CLIP",
    "visual.layer1.{}.conv1.weight": "a ResNet",
    "text.transformer.encoder.layer.{}.output.dense.bias": "a text tower of Hugging Face",
    "text_decoder.resblocks.{}.ln_1.weight": "CoCa",
    "weight/visual.blocks.{}.ln_1.weight": "use linclip export",
    "base_model.model.visual.{}.lora_A": "adapters",
    "transformer.resblocks.{}.ln_1.weight": "the text tower only",
    "visual.transformer.resblocks.{}.ln_1.weight": "the image tower only",
    "student.visual.blocks.{}.ln_1.weight": "all keys begin with student",
    f"{'very_long_' * 1000}{{}}": "has unexpected very_long_",
}


@pytest.mark.parametrize("key", LAYERS, ids=lambda key: key[:30])
def test_other_state_dicts_are_told_apart_in_a_short_message(tmp_path, capsys, key):
    layers = {key.format(layer): torch.zeros(1) for layer in range(40)}
    source = write_folder(tmp_path / "in", layers)
    assert main(["import", str(source), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert LAYERS[key] in err
    assert len(err) < 1500 + len(str(tmp_path))
    if "resblocks" not in key:
        first = sorted(layers)[0].removeprefix("module.").removeprefix("text.")
        assert f"has unexpected {first:.120}" in err
        assert " and 37 more; it misses visual.class_embedding" in err


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(tmp_path, capsys, dtype):
    weights = {key: value.to(dtype) for key, value in stock_weights().items()}
    weights["visual.conv1.weight"][0, 0, 0, :3] = math.nan
    weights["logit_scale"] = torch.tensor(math.inf)
    source = write_folder(tmp_path / "in", weights)
    assert main(["import", str(source), str(tmp_path / "out"), "--dtype=bf16"]) == 2
    err = capsys.readouterr().err
    assert (
        f"{source / WEIGHTS_FILE}: weights must be finite, but 2 of {len(weights)} tensors" in err
    )
    assert "visual.conv1.weight (3 of 12288 values)" in err
    assert "logit_scale (1 of 1 values)" in err
    assert sorted(tmp_path.iterdir()) == [source]


def test_a_folder_of_transformers_has_no_weights_of_open_clip(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["import", str(tmp_path), str(tmp_path / "out")]) == 2
    assert f"has no {WEIGHTS_FILE}, only model.safetensors: give" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["wrapped", "custom text", "old", "scale of shape [1]"])
def test_forms_that_state_dicts_have_had(mesh, tmp_path, form):
    weights = stock_weights()
    more, stored = {}, dict(weights)
    if form == "wrapped":
        stored = {f"module.{key}": value for key, value in weights.items()}
    elif form == "custom text":
        more = {"custom_text": True}
        model = open_clip.CustomTextCLIP(**MODEL_CFG)
        is_text = {key.removeprefix("text.") for key in model.state_dict() if "text." in key[:5]}
        stored = {f"text.{k}" if k in is_text else k: v for k, v in weights.items()}
        assert stored.keys() == model.state_dict().keys()
    elif form == "old":
        stored["attn_mask"] = torch.zeros(16, 16)
        stored["input_resolution"] = torch.tensor(32)
    else:
        stored["logit_scale"] = weights["logit_scale"].reshape(1)
    source = write_folder(tmp_path / "in", stored, **more)
    import_weights(source, tmp_path / "out")
    assert load_file(tmp_path / "out" / WEIGHTS_FILE).keys() == weights.keys()
    for key, value in loaded(tmp_path / "out", mesh).items():
        assert value.equal(weights[key]), key


def test_a_file_needs_its_architecture(mesh, tmp_path, capsys):
    file, out, config = tmp_path / "w.safetensors", tmp_path / "out", tmp_path / "config.json"
    weights = stock_weights()
    save_file(weights, file)
    config.write_text(json.dumps(MODEL_CFG))  # as in open_clip's model_configs
    for arguments, message in [
        ([], "needs --config or --model"),
        (
            ["--model=ViT-B16"],
            "(ViT-B16) must be one of open_clip's names; did you mean ViT-B-16",
        ),
        (["--model=ViT-S-32"], "misses visual.transformer.resblocks.2.ln_1.weight"),
        (["--model=ViT-B-16-quickgelu"], "has visual.class_embedding of shape (64,), not (768,)"),
        (["--model=RN50"], "not a plain transformer CLIP: vision_cfg must describe"),
        (["--model=ViT-B-16-SigLIP"], "misses visual.trunk"),
        (["--model=EVA02-B-16"], "not a plain transformer CLIP: vision_cfg must describe"),
        (["--model=hf-hub:some/model"], "must be one of open_clip's names"),
        ([f"--config={tmp_path}/nowhere.json"], "nowhere.json"),
    ]:
        assert main(["import", str(file), str(out), *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
        assert not out.exists()
    assert main(["import", str(file), str(out), f"--config={config}"]) == 0
    assert loaded(out, mesh)["text_projection"].equal(weights["text_projection"])


@pytest.mark.long
def test_a_models_name_is_enough(mesh, tmp_path):
    weights = open_clip.create_model("ViT-S-32").state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    num_parameters = import_weights(
        tmp_path / "w.safetensors", tmp_path / "out", architecture="ViT-S-32", dtype="bf16"
    )
    assert num_parameters == sum(value.numel() for value in weights.values())
    for key, value in loaded(tmp_path / "out", mesh).items():
        narrow = value if key == "logit_scale" else weights[key].bfloat16().float()
        assert value.equal(narrow), key


@pytest.mark.long
def test_every_architecture_that_is_accepted_has_the_expected_state_dict():
    accepted = []
    for name in open_clip.list_models():
        content = open_clip.get_model_config(name)
        content.pop("custom_text", None)
        try:
            check_model(config := parse_config(content))
        except ValueError:
            continue
        with torch.device("meta"):
            theirs = open_clip.CLIP(**content).state_dict()
        found = {key: tuple(value.shape) for key, value in theirs.items()}
        assert found == open_clip_shapes(config, with_bias="init_logit_bias" in content), name
        accepted.append(name)
    assert len(accepted) > 50
    assert {name.split("-")[1] for name in accepted} == set("SMBLHge") | {"bigG", "SO400M", "gopt"}
    assert {name.split("-")[0] for name in accepted} == {"ViT"}


class Malicious:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._mark,)


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.safetensors", WEIGHTS_FILE])
@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_pickles_are_refused_unopened(tmp_path, capsys, name, form):
    mark, source = tmp_path / "executed", tmp_path / "in"
    content = {"state_dict": Malicious(mark)}
    write_folder(source, {})
    (source / WEIGHTS_FILE).unlink()
    if form == "pickle":
        (source / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, source / name, _use_new_zipfile_serialization=form == "torch")
    config = ["--config", str(source / CONFIG_FILE)]
    for arguments in ([str(source / name)], [str(source / name), *config], [str(source)]):
        if name == "w.safetensors" and arguments == [str(source)]:
            continue  # a folder without weights, reported as such
        code = main(["import", arguments[0], str(tmp_path / "out"), *arguments[1:]])
        err = capsys.readouterr().err
        assert code == 2
        assert "is a pickle, which can run code when it is opened: open it with" in err
        assert err.count("\n") == 1
    assert not mark.exists()
    assert sorted(tmp_path.iterdir()) == [source]
    with (source / name).open("rb") as file:  # of a path, newer torch looks at its suffix first
        pickle.load(file) if form == "pickle" else torch.load(file, weights_only=False)
    assert mark.exists(), "it would have been"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quick_gelu": "yes"}, r"quick_gelu \(yes\) must be true or false"),
        ({"vision_cfg": {"attentional_pool": True}}, r"vision_cfg .*plain .*attentional_pool"),
        (
            {"text_cfg": {"pool_type": "eos"}},
            r"text_cfg\.pool_type \(eos\) must be argmax, last or",
        ),
        ({"text_cfg": {"norm_kwargs": {"bias": False}}}, r"text_cfg .*plain .*norm_kwargs"),
        ({"text_cfg": {"act_kwargs": {"inplace": True}}}, r"text_cfg .*plain .*act_kwargs"),
        ({"multimodal_cfg": {}}, r"model_cfg \(multimodal_cfg\) must hold no such keys"),
        ({"embed_dim": "24"}, r"embed_dim \(24\) must be a positive integer"),
        ({"text_cfg": {"hf_model_name": "x"}}, r"text_cfg must describe a plain .*hf_model_name"),
        ({"vision_cfg": {"timm_model_name": "x"}}, r"vision_cfg .*plain .*timm_model_name"),
        ({"vision_cfg": {"width": 65}}, r"model\.vision\.width \(65\) must be a positive"),
        ({"text_cfg": {"vocab_size": 60}}, r"vocab_size \(60\) must be at least 49408"),
        ({"embed_dim": 25}, r"has visual\.proj of shape \(64, 24\), not \(64, 25\)"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, capsys, change, message):
    source = write_folder(tmp_path / "in", stock_weights(), **change)
    assert main(["import", str(source), str(tmp_path / "out")]) == 2
    assert re.search(message, err := capsys.readouterr().err), err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [source]


def test_damaged_and_strange_files_are_refused(tmp_path, capsys):
    weights = stock_weights()
    source = write_folder(tmp_path / "in", weights)
    file, good = source / WEIGHTS_FILE, (source / WEIGHTS_FILE).read_bytes()
    bad = {
        "is not a safetensors file": b"<html>not found</html>",
        "fetch the file with: git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid",
        "cannot be read: ": good[: len(good) // 2],
        "is a pickle": b"PK\x03\x04" + good[4:100].replace(b"{", b"}"),
    }
    for message, content in bad.items():
        file.write_bytes(content)
        assert main(["import", str(source), str(tmp_path / "out")]) == 2
        assert message in (err := capsys.readouterr().err), err
    for message, changed in {
        "misses ln_final.bias": {k: v for k, v in weights.items() if k != "ln_final.bias"},
        "has unexpected visual.extra": weights | {"visual.extra": torch.zeros(2)},
        "ln_final.bias (I64) must be one of F32": weights
        | {"ln_final.bias": torch.zeros(32, dtype=torch.int64)},
        "holds ln_final.bias twice": weights | {"text.ln_final.bias": torch.zeros(32)},
    }.items():
        save_file(changed, file)
        assert main(["import", str(source), str(tmp_path / "out")]) == 2
        assert message in (err := capsys.readouterr().err), err
    file.unlink()
    assert main(["import", str(source), str(tmp_path / "out")]) == 2
    assert f"No such file or directory: '{file}'" in capsys.readouterr().err
    assert (
        main(["import", str(tmp_path / "nowhere"), str(tmp_path / "out"), "--model=ViT-B-16"]) == 2
    )
    assert "nowhere" in capsys.readouterr().err


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    source = write_folder(tmp_path / "in", stock_weights())
    file = source / WEIGHTS_FILE
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    padded = content[8 : 8 + size].ljust(0x10280)  # 80 02 01 00 ...
    assert size < len(padded)
    file.write_bytes(len(padded).to_bytes(8, "little") + padded + content[8 + size :])
    assert import_weights(source, tmp_path / "out") > 0


def test_another_normalization_of_images_is_reported(tmp_path, caplog):
    source = write_folder(tmp_path / "in", stock_weights())
    content = json.loads((source / CONFIG_FILE).read_text())
    content["preprocess_cfg"] = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": [0.5] * 3}
    (source / CONFIG_FILE).write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        import_weights(source, tmp_path / "out")
    (message,) = caplog.messages
    assert "normalized with std [0.5, 0.5, 0.5]; ds_linclip uses (0.268" in message


def test_linear_attention_comes_back_as_it_was(mesh, tmp_path):
    config = load_config("ds_configs/train/embedded.yaml").model
    config.vision.attention = LinearAttention(head_norm=True, length_exponent=0.5)
    export_folder(CLIP(config, mesh), tmp_path / "in")
    import_weights(tmp_path / "in", tmp_path / "out")
    assert load_folder(tmp_path / "out", mesh).config == config
    before, after = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("in", "out"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].equal(value), key


@pytest.mark.long
def test_export_import_and_training_from_it(embedded_overrides, tmp_path):
    """Three runs of one step with equal losses: from the export, from the import of the export,
    and both with the loss that the exported weights give."""

    def config_of(name: str, *overrides: str) -> Config:
        small = ["model.vision.layers=1", "model.text.layers=1", "train.global_batch_size=8"]
        quiet = ["log.every_steps=1", "log.tensorboard=false", "eval.data=null"]
        rest = [f"output_dir={tmp_path}", f"name={name}", "data.num_workers=0"]
        steps = ["train.steps=2", "optim.warmup_steps=1"]
        everything = [*embedded_overrides, *small, *quiet, *rest, *steps, *overrides]
        return load_config("ds_configs/train/embedded.yaml", everything)

    def losses(config: Config) -> list[float]:
        train(config, Mesh.create())
        lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
        return [record["train/loss"] for record in map(json.loads, lines)]

    first = losses(config_of("first"))
    export_checkpoint(tmp_path / "first", tmp_path / "exported")
    import_weights(tmp_path / "exported", tmp_path / "imported")
    second = losses(config_of("second", f"init.pretrained={tmp_path}/exported"))
    third = losses(config_of("third", f"init.pretrained={tmp_path}/imported"))
    assert second == third
    assert second[0] != first[0]
    names = (CONFIG_FILE, WEIGHTS_FILE)
    written = [[(tmp_path / d / n).read_bytes() for n in names] for d in ("exported", "imported")]
    assert written[0] == written[1]
