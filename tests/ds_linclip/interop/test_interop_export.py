"""The content of an export, what is refused, and the memory it takes."""

import json
import math
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ds_linclip.checkpoint.loading import load_weights
from ds_linclip.config import Config, ParallelConfig, load_config
from ds_linclip.inference import load_model
from ds_linclip.interop.export import export_checkpoint
from ds_linclip.interop.hub_folder import CONFIG_FILE, WEIGHTS_FILE, open_clip_config
from ds_linclip.interop.key_mapping import open_clip_shapes
from ds_linclip.interop.state_dict import load_folder
from ds_linclip.loss.grad_cache import ContrastiveLoss
from ds_linclip.model import CLIP
from ds_linclip.parallel.mesh import Mesh
from helpers.stored_checkpoints import random_weights, split_dims, write_checkpoint
from linclip_launch.cli import main

SMALL = [
    *("model.embed_dim=24", "model.vision.image_size=32", "model.vision.patch_size=8"),
    *("model.vision.width=64", "model.vision.head_width=16", "model.vision.layers=2"),
    *("model.text.width=32", "model.text.heads=2", "model.text.layers=2"),
    *("model.text.context_length=16", "train.steps=6", "optim.warmup_steps=1", "name=run"),
]
SOFTMAX = ["model.vision.attention.kind=softmax", "model.text.attention.kind=softmax"]


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create(ParallelConfig(device="cpu"))


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., Config]:
    def config_of(*overrides: str) -> Config:
        base = [*SMALL, f"output_dir={tmp_path}"]
        return load_config("ds_configs/train/embedded.yaml", [*base, *overrides])

    return config_of


@pytest.fixture
def checkpoint(config_of: Callable[..., Config], mesh: Mesh) -> Path:
    """Write a checkpoint of four ranks, with running averages of all but the locked image tower."""
    config = config_of(*SOFTMAX, "optim.ema_decay=0.5")
    model = CLIP(config.model, mesh)
    averages = {k: v for k, v in random_weights(model).items() if not k.startswith("visual.")}
    kinds = {"weight": random_weights(model), "ema": averages}
    return write_checkpoint(config, kinds, split_dims(model), tp=2, shards=2)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.long
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@torch.no_grad()
def test_open_clip_computes_our_features(config_of, mesh, tmp_path, loss):
    config = config_of(*SOFTMAX, f"loss.kind={loss}")
    model = CLIP(config.model, mesh, loss=loss)
    weights = random_weights(model)
    checkpoint = write_checkpoint(config, {"weight": weights}, split_dims(model), tp=2, shards=3)
    export_checkpoint(config.run_dir, tmp_path / "out")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/out")
    theirs.eval()
    ours = load_weights(checkpoint, mesh).eval()
    images, texts = torch.randn(3, 3, 32, 32), torch.randint(0, 49408, (3, 16))
    assert relative_rms(theirs.encode_image(images), ours.encode_image(images)) < 1e-5
    assert relative_rms(theirs.encode_text(texts), ours.encode_text(texts)) < 1e-5
    assert theirs.logit_scale == ours.logit_scale[0]
    assert theirs.logit_bias is None if loss == "softmax" else theirs.logit_bias == ours.logit_bias
    assert "Normalize" in str(preprocess)


@pytest.mark.parametrize("log_scale", [math.log(100) + 0.05, -0.02, 2.5])
def test_scale_that_leaves_a_checkpoint_is_the_one_that_the_loss_used(
    config_of, mesh, tmp_path, log_scale
):
    """A step's momentum may carry the parameter past the bounds of the loss."""
    config, parameter = config_of(), torch.tensor([log_scale])
    model = CLIP(config.model, mesh)
    weights = random_weights(model) | {"logit_scale": parameter}
    checkpoint = write_checkpoint(config, {"weight": weights}, split_dims(model))
    objective = ContrastiveLoss(config.loss, mesh)
    objective([(*F.normalize(torch.randn(2, 4, 8), dim=-1), parameter)])

    export_checkpoint(config.run_dir, tmp_path / "out")
    found = [load_file(tmp_path / "out" / WEIGHTS_FILE)["logit_scale"]]
    for source in (checkpoint, tmp_path / "out"):
        for precision in ("fp32", "bf16"):
            found.append(load_model(source, mesh, precision=precision).module.logit_scale)
    assert [each.exp().item() for each in found] == [objective.logit_scale.item()] * 5


def test_layers_that_are_all_softmax_are_written_as_open_clip_does(config_of):
    every_layer = "model.vision.attention_by_layer=[{layers: ':', attention: {kind: softmax}}]"
    model = config_of("model.text.attention.kind=softmax", every_layer).model
    assert open_clip_config(model) == open_clip_config(config_of(*SOFTMAX).model)


def test_linear_attention_is_refused_by_open_clip_and_read_here(config_of, mesh, tmp_path):
    config = config_of("model.vision.attention.head_norm=true")
    model = CLIP(config.model, mesh)
    weights = random_weights(model)
    write_checkpoint(config, {"weight": weights}, split_dims(model), tp=2, shards=2)
    export_checkpoint(config.run_dir, tmp_path / "out")
    loaded = dict(load_folder(tmp_path / "out", mesh).named_parameters())
    assert loaded.keys() == weights.keys()
    for name, value in weights.items():
        assert loaded[name].equal(value), name
    with pytest.raises(TypeError, match="attention"):
        open_clip.create_model(f"local-dir:{tmp_path}/out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: ds_linclip" in card
    assert "open_clip refuses" in card


def test_bytes_follow_from_the_weights_not_from_the_layout(config_of, mesh, tmp_path):
    config = config_of(*SOFTMAX)
    model = CLIP(config.model, mesh)
    kinds, split = {"weight": random_weights(model)}, split_dims(model)
    found = []
    for step, (tp, shards) in enumerate([(1, 1), (1, 3), (2, 1), (2, 2)], start=1):
        write_checkpoint(config, kinds, split, step=step, tp=tp, shards=shards)
        export_checkpoint(config.run_dir, tmp_path / f"out{step}", step=step)
        folder = tmp_path / f"out{step}"
        found.append([(folder / name).read_bytes() for name in (WEIGHTS_FILE, CONFIG_FILE)])
    assert all(content == found[0] for content in found)


def test_averages_are_exported_unless_raw_weights_are_requested(checkpoint, mesh, tmp_path):
    for requested in ("ema", "raw", None):
        exported = export_checkpoint(checkpoint, tmp_path / f"{requested}", weights=requested)
        assert exported.weights == (requested or "ema")
    default, ema, raw = (load_file(tmp_path / n / WEIGHTS_FILE) for n in ("None", "ema", "raw"))
    seen = load_weights(checkpoint, mesh)
    for key, value in ema.items():
        assert default[key].equal(value)
        is_locked = key.startswith("visual.")
        assert raw[key].equal(value) == is_locked, key
    assert ema["ln_final.bias"].equal(seen.text.ln_final.bias)


def test_asking_for_a_missing_average_is_an_error(config_of, mesh, tmp_path):
    config = config_of()
    model = CLIP(config.model, mesh)
    write_checkpoint(config, {"weight": random_weights(model)}, split_dims(model))
    message = r"no running average .*ema_decay 0\.0\): use --weights raw"
    with pytest.raises(ValueError, match=message):
        export_checkpoint(config.run_dir, tmp_path / "out", weights="ema")
    assert export_checkpoint(config.run_dir, tmp_path / "out").weights == "raw"


@pytest.mark.long
@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_half_precision(checkpoint, tmp_path, name):
    export_checkpoint(checkpoint, tmp_path / "full")
    export_checkpoint(checkpoint, tmp_path / "half", dtype=name)
    full, half = (load_file(tmp_path / folder / WEIGHTS_FILE) for folder in ("full", "half"))
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
    for key, value in full.items():
        wanted = value if key == "logit_scale" else value.to(dtype)
        assert half[key].dtype == wanted.dtype
        assert half[key].equal(wanted), key
    open_clip.create_model(f"local-dir:{tmp_path}/half")


def test_weight_beyond_the_range_of_fp16_is_named(config_of, mesh, tmp_path, capsys):
    config = config_of()
    model = CLIP(config.model, mesh)
    weights = random_weights(model)
    weights["visual.ln_pre.weight"][3] = -1e5
    write_checkpoint(config, {"weight": weights}, split_dims(model))
    assert main(["export", str(config.run_dir), str(tmp_path / "out"), "--dtype=fp16"]) == 2
    assert "visual.ln_pre.weight holds values beyond torch.float16" in capsys.readouterr().err
    assert main(["export", str(config.run_dir), str(tmp_path / "out"), "--dtype=bf16"]) == 0


@pytest.mark.long
@pytest.mark.parametrize(
    "damage", ["bit", "short", "gone", "config", "manifest", "place", "format", "old"]
)
def test_damage_is_named_and_nothing_is_written(checkpoint, tmp_path, capsys, damage):
    good = tmp_path / "good"
    export_checkpoint(checkpoint, good)
    before = {path: path.read_bytes() for path in good.iterdir()}
    shard, manifest = checkpoint / "rank-00002.safetensors", checkpoint / "manifest.json"
    expected = {
        "bit": rf"{shard}\) does not match .*its content differs; take an older checkpoint, or",
        "short": rf"{shard}\) does not match .*it has 5 bytes instead of \d+; take",
        "gone": rf"{shard}\) does not match .*cannot be read, No such file or directory; take",
        "config": rf"{checkpoint}/config\.yaml\) does not match",
        "manifest": rf"{manifest} cannot be read",
        "place": rf"{manifest} does not match its checksum",
        "format": rf"{manifest}: format \(1\) must be 2: another version",
        "old": rf"{manifest}: format \(none\) must be 2: another version",
    }[damage]
    if damage == "bit":
        flip_a_bit(shard)
    elif damage == "short":
        os.truncate(shard, 5)
    elif damage == "gone":
        shard.unlink()
    elif damage == "config":
        flip_a_bit(checkpoint / "config.yaml")
    elif damage == "manifest":
        manifest.write_text("{")
    elif damage == "place":
        manifest.write_text(manifest.read_text().replace('"start": 0', '"start": 1', 1))
    else:
        content = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(content | {"format": 1} if damage == "format" else {}))
    there = sorted(tmp_path.iterdir())
    for source in (checkpoint, checkpoint.parents[1]):
        assert main(["export", str(source), str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert re.match(f"error: .*{expected}", err), err
    assert sorted(tmp_path.iterdir()) == there
    assert {path: path.read_bytes() for path in good.iterdir()} == before


def test_bad_places_are_named(checkpoint, tmp_path, capsys):
    run, out = checkpoint.parents[1], tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in [
        ([run, out, "--step=5"], f"({run}) holds no checkpoint of step 5, only of 6"),
        ([checkpoint, out, "--step=6"], "--step (6) needs a run folder"),
        ([tmp_path / "nowhere", out], "nowhere) does not exist"),
        ([tmp_path / "empty", out], f"run folder ({tmp_path}/empty) holds no checkpoint"),
        ([run, tmp_path / "full"], f"({tmp_path}/full) must not exist, or be empty"),
        ([run, tmp_path / "full" / "file"], "file) must not exist, or be empty"),
        ([run, tmp_path / "full" / "file" / "out"], f"{tmp_path}/full/file'"),
    ]:
        assert main(["export", *map(str, arguments)]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
        assert not out.exists()
    assert main(["export", str(run), str(tmp_path / "empty"), "--step=6"]) == 0


@pytest.mark.long
def test_the_command_prints_one_line(tmp_path):
    command = [sys.executable, "-m", "linclip_launch"]
    command += ["export", tmp_path / "nowhere", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"error: run folder ({tmp_path}/nowhere) does not exist\n"
    assert done.stdout == ""


def test_a_disk_that_is_full_is_named_and_leaves_nothing(checkpoint, tmp_path, capsys):
    there = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code = main(["export", str(checkpoint), str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert f"File too large: '{tmp_path}/.out." in (err := capsys.readouterr().err)
    assert WEIGHTS_FILE in err
    assert sorted(tmp_path.iterdir()) == there


def test_weights_that_are_not_finite_are_named(config_of, mesh, tmp_path, capsys):
    config = config_of("optim.ema_decay=0.5")
    model = CLIP(config.model, mesh)
    weights, averages = random_weights(model), random_weights(model)
    weights["visual.proj"][3, 4] = math.nan
    weights["text.ln_final.bias"][:2] = -math.inf
    split = split_dims(model)
    checkpoint = write_checkpoint(config, {"weight": weights, "ema": averages}, split, tp=2)
    assert main(["export", str(checkpoint), str(tmp_path / "ema")]) == 0
    for dtype in ("fp32", "fp16"):
        command = ["export", str(checkpoint), str(tmp_path / "out"), "--weights=raw"]
        assert main([*command, f"--dtype={dtype}"]) == 2
        err = capsys.readouterr().err
        assert f"checkpoint ({checkpoint}): weights must be finite, but 2 of " in err
        assert "visual.proj (1 of 1536 values)" in err
        assert "ln_final.bias (2 of 32 values)" in err
        assert not (tmp_path / "out").exists()


def test_checkpoint_of_another_model_is_refused(config_of, mesh, tmp_path):
    """The config and the parameters are checked against each other, not only their bytes."""
    config = config_of()
    model = CLIP(config.model, mesh)
    weights, split = random_weights(model), split_dims(model)
    del weights["visual.proj"]
    weights["text.proj"] = weights["text.proj"][:, :5]
    write_checkpoint(config, {"weight": weights}, split)
    message = r"misses visual\.proj; it has text_projection of shape \(32, 5\), not \(32, 24\)"
    with pytest.raises(ValueError, match=message):
        export_checkpoint(config.run_dir, tmp_path / "out")


def test_card_says_what_was_trained_and_how_it_scored(checkpoint, tmp_path):
    run = checkpoint.parents[1]
    records = [
        {"step": 2, "train/loss": 9.0, "train/lr": 1.0},
        {"step": 4, "eval/zeroshot_top1": 0.25, "eval/zeroshot_top5": None},
        {"step": 6, "train/loss": 8.0},
        {"step": 5, "train/loss": 7.0},
        {"step": 6, "train/loss": 6.5},  # again, after a resume
        {"step": 7, "train/loss": 1.0, "eval/zeroshot_top1": 0.5},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run / "metrics.jsonl").write_text(lines + '{"step": 6, "train')
    export_checkpoint(run, tmp_path / "out", dtype="bf16", weights="raw")
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "unknown",
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip"],
    }
    for line in [
        "# out",
        "| image tower | ViT, 32 x 32 px in patches of 8, 2 layers of width 64, 4 heads, "
        "softmax attention |",
        "| steps | 6 of 6 |",
        "| global batch | 128 pairs; 768 seen |",
        "| weights | as trained, no average |",
        "| layout | dp 2, tp 2, pp 1, cp 1, ZeRO stage 1 |",
        "| versions | torch 2.11.0, deepspeed 0.19.8 |",
        "| `train/loss` | 6.5000 | 6 |",
        "| `eval/zeroshot_top1` | 0.2500 | 4 |",
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:out")',
    ]:
        assert line in body.splitlines()
    assert "average of the weights, which this folder does not contain." in body
    assert str(tmp_path) not in body
    assert "| data | train/{00000..00007}.tar |" in body.splitlines()
    assert "Evaluation is on embedded/test" in body
    assert str(Path.cwd()) not in body


def test_card_hides_what_is_secret_in_urls(config_of, mesh, tmp_path):
    config = config_of(
        "data.train=['https://me:pw@host/a|b/{0..3}.tar?sig=abc']", "data.cache.dir=c"
    )
    model = CLIP(config.model, mesh)
    write_checkpoint(config, {"weight": random_weights(model)}, split_dims(model))
    export_checkpoint(config.run_dir, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert r"| data | https://host/a\|b/{0..3}.tar |" in card
    assert "The run folder of the checkpoint has no metrics." in card


@pytest.mark.long
@pytest.mark.parametrize(
    "attention", [[], SOFTMAX, ["model.vision.attention.head_norm=true"]], ids=str
)
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_shapes_are_those_of_the_models(config_of, mesh, tmp_path, attention, loss):
    config = config_of(*attention, "model.text.mlp_ratio=2.7", "model.vision.image_size=[16,40]")
    model = CLIP(config.model, mesh, loss=loss)
    write_checkpoint(config, {"weight": random_weights(model)}, split_dims(model))
    shapes = open_clip_shapes(config.model, with_bias=loss == "sigmoid")
    if attention == SOFTMAX:
        content = open_clip_config(config.model)["model_cfg"]
        bias = {"init_logit_bias": -10.0} if loss == "sigmoid" else {}
        theirs = open_clip.CLIP(**content, **bias).state_dict()
        assert {key: tuple(value.shape) for key, value in theirs.items()} == shapes


MEMORY_JOB = """
import sys, threading, time
from pathlib import Path
from ds_linclip.interop.export import export_checkpoint

def anonymous_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_kib())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
for dtype in ("bf16", "fp32"):
    before = peak = anonymous_kib()
    export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]) / dtype, dtype=dtype)
    sys.stdout.write(f"{(peak - before) * 1024}\\n")
done = True
watcher.join()
"""


@pytest.mark.long
def test_memory_is_bounded_by_the_largest_parameter(config_of, mesh, tmp_path):
    """Anonymous memory, what a process cannot give back by dropping pages of files: sampled every
    2 ms, growth over what it was after the imports. Model: 330 MB; largest parameter: 25 MB."""
    wide = ["model.vision.width=1024", "model.vision.head_width=64", "model.vision.layers=6"]
    config = config_of(*wide, "model.text.width=128")
    model = CLIP(config.model, mesh)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.nbytes for p in weights.values()]
    assert sum(sizes) > 300e6
    write_checkpoint(config, {"weight": weights}, split_dims(model), tp=2, shards=3)
    command = [sys.executable, "-c", MEMORY_JOB, config.run_dir, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    growths = [int(line) for line in done.stdout.splitlines()[-2:]]
    print(*(f"{growth / max(sizes):.2f} of the largest parameter" for growth in growths))
    assert max(growths) < 4 * max(sizes)
    stored = load_file(tmp_path / "fp32" / WEIGHTS_FILE)
    assert sum(value.numel() for value in stored.values()) == sum(sizes) // 4
