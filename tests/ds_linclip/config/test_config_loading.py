"""Loading a configuration: merging, round trip, paths, short forms."""

import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from ds_linclip.config import (
    Resolution,
    SoftmaxAttention,
    Source,
    VisionTower,
    load_config,
    save_config,
    with_steps,
)
from linclip_eval.zero_shot.class_lists import IMAGENET_LISTS

EMBEDDED = "ds_configs/train/embedded.yaml"
CONFIGS = sorted(Path("ds_configs/train").glob("*.yaml"))


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


@pytest.mark.parametrize(
    ("override", "steps", "epochs"),
    [
        ("train.steps=7", 7, None),
        ("train.samples=80", 10, None),
        ("train.samples=81", 11, None),
        ("train.epochs=0.5", 0, 0.5),
    ],
)
def test_a_later_length_replaces_an_earlier_one(tmp_path, override, steps, epochs):
    (tmp_path / "run.yaml").write_text(
        "train: {steps: 20, global_batch_size: 8}\noptim: {warmup_steps: 2}\n"
        "data: {train: [a.tar]}\n"
    )
    config = load_config(tmp_path / "run.yaml", [override])
    assert (config.train.steps, config.train.epochs, config.train.samples) == (steps, epochs, None)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert with_steps(config, samples_per_epoch=101).train.steps == (steps or 7)


def test_two_lengths_of_one_source_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("data: {train: [a.tar]}\ntrain: {global_batch_size: 8}\n")
    with pytest.raises(ValueError, match=r"train\.steps \(9\) and train\.epochs \(2\.0\) exclude"):
        load_config(tmp_path / "run.yaml", ["train.steps=9", "train.epochs=2"])


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
        ("model.vision.image_size='064'", (64, 64)),
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


def test_interpolations_are_resolved(tmp_path):
    """A short form is written out before the merge, what it refers to is looked up after it."""
    override = "data.train=['/data/${name}/0.tar', {shards: '${output_dir}/1.tar'}]"
    config = load_config(EMBEDDED, ["name=run", "output_dir=out", override])
    found = [source.shards for source in config.data.train]
    assert found == ["/data/run/0.tar", f"{Path.cwd()}/out/1.tar"]
    _assert_survives_saving(config, tmp_path)
    whole = load_config(EMBEDDED, ["model.text.attention=${model.vision.attention}"])
    assert whole == load_config(EMBEDDED)


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
        "s3://$bucket/~/a.tar",
    ],
)
def test_urls_and_absolute_patterns_stay_as_they_are(tmp_path, shards):
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 20, global_batch_size: 8}\noptim: {warmup_steps: 2}\n")
    for override in (f"data.train={shards}", f"data.train='{shards}'", f"data.train=['{shards}']"):
        config = load_config(path, [override])
        assert config.data.train == [Source(shards=shards)]
    _assert_survives_saving(config, tmp_path)


@pytest.mark.parametrize("variable", [None, "elsewhere"])
def test_the_shipped_configs_have_names_and_work_in_any_folder(tmp_path, monkeypatch, variable):
    files = [path.absolute() for path in CONFIGS]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LINCLIP_DATA", raising=False)
    if variable:
        monkeypatch.setenv("LINCLIP_DATA", variable)
    for file in files:
        config = load_config(file.stem)
        assert config == load_config(file)
        assert config.output_dir == f"{tmp_path}/runs"
        if config.zero.deepspeed_config is not None:
            assert config.zero.deepspeed_config == str(file.parents[1] / "deepspeed/zero1.json")
        if file.stem.startswith("embedded"):
            data = tmp_path / (variable or "data") / "embedded"
            assert config.data.train[0].shards.startswith(f"{data}/train/")
            assert config.eval.data == f"{data}/test"


def test_a_file_is_preferred_to_a_config_of_the_same_name(tmp_path, monkeypatch):
    embedded = Path(EMBEDDED).absolute()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").write_text(f"base: {embedded}\nname: mine")
    assert load_config("embedded").name == "mine"


def test_names_of_class_lists_and_templates_are_no_paths():
    for name in IMAGENET_LISTS:
        assert load_config(EMBEDDED, [f"eval.classes={name}"]).eval.classes == name
    for name in ("one", "simple", "openai"):
        assert load_config(EMBEDDED, [f"eval.templates={name}"]).eval.templates == name


def _assert_survives_saving(config, folder):
    save_config(config, folder / "config.yaml")
    assert load_config(folder / "config.yaml") == config


def _as_yaml(override):
    """``a.b=value`` as the lines a file would hold."""
    key, value = override.split("=", 1)
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(key.split("."))]
    return "\n".join(lines) + f" {value}"


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


def test_settings_that_version_0_2_saved_beside_softmax_are_read(tmp_path):
    path = tmp_path / "config.yaml"
    old = "{kind: softmax, feature_map: affine, normalized: false, score_scale: 0.5, "
    old += "length_exponent: 0.0, head_norm: false}"
    save_config(load_config(EMBEDDED), path)
    content = yaml.safe_load(path.read_text())
    content["model"]["vision"]["attention"] = yaml.safe_load(old)
    path.write_text(yaml.safe_dump(content))
    assert load_config(path).model.vision.attention == SoftmaxAttention()
    del content["model"]["vision"]["attention"]["head_norm"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"no setting of kind softmax"):
        load_config(path)
