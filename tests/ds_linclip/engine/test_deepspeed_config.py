"""The generated DeepSpeed configuration, and the checks of what the machine supports."""

import json
from types import SimpleNamespace

import pytest

from ds_linclip.config import load_config
from ds_linclip.engine import deepspeed_config as module
from ds_linclip.engine.deepspeed_config import check_machine, deepspeed_config
from ds_linclip.parallel.mesh import Mesh
from helpers import EMBEDDED


def accelerator(*, fp16: bool, bf16: bool) -> SimpleNamespace:
    return SimpleNamespace(
        is_fp16_supported=lambda: fp16, is_bf16_supported=lambda: bf16, device_name=lambda: "cpu"
    )


@pytest.mark.parametrize(
    ("precision", "bf16", "message"),
    [
        (
            "fp16",
            True,
            r"^train\.precision \(fp16\) is not supported .*: .*precision=bf16$",
        ),
        ("fp16", False, r"take train\.precision=fp32$"),
        ("bf16", False, r"^train\.precision \(bf16\) .* take train\.precision=fp32$"),
        ("amp_bf16", False, r"^train\.precision \(amp_bf16\) .* take train\.precision=fp32$"),
    ],
)
def test_unsupported_precision_is_named(monkeypatch, precision, bf16, message):
    monkeypatch.setattr(module, "get_accelerator", lambda: accelerator(fp16=False, bf16=bf16))
    with pytest.raises(ValueError, match=message):
        check_machine(load_config(EMBEDDED, [f"train.precision={precision}"]))
    check_machine(load_config(EMBEDDED, ["train.precision=fp32"]))


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_nvme_without_async_io_is_named(monkeypatch, name):
    config = load_config(EMBEDDED, [f"zero.{name}=nvme", "zero.stage=3", "zero.nvme_path=/nvme"])
    for compatible in (True, False):
        builder = SimpleNamespace(is_compatible=lambda compatible=compatible: compatible)
        monkeypatch.setattr(module, "AsyncIOBuilder", lambda builder=builder: builder)
        if compatible:
            check_machine(config)
        else:
            message = rf"^zero\.{name} \(nvme\) needs .* libaio .* zero\.{name}=cpu$"
            with pytest.raises(ValueError, match=message):
                check_machine(config)


def test_default_bucket_sizes_and_those_of_the_file(tmp_path):
    mesh = Mesh.create()
    generated = deepspeed_config(load_config(EMBEDDED, ["zero.stage=3"]), mesh)
    zero = generated["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["stage3_max_live_parameters"] == 30_000_000
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 7}}))
    config = load_config(EMBEDDED, [f"zero.deepspeed_config={file}"])
    assert deepspeed_config(config, mesh)["zero_optimization"]["reduce_bucket_size"] == 7
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as Windows editors write it
    assert deepspeed_config(config, mesh)["zero_optimization"]["reduce_bucket_size"] == 7


def test_host_memory_is_pinned_for_gpus_only():
    config = load_config(EMBEDDED, ["zero.offload_optimizer=cpu"])
    zero = deepspeed_config(config, Mesh.create())["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16", "fp16"])
@pytest.mark.parametrize("micro_batch", [64, 128])
def test_gradients_are_summed_over_ranks_in_fp32_unless_bf16_is_asked_for(precision, micro_batch):
    form = [f"train.precision={precision}", f"train.micro_batch_size={micro_batch}"]
    generated = deepspeed_config(load_config(EMBEDDED, form), Mesh.create())
    assert generated["communication_data_type"] == "fp32"
    if "bf16" in precision:
        config = load_config(EMBEDDED, [*form, "train.reduce_dtype=bf16"])
        assert deepspeed_config(config, Mesh.create())["communication_data_type"] == "bf16"


def test_weights_are_fp32_with_amp_bf16():
    generated = deepspeed_config(load_config(EMBEDDED, ["train.precision=amp_bf16"]), Mesh.create())
    assert not generated["bf16"]["enabled"]
    assert not generated["fp16"]["enabled"]


def test_fp16_has_a_dynamic_loss_scale():
    generated = deepspeed_config(load_config(EMBEDDED, ["train.precision=fp16"]), Mesh.create())
    assert generated["fp16"]["enabled"]
    assert generated["fp16"]["initial_scale_power"] == 16
