"""The configuration: merging, round trip, and one clear message for each mistake."""

import json
import os
import re
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest

from ds_linclip.config import (
    Config,
    Resolution,
    Source,
    VisionTower,
    as_image_size,
    load_config,
    save_config,
)
from ds_linclip.engine.deepspeed_config import deepspeed_config
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.zero_shot.class_lists import IMAGENET_LISTS

CONFIGS = sorted(Path("ds_configs/train").glob("*.yaml"))
EMBEDDED = "ds_configs/train/embedded.yaml"


NVME = ["zero.stage=3", "zero.offload_optimizer=nvme", "zero.nvme_path=/nvme"]


@pytest.mark.long
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_survives_saving(path, tmp_path):
    config = load_config(path)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if p.stem.endswith("_softmax")], ids=lambda p: p.stem
)
def test_softmax_twin_differs_in_name_and_attention_only(path):
    twin, linear = load_config(path), load_config(str(path).replace("_softmax", ""))
    for config in (twin, linear):
        kinds = {config.model.vision.attention.kind, config.model.text.attention.kind}
        assert kinds == ({"softmax"} if config is twin else {"linear"})
    twin.name = linear.name
    twin.model.vision.attention = linear.model.vision.attention
    twin.model.text.attention = linear.model.text.attention
    assert twin == linear


def test_command_line_wins_over_file_and_file_over_base(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "train: {steps: 20, global_batch_size: 8}\noptim: {lr: 1.0, warmup_steps: 2}\n"
        "data: {train: [a.tar]}\n"
    )
    (tmp_path / "run.yaml").write_text("base: base.yaml\noptim: {lr: 2.0}\ntrain: {steps: 30}\n")
    config = load_config(tmp_path / "run.yaml", ["train.steps=40", "data.train=[x.tar,y.tar]"])
    assert (config.train.steps, config.optim.lr, config.train.global_batch_size) == (40, 2.0, 8)
    here = Path.cwd()
    assert config.data.train == [Source(shards=f"{here}/x.tar"), Source(shards=f"{here}/y.tar")]


PATTERN = "/a/{0..9}.tar"


@pytest.mark.long
@pytest.mark.parametrize(
    ("override", "sources"),
    [
        (f"data.train={PATTERN}", [Source(shards=PATTERN)]),
        (f"data.train=['{PATTERN}']", [Source(shards=PATTERN)]),
        (f"data.train=['{PATTERN}',/b.tar]", [Source(shards=PATTERN), Source(shards="/b.tar")]),
        (
            f"data.train=['{PATTERN}', {{shards: /b.tar, upsampling: 2, num_samples: 7}}]",
            [Source(shards=PATTERN), Source(shards="/b.tar", upsampling=2.0, num_samples=7)],
        ),
        (
            "data.train=[{shards: /a.tar, weight: 1}, {shards: /b.tar, weight: 0.5}]",
            [Source(shards="/a.tar", weight=1.0), Source(shards="/b.tar", weight=0.5)],
        ),
    ],
)
def test_sources_are_patterns_or_mappings(override, sources, tmp_path):
    config = load_config(EMBEDDED, [override])
    assert config.data.train == sources
    _assert_survives_saving(config, tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(f"base: {Path(EMBEDDED).absolute()}\n{_as_yaml(override)}\n")
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("override", "size"),
    [
        ("model.vision.image_size=48", (48, 48)),
        ("model.vision.image_size=[16,48]", (16, 48)),
        ("model.vision.image_size=[64, 64]", (64, 64)),
    ],
)
def test_image_size_is_a_pair_or_the_side_of_a_square(override, size, tmp_path):
    config = load_config(EMBEDDED, [override])
    assert config.model.vision.image_size == size
    assert isinstance(config.model.vision.image_size, tuple)
    _assert_survives_saving(config, tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(f"base: {Path(EMBEDDED).absolute()}\n{_as_yaml(override)}\n")
    assert load_config(path) == config


def test_image_size_follows_the_finished_steps(tmp_path):
    assert load_config(EMBEDDED).image_size_at(700) == (32, 32)
    stages = "[{image_size: 16}, {from_step: 100, image_size: [24, 32]}, {from_step: 101}]"
    stages = stages.replace("101}", "101, image_size: 32}")
    config = load_config(EMBEDDED, [f"data.resolutions={stages}"])
    assert config.data.resolutions[1] == Resolution(from_step=100, image_size=(24, 32))
    sizes = {step: config.image_size_at(step) for step in (0, 99, 100, 101, 799)}
    assert sizes == {0: (16, 16), 99: (16, 16), 100: (24, 32), 101: (32, 32), 799: (32, 32)}
    _assert_survives_saving(config, tmp_path)


def test_tokens_are_patches_and_the_class_token():
    vision = VisionTower(image_size=(32, 48), patch_size=16)
    assert vision.num_tokens == 2 * 3 + 1
    assert vision.num_tokens_at((64, 16)) == 4 * 1 + 1
    assert VisionTower().num_tokens == 197


@pytest.mark.parametrize(
    "value", ["[8, 8, 8]", "[8]", "32.0", "[32.0, 32]", "big", "'32'", "['8', 8]", "true", "", "{}"]
)
@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("model.vision.image_size={}", "model.vision.image_size"),
        (
            "data.resolutions=[{{image_size: 32}}, {{from_step: 1, image_size: {}}}]",
            "data.resolutions[1].image_size",
        ),
    ],
)
def test_image_size_of_a_wrong_shape_is_named(override, name, value):
    rule = r" \(.*\) must be an integer or \[height, width\], in pixels"
    with pytest.raises(ValueError, match=f"^{re.escape(name)}{rule}$"):
        load_config(EMBEDDED, [override.format(value)])
    with pytest.raises(ValueError, match=f"^side{rule}$"):
        as_image_size("side", (8, 8.0))


def test_interpolations_are_resolved(tmp_path):
    """A short form is written out before the merge, what it refers to is looked up after it."""
    override = "data.train=['/data/${name}/0.tar', {shards: '${output_dir}/1.tar'}]"
    config = load_config(EMBEDDED, ["name=run", "output_dir=out", override])
    found = [source.shards for source in config.data.train]
    assert found == ["/data/run/0.tar", f"{Path.cwd()}/out/1.tar"]
    _assert_survives_saving(config, tmp_path)


PATHS = """
output_dir: ../runs
init: {pretrained_image: ~/image, pretrained_text: /text}
data:
  train: ["shards/{00..09}.tar", "{a,b}/0.tar", {shards: ~/0.tar}, "s3://bucket/{0..9}.tar"]
  cache: {dir: cache}
zero: {nvme_path: nvme, deepspeed_config: ../zero.json}
eval: {data: held-out, classes: synsets.txt, templates: templates.txt}
train: {steps: 20, global_batch_size: 8}
optim: {warmup_steps: 2}
"""


def _paths(config):
    """Every path of a config."""
    return [
        *(config.output_dir, config.init.pretrained_image, config.init.pretrained_text),
        *(source.shards for source in config.data.train),
        *(config.data.cache.dir, config.zero.nvme_path, config.zero.deepspeed_config),
        *(config.eval.data, config.eval.classes, config.eval.templates),
    ]


def test_paths_in_a_file_are_relative_to_that_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "configs" / "more").mkdir(parents=True)
    (tmp_path / "configs" / "base.yaml").write_text(PATHS)
    run = tmp_path / "configs" / "more" / "run.yaml"
    run.write_text("base: ../base.yaml\neval: {data: other}\n")
    folder = f"{tmp_path}/configs"
    expected = [
        *(f"{tmp_path}/runs", "/home/me/image", "/text"),
        *(f"{folder}/shards/{{00..09}}.tar", f"{folder}/{{a,b}}/0.tar"),
        *("/home/me/0.tar", "s3://bucket/{0..9}.tar", f"{folder}/cache", f"{folder}/nvme"),
        *(f"{tmp_path}/zero.json", f"{folder}/more/other"),
        *(f"{folder}/synsets.txt", f"{folder}/templates.txt"),
    ]
    for where in (tmp_path, tmp_path / "configs" / "more"):
        monkeypatch.chdir(where)
        assert _paths(load_config(run)) == expected
        assert _paths(load_config(os.path.relpath(run))) == expected
    _assert_survives_saving(load_config(run), tmp_path)


def test_paths_on_the_command_line_are_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "base.yaml").write_text(PATHS)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = [
        "output_dir=out",
        "init.pretrained_image=../start",
        "data.train=[a.tar, '{b,c}/0.tar']",
    ]
    given += ["data.cache.dir=~/cache", "zero.deepspeed_config=zero.json", "eval.data=held"]
    given += ["eval.classes=imagenet-1k", "eval.templates=simple"]
    found = load_config("../base.yaml", given)
    here = f"{tmp_path}/here"
    assert _paths(found) == [
        *(f"{here}/out", f"{tmp_path}/start", "/text"),
        *(f"{here}/a.tar", f"{here}/{{b,c}}/0.tar", "/home/me/cache", f"{tmp_path}/nvme"),
        *(f"{here}/zero.json", f"{here}/held", "imagenet-1k", "simple"),
    ]


def test_a_path_that_no_one_sets_is_relative_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(PATHS.replace("output_dir: ../runs", ""))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert load_config("../run.yaml").output_dir == f"{tmp_path}/here/runs"


@pytest.mark.parametrize(
    "shards",
    [
        "https://host/{0..9}.tar",
        "{/a,/b}/0.tar",
        "{s3://a,/b}/0.tar",
        "pipe:cat",
        "zip::s3://a",
        "",
    ],
)
def test_urls_and_absolute_patterns_stay_as_they_are(tmp_path, shards):
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 20, global_batch_size: 8}\noptim: {warmup_steps: 2}\n")
    with pytest.raises(ValueError, match="must name shards") if not shards else nullcontext():
        assert load_config(path, [f"data.train='{shards}'"]).data.train[0].shards == shards


def test_the_shipped_configs_mean_the_folders_of_the_repository(tmp_path, monkeypatch):
    files = [path.absolute() for path in CONFIGS]
    root = Path.cwd()
    monkeypatch.chdir(tmp_path)
    for file in files:
        config = load_config(file)
        assert config.output_dir == f"{root}/runs"
        if config.zero.deepspeed_config is not None:
            assert config.zero.deepspeed_config == f"{root}/ds_configs/deepspeed/zero1.json"
        if file.stem.startswith("embedded"):
            assert config.data.train[0].shards.startswith(f"{root}/data/embedded/train/")
            assert config.eval.data == f"{root}/data/embedded/test"


def test_names_of_class_lists_and_templates_are_no_paths():
    for name in IMAGENET_LISTS:
        assert load_config(EMBEDDED, [f"eval.classes={name}"]).eval.classes == name
    for name in ("one", "simple", "openai"):
        assert load_config(EMBEDDED, [f"eval.templates={name}"]).eval.templates == name


def test_an_interpolation_of_an_unknown_key_is_named():
    with pytest.raises(ValueError, match=r"embedded\.yaml: .*nme.* not found"):
        load_config(EMBEDDED, ["eval.data='/data/${nme}'"])


def _assert_survives_saving(config, folder):
    save_config(config, folder / "config.yaml")
    assert load_config(folder / "config.yaml") == config


def _as_yaml(override):
    """``a.b=value`` as the lines a file would hold."""
    key, value = override.split("=", 1)
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(key.split("."))]
    return "\n".join(lines) + f" {value}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"unknown key \(optim\.lrr\); did you mean optim\.lr"),
        ("batch_size=8", r"unknown key \(batch_size\); did you mean .*train\.global_batch_size"),
        ("model.visoin.width=8", r"unknown key \(model\.visoin.*did you mean model\.vision"),
        ("optim.lr=fast", r"optim\.lr: Value 'fast'"),
        ("model.text.attention.kind=flash", r"kind: Invalid value 'flash'"),
        (
            "model.vision.image_size=[30,32]",
            r"model\.vision\.image_size \(30, 32\) must be .* multiple of patch_size \(4\)",
        ),
        ("model.vision.image_size=[32,33]", r"image_size \(32, 33\) must be .*patch_size \(4\)"),
        ("model.vision.image_size=33", r"image_size \(33, 33\) must be .*patch_size \(4\)"),
        ("model.vision.image_size=0", r"image_size \(0, 0\) must be .*positive"),
        ("model.vision.patch_size=5", r"image_size \(32, 32\) must be .*patch_size \(5\)"),
        ("model.vision.patch_size=0", r"image_size \(32, 32\) must be .*patch_size \(0\)"),
        ("model.text.heads=3", r"model\.text\.width \(64\) must be a positive multiple of heads"),
        ("train.steps=0", r"train\.steps \(0\) must be greater than 0"),
        ("optim.warmup_steps=100000", r"optim\.warmup_steps \(100000\) must be less than"),
        ("data.train=[]", r"data\.train \(\[\]\) must name at least one shard"),
        ("data.train=7", r"data\.train \(7\) must be a pattern or a list of sources"),
        ("data.train={shards: a.tar}", r"data\.train \(.*\) must be a pattern or a list"),
        ("data.train=", r"data\.train \(None\) must be a pattern or a list"),
        ("data.train=[7]", r"data\.train\[0\]: .*Source"),
        ("data.train=[{shrds: a.tar}]", r"key \(shrds\); did you mean data\.train\[\*\]\.shards"),
        ("data.train=[{weight: 1}]", r"data\.train\[0\]\.shards \(''\) must name shards"),
        ("data.train=''", r"data\.train\[0\]\.shards \(''\) must name shards"),
        (
            "data.train=[{shards: a.tar, weight: 1}, b.tar]",
            r"data\.train\[1\]\.weight \(None\) must be set: all sources have one or none",
        ),
        (
            "data.train=[a.tar, {shards: b.tar, weight: 1}]",
            r"data\.train\[0\]\.weight \(None\) must be set: all sources have one or none",
        ),
        (
            "data.train=[{shards: a.tar, weight: 0}, {shards: b.tar, weight: 1}]",
            r"data\.train\[0\]\.weight \(0\.0\) must not be 0: leave the source out",
        ),
        (
            "data.train=[{shards: a.tar, weight: -1}]",
            r"train\[0\]\.weight \(-1\.0\) must be greater",
        ),
        ("data.train=[{shards: a.tar, weight: .inf}]", r"weight \(inf\) must be .*finite"),
        ("data.train=[{shards: a.tar, weight: .nan}]", r"weight \(nan\) must be .*finite"),
        ("data.train=[{shards: a.tar, upsampling: 0}]", r"upsampling \(0\.0\) must be greater"),
        ("data.train=[{shards: a.tar, upsampling: .inf}]", r"upsampling \(inf\) must be .*finite"),
        (
            "data.train=[{shards: a.tar, upsampling: 2, weight: 1}]",
            r"data\.train\[0\]\.upsampling \(2\.0\) must be 1 with a weight \(1\.0\)",
        ),
        (
            "data.train=[{shards: a.tar, num_samples: 0}]",
            r"\[0\]\.num_samples \(0\) must be greater",
        ),
        ("data.resolutions=5", r"data\.resolutions \(5\) must be a list"),
        ("data.resolutions[0].image_size=32", r"data\.resolutions \(.*\) must be a list"),
        ("data.resolutions=[5]", r"data\.resolutions\[0\]: .*Resolution"),
        (
            "data.resolutions=[{image_sise: 32}]",
            r"key \(image_sise\); did you mean .*data\.resolutions\[\*\]\.image_size",
        ),
        (
            "data.resolutions=[{from_step: 1, image_size: 32}]",
            r"data\.resolutions\[0\]\.from_step \(1\) must be 0",
        ),
        (
            "data.resolutions=[{image_size: 32}, {from_step: 0, image_size: 16}]",
            r"data\.resolutions\[1\]\.from_step \(0\) must be greater than 0, the one before",
        ),
        (
            "data.resolutions=[{image_size: 32}, {from_step: 800, image_size: 16}]",
            r"data\.resolutions\[1\]\.from_step \(800\) must be less than train\.steps \(800\)",
        ),
        (
            "data.resolutions=[{image_size: 32}, {from_step: 10, image_size: [32, 18]}]",
            r"data\.resolutions\[1\]\.image_size \(32, 18\) must be .*patch_size \(4\)",
        ),
        ("data.cache.max_gib=0", r"data\.cache\.max_gib \(0\.0\) must be greater than 0"),
        ("data.network.backoff=0", r"data\.network\.backoff \(0\.0\) must be greater than 0"),
        ("data.network.max_tries=0", r"data\.network\.max_tries \(0\) must be greater than 0"),
        ("data.network.read_timeout=.nan", r"data\.network\.read_timeout \(nan\) must be"),
        ("data.max_bad_samples=0", r"data\.max_bad_samples \(0\.0\) must be in \(0, 1\]"),
        ("data.max_bad_samples=1.5", r"data\.max_bad_samples \(1\.5\) must be in \(0, 1\]"),
        ("data.max_bad_in_a_row=0", r"data\.max_bad_in_a_row \(0\) must be greater than 0"),
        ("data.prefetch_batches=0", r"data\.prefetch_batches \(0\) must be greater than 0"),
        ("data.crop_scale={a: 1}", r"command line: config: Cannot merge incompatible container"),
        ("parallel.dp=3", r"train\.global_batch_size \(128\) must be .*\(3\): 126 or 129 would do"),
        ("name=a/b", r"name \('a/b'\) must be a plain folder name"),
        ("train.seed=-1", r"train\.seed \(-1\) must not be negative"),
        ("zero.stage=7", r"zero\.stage \(7\) must be"),
        ("parallel.tp=0", r"parallel\.tp \(0\) must be greater than 0"),
        (
            "parallel.tp=3",
            r"parallel\.tp \(3\) must divide model\.vision heads \(2\): 1 or 2 would do",
        ),
        (
            "parallel.pp=7",
            r"parallel\.pp \(7\) must be at most .*layers \(6\): a stage holds at least",
        ),
        ("parallel.cp=66", r"parallel\.cp \(66\) must be at most the number of tokens .*\(65\)"),
        (
            ["parallel.cp=2", "model.vision.attention.kind=softmax"],
            r"parallel\.cp \(2\) needs model\.vision\.attention\.kind linear, .* take parallel\.cp",
        ),
        (
            ["parallel.pp=2", "zero.stage=3"],
            r"zero\.stage \(3\) must be 1 with parallel\.pp \(2\): .* take zero\.stage=1, or par",
        ),
        ("zero.offload_param=cpu", r"zero\.offload_param \(cpu\) needs zero\.stage 3, not \(1\)"),
        (
            "zero.offload_optimizer=nvme",
            r"offload_optimizer \(nvme\) needs zero\.stage 3, not \(1\)",
        ),
        (
            ["zero.offload_optimizer=nvme", "zero.stage=3"],
            r"zero\.offload_optimizer \(nvme\) needs a folder in zero\.nvme_path",
        ),
        (
            [*NVME, "optim.ema_decay=0.99"],
            r"optim\.ema_decay \(0\.99\) does not go with zero\.offload_optimizer \(nvme\)",
        ),
        ([*NVME, "optim.kind=lamb"], r"optim\.kind \(lamb\) does not go with .*_optimizer=cpu"),
        (
            ["parallel.dp=2", "train.micro_batch_size=48"],
            r"train\.micro_batch_size \(48\) must divide .* \(128 / 2 = 64\): 32 would do",
        ),
        (
            ["train.compile=true", "train.activation_checkpointing=selective"],
            r"train\.compile \(true\) needs .*activation_checkpointing none or full, not \(sel",
        ),
        ("loss.chunk_size=0", r"loss\.chunk_size \(0\) must be greater than 0"),
        ("model.vision.patch_dropout=1", r"patch_dropout \(1\.0\) must be in \[0, 1\)"),
        ("model.text.vocab_size=1000", r"vocab_size \(1000\) must be at least 49408"),
        ("model.text.context_length=2", r"context_length \(2\) must be at least 3"),
        ("model.vision.head_width=8", r"model\.vision: head dimension \(8\) must be in 16\.\.256"),
        ("watchdog.timeout_seconds=-1", r"watchdog\.timeout_seconds \(-1\.0\) must not be neg"),
        ("watchdog.timeout_seconds=.nan", r"watchdog\.timeout_seconds \(nan\) must not be neg"),
        ("watchdog.slow_rank_ratio=1", r"slow_rank_ratio \(1\.0\) must be greater than 1, or 0"),
        ("optim.lr=.nan", r"optim\.lr \(nan\) must be greater than 0 and finite"),
        ("data.train=[/x/{0..9}.tar]", r"override \(data\.train.*\) must have a YAML value; quote"),
        ("steps", r"override \(steps\) must have the form key=value"),
    ],
)
def test_bad_value_is_named_with_its_rule(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(EMBEDDED, [override] if isinstance(override, str) else override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("a: [", "not valid YAML"),
        ("- a\n- b\n", "must hold keys and values"),
        ("base: run.yaml\n", "circle"),
    ],
)
def test_unreadable_file_is_named(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path)
    assert "run.yaml" in str(caught.value)


def test_deepspeed_dictionary_is_generated_from_the_config(tmp_path):
    config = load_config(EMBEDDED, ["train.precision=bf16", "optim.clip_grad_norm=0.5"])
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps({"zero_optimization": {"overlap_comm": True}}))
    config.zero.deepspeed_config = str(extra)
    config.train.micro_batch_size = 32
    generated = deepspeed_config(config, Mesh.create())
    assert generated["train_batch_size"] == config.train.global_batch_size == 128
    assert generated["train_micro_batch_size_per_gpu"] == 32
    assert generated["gradient_accumulation_steps"] == 4
    assert generated["bf16"]["enabled"] is True
    assert generated["gradient_clipping"] == 0.5
    zero = generated["zero_optimization"]
    assert (zero["overlap_comm"], zero["stage"]) == (True, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"train_batch_size": 8}',
            "must not set train_batch_size: only .*prescale_gradients",
        ),
        ('{"zero_optimization": {"stage": 2}}', r"must not set zero_optimization\.stage"),
        (
            '{"zero_optimisation": {}}',
            "must not set zero_optimisation: only .*zero_optimization are",
        ),
        ('{"zero_optimization": {"overlap_com": true}}', "overlap_com: Extra inputs"),
        (
            '{"zero_optimization": {"round_robin_gradients": true}}',
            r".*round_robin_gradients \(true\)",
        ),
        ("{", "cannot be read"),
        ("[]", "must hold keys and values"),
    ],
)
def test_mistake_in_the_deepspeed_file_is_named(tmp_path, content, message):
    extra = tmp_path / "extra.json"
    extra.write_text(content)
    config = Config()
    config.train.global_batch_size = 8
    config.zero.deepspeed_config = str(extra)
    with pytest.raises(ValueError, match=rf"zero\.deepspeed_config \(.*extra\.json\).* {message}"):
        deepspeed_config(config, Mesh.create())


def test_commands_in_the_readme_have_overrides_that_load():
    """Every ``linclip_launch.train`` command of the README, as a shell would split it."""
    blocks = re.findall(r"```bash\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    commands = [
        shlex.split(command, comments=True)
        for block in blocks
        for command in block.replace("\\\n", " ").splitlines()
        if "linclip_launch.train" in command
    ]
    assert commands
    for command in commands:
        config, *overrides = command[command.index("linclip_launch.train") + 1 :]
        assert load_config(config, overrides).data.train
