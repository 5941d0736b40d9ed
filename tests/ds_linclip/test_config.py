"""The configuration: merging, round trip, and one clear message for each mistake."""

import json
import re
import shlex
from pathlib import Path

import pytest

from ds_linclip.config import Config, load_config, save_config
from ds_linclip.parallel.engine import deepspeed_config

CONFIGS = sorted(Path("ds_configs/train").glob("*.yaml"))
EMBEDDED = "ds_configs/train/embedded.yaml"


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
    assert config.data.train == ["x.tar", "y.tar"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"unknown key \(optim\.lrr\); did you mean optim\.lr"),
        ("batch_size=8", r"unknown key \(batch_size\); did you mean .*train\.global_batch_size"),
        ("model.visoin.width=8", r"unknown key \(model\.visoin.*did you mean model\.vision"),
        ("optim.lr=fast", r"optim\.lr: Value 'fast'"),
        ("model.text.attention.kind=flash", r"kind: Invalid value 'flash'"),
        ("model.vision.image_size=33", r"model\.vision\.image_size \(33\) must be .*patch_size"),
        ("model.text.heads=3", r"model\.text\.width \(64\) must be a positive multiple of heads"),
        ("train.steps=0", r"train\.steps \(0\) must be greater than 0"),
        ("optim.warmup_steps=100000", r"optim\.warmup_steps \(100000\) must be less than"),
        ("data.train=[]", r"data\.train \(\[\]\) must name at least one shard"),
        ("parallel.dp=3", r"train\.global_batch_size \(\d+\) must be .*parallel\.dp \(3\)"),
        ("name=a/b", r"name \('a/b'\) must be a plain folder name"),
        ("train.seed=-1", r"train\.seed \(-1\) must not be negative"),
        ("zero.stage=7", r"zero\.stage \(7\) must be"),
        ("model.text.vocab_size=1000", r"vocab_size \(1000\) must be at least 49408"),
        ("model.text.context_length=2", r"context_length \(2\) must be at least 3"),
        ("model.vision.head_width=8", r"model\.vision: head dimension \(8\) must be in 16\.\.256"),
        ("optim.lr=.nan", r"optim\.lr \(nan\) must be greater than 0 and finite"),
        ("data.train=[/x/{0..9}.tar]", r"override \(data\.train.*\) must have a YAML value; quote"),
        ("steps", r"override \(steps\) must have the form key=value"),
    ],
)
def test_bad_value_is_named_with_its_rule(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(EMBEDDED, [override])


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
    generated = deepspeed_config(config, dp_size=2)
    assert generated["train_micro_batch_size_per_gpu"] * 2 == config.train.global_batch_size
    assert generated["bf16"] == {"enabled": True}
    assert generated["gradient_clipping"] == 0.5
    assert generated["zero_optimization"] == {"overlap_comm": True, "stage": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train_batch_size": 8}', "must not set train_batch_size: the training config owns it"),
        ('{"zero_optimization": {"stage": 2}}', r"must not set zero_optimization\.stage"),
        ('{"zero_optimisation": {}}', "must not set zero_optimisation: it is not known here"),
        ('{"zero_optimization": {"overlap_com": true}}', "overlap_com: Extra inputs"),
        ("{", "cannot be read"),
        ("[]", "must hold keys and values"),
    ],
)
def test_mistake_in_the_deepspeed_file_is_named(tmp_path, content, message):
    extra = tmp_path / "extra.json"
    extra.write_text(content)
    config = Config()
    config.zero.deepspeed_config = str(extra)
    with pytest.raises(ValueError, match=rf"zero\.deepspeed_config \(.*extra\.json\).* {message}"):
        deepspeed_config(config, dp_size=1)


def test_commands_in_the_readme_have_overrides_that_load():
    """Every ``launch/train.py`` command of the README, as a shell would split it."""
    blocks = re.findall(r"```bash\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    commands = [
        shlex.split(command, comments=True)
        for block in blocks
        for command in block.replace("\\\n", " ").splitlines()
        if "launch/train.py" in command
    ]
    assert commands
    for command in commands:
        config, *overrides = command[command.index("launch/train.py") + 1 :]
        assert load_config(config, overrides).data.train
