"""What accelerators can do at best, by the name that torch calls them."""

from dataclasses import dataclass

__all__ = ["Device", "known_device"]


@dataclass(frozen=True)
class Device:
    """The data sheet of an accelerator.

    Attributes:
        bf16_flops: Peak of dense matrix products in bfloat16 (float16 has the same) with fp32 sums,
            in operations per second; data sheets print the double, "with sparsity".
        fp32_flops: In fp32 as torch computes them by default, without TF32; None: not looked up.
        memory_gib: As nvidia-smi shows it; None: not looked up.
    """

    bf16_flops: float
    fp32_flops: float | None = None
    memory_gib: float | None = None


#: By ``torch.cuda.get_device_name``, whole: a slice of a GPU (MIG) has a longer name. From the data
#: sheets at nvidia.com/en-us/data-center/<name>: a100, a10 (products/a10-gpu), a30, a40, l4, l40,
#: l40s, h100, h200, grace-hopper-superchip, dgx-b200 (eight of them), gb200-nvl72 (72).
_DEVICES = {
    "NVIDIA A10": Device(125e12),
    "NVIDIA A30": Device(165e12),
    "NVIDIA A40": Device(149.7e12),
    "NVIDIA A100-PCIE-40GB": Device(312e12),
    "NVIDIA A100-SXM4-40GB": Device(312e12, fp32_flops=19.5e12, memory_gib=40.0),
    "NVIDIA A100 80GB PCIe": Device(312e12),
    "NVIDIA A100-SXM4-80GB": Device(312e12, fp32_flops=19.5e12, memory_gib=80.0),
    "NVIDIA L4": Device(121e12),
    "NVIDIA L40": Device(181e12),
    "NVIDIA L40S": Device(362e12),
    "NVIDIA H100 PCIe": Device(756e12),
    "NVIDIA H100 NVL": Device(835e12),
    "NVIDIA H100 80GB HBM3": Device(989e12, fp32_flops=66.9e12, memory_gib=79.6),
    "NVIDIA H200": Device(989e12, fp32_flops=66.9e12, memory_gib=140.4),
    "NVIDIA H200 NVL": Device(835e12),
    "NVIDIA GH200 480GB": Device(989e12),
    "NVIDIA B200": Device(2250e12),
    "NVIDIA GB200": Device(2500e12),
}


def known_device(name: str) -> Device | None:
    """The data sheet of the device that torch calls so; None for one that is not in the table."""
    return _DEVICES.get(name)
