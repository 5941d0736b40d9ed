"""Peak operation rates and memory sizes of accelerators, by torch's name of the device."""

from dataclasses import dataclass

__all__ = ["DeviceSpec", "device_spec"]


@dataclass(frozen=True)
class DeviceSpec:
    """Figures of an accelerator's data sheet.

    Attributes:
        bf16_flops: Peak rate of dense matrix products in bfloat16 (the same in float16) with fp32
            accumulation, in operations per second; data sheets print the double, "with sparsity".
        fp32_flops: Peak rate in fp32 without TF32, as torch computes by default; None: not in this
            table.
        memory_gib: Memory in GiB as nvidia-smi shows it; None: not in this table.
    """

    bf16_flops: float
    fp32_flops: float | None = None
    memory_gib: float | None = None


#: By the whole of ``torch.cuda.get_device_name``; a slice of a GPU (MIG) has a longer name. Source:
#: the data sheets at nvidia.com/en-us/data-center/<name>: a100, a10 (products/a10-gpu), a30, a40,
#: l4, l40, l40s, h100, h200, grace-hopper-superchip, dgx-b200 (eight of them), gb200-nvl72 (72).
_SPECS = {
    "NVIDIA A10": DeviceSpec(125e12),
    "NVIDIA A30": DeviceSpec(165e12),
    "NVIDIA A40": DeviceSpec(149.7e12),
    "NVIDIA A100-PCIE-40GB": DeviceSpec(312e12),
    "NVIDIA A100-SXM4-40GB": DeviceSpec(312e12, fp32_flops=19.5e12, memory_gib=40.0),
    "NVIDIA A100 80GB PCIe": DeviceSpec(312e12),
    "NVIDIA A100-SXM4-80GB": DeviceSpec(312e12, fp32_flops=19.5e12, memory_gib=80.0),
    "NVIDIA L4": DeviceSpec(121e12),
    "NVIDIA L40": DeviceSpec(181e12),
    "NVIDIA L40S": DeviceSpec(362e12),
    "NVIDIA H100 PCIe": DeviceSpec(756e12),
    "NVIDIA H100 NVL": DeviceSpec(835e12),
    "NVIDIA H100 80GB HBM3": DeviceSpec(989e12, fp32_flops=66.9e12, memory_gib=79.6),
    "NVIDIA H200": DeviceSpec(989e12, fp32_flops=66.9e12, memory_gib=140.4),
    "NVIDIA H200 NVL": DeviceSpec(835e12),
    "NVIDIA GH200 480GB": DeviceSpec(989e12),
    "NVIDIA B200": DeviceSpec(2250e12),
    "NVIDIA GB200": DeviceSpec(2500e12),
}


def device_spec(name: str) -> DeviceSpec | None:
    """Return the figures of a device by torch's name; None if the table does not have it."""
    return _SPECS.get(name)
