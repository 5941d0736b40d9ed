"""What accelerators can do at best, by the name that torch calls them."""

from dataclasses import dataclass

__all__ = ["Device", "known_device"]

_GB = 10**9


@dataclass(frozen=True)
class Device:
    """The data sheet of an accelerator.

    Attributes:
        bf16_flops: Peak of dense matrix products in bfloat16 (float16 has the same) with fp32 sums,
            in operations per second; data sheets print the double, "with sparsity".
        memory: In bytes.
    """

    bf16_flops: float
    memory: int


#: By ``torch.cuda.get_device_name``, whole: a slice of a GPU (MIG) has a longer name. From the data
#: sheets at nvidia.com/en-us/data-center/<name>: a100, a10 (products/a10-gpu), a30, a40, l4, l40,
#: l40s, h100, h200, grace-hopper-superchip, dgx-b200 (eight of them), gb200-nvl72 (72).
_DEVICES = {
    "NVIDIA A10": Device(125e12, 24 * _GB),
    "NVIDIA A30": Device(165e12, 24 * _GB),
    "NVIDIA A40": Device(149.7e12, 48 * _GB),
    "NVIDIA A100-PCIE-40GB": Device(312e12, 40 * _GB),
    "NVIDIA A100-SXM4-40GB": Device(312e12, 40 * _GB),
    "NVIDIA A100 80GB PCIe": Device(312e12, 80 * _GB),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 80 * _GB),
    "NVIDIA L4": Device(121e12, 24 * _GB),
    "NVIDIA L40": Device(181e12, 48 * _GB),
    "NVIDIA L40S": Device(362e12, 48 * _GB),
    "NVIDIA H100 PCIe": Device(756e12, 80 * _GB),
    "NVIDIA H100 NVL": Device(835e12, 94 * _GB),
    "NVIDIA H100 80GB HBM3": Device(989e12, 80 * _GB),
    "NVIDIA H200": Device(989e12, 141 * _GB),
    "NVIDIA H200 NVL": Device(835e12, 141 * _GB),
    "NVIDIA GH200 480GB": Device(989e12, 96 * _GB),
    "NVIDIA B200": Device(2250e12, 180 * _GB),
    "NVIDIA GB200": Device(2500e12, 186 * _GB),
}


def known_device(name: str) -> Device | None:
    """The data sheet of the device that torch calls so; None for one that is not in the table."""
    return _DEVICES.get(name)
