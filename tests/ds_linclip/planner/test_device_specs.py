"""Looking up devices by name."""

from ds_linclip.planner.device_specs import device_spec


def test_a_slice_of_a_gpu_is_not_mistaken_for_the_whole():
    whole = device_spec("NVIDIA H100 80GB HBM3")
    assert whole is not None
    assert whole.bf16_flops == 989e12
    assert device_spec("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
