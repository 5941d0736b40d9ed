"""The dictionary for DeepSpeed follows from the configuration, with one message per mistake."""

import json

import pytest

from ds_linclip.config import Config, load_config
from ds_linclip.engine.deepspeed_config import deepspeed_config
from ds_linclip.parallel.mesh import Mesh

EMBEDDED = "ds_configs/train/embedded.yaml"


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
