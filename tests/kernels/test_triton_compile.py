"""The Triton kernels compiled ahead of time to cubins, as they are launched; no GPU is needed."""

from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from linclip_kernels.linear_attention.triton_backend import bidirectional, causal
from linclip_kernels.linear_attention.triton_backend.partition import (
    Call,
    Chip,
    RowFactor,
    max_value_block,
    partition_tokens,
)
from linclip_kernels.linear_attention.triton_backend.resources import (
    MULTIPROCESSORS,
    Case,
    cases,
    compile_launch,
    measure,
)
from linclip_kernels.linear_attention.variant import Variant

pytestmark = pytest.mark.long

#: Bytes per thread that the assembler may keep outside registers to fit another block.
NEGLIGIBLE_STACK = 16


def check(chosen: list[tuple[Case, int]]) -> None:
    with ProcessPoolExecutor(2) as pool:
        for usages in pool.map(measure, *zip(*chosen, strict=True)):
            for usage in usages:
                assert usage.blocks_per_sm >= 1, usage
                assert usage.stack <= NEGLIGIBLE_STACK, usage


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_training_kernels_fit_into_registers(capability: int) -> None:
    """The launches of CLIP towers in training: bfloat16, heads of 64, all of Eq. 4 and Eq. 7."""
    training = [case for case in cases() if case.dtype == "bf16" and case.dim == 64]
    if not Chip(arch=capability).is_large:  # the default feature map
        training = [case for case in training if case.variant.feature_map == "affine"]
    assert {case.variant.causal for case in training} == {False, True}
    check([(case, capability) for case in training])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 100])
def test_other_kernels_fit_into_registers(capability: int) -> None:
    """Every other width up to 128 and every dtype."""
    check([(case, capability) for case in cases() if case.dim <= 128])


@pytest.mark.parametrize("capability", MULTIPROCESSORS)
def test_every_chip_has_room_for_the_kernels(capability: int) -> None:
    """Of chips for consumers, 8.6 and 8.9 keep up to 40 bytes of Eq. 4's backward elsewhere."""
    for usage in measure(Case(Variant(normalized=True), 197), capability):
        assert usage.blocks_per_sm >= 1, usage
        assert usage.stack <= (40 if capability in (86, 89) else NEGLIGIBLE_STACK), usage


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_compile_for_amd(dtype: str, is_causal: bool) -> None:
    """float32 without the three TF32 products that AMD lacks, in 64 KB of shared memory."""
    for launch in Case(Variant(is_causal, normalized=True), 77, dtype).launches("gfx942"):
        assert compile_launch(launch, "gfx942").metadata.shared <= 64 * 1024


@pytest.mark.parametrize(
    ("name", "major", "minor", "hip", "arch", "is_large"),
    [
        ("A100", 8, 0, None, 80, False),
        ("RTX 3090", 8, 6, None, 86, False),
        ("RTX 4090", 8, 9, None, 89, False),
        ("H100", 9, 0, None, 90, True),
        ("B200", 10, 0, None, 100, True),
        ("RTX 5090", 12, 0, None, 120, False),
        ("MI250", 9, 0, "6.4", "gfx90a", False),
        ("MI300X", 9, 4, "6.4", "gfx942", False),
    ],
)
def test_chips_are_told_apart(
    name: str,
    major: int,
    minor: int,
    hip: str | None,
    arch: int | str,
    is_large: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=7)
    if hip is not None:
        found.gcnArchName = f"{arch}:sramecc+:xnack-"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(torch.version, "hip", hip)
    chip = Chip.of(torch.device("cuda"))
    assert chip == Chip(num_sms=7, arch=arch)
    assert chip.is_large == is_large
    q = torch.empty(1, 100, 2, 64, device="meta")
    partition = partition_tokens(q, 32, Variant(), backward=False, chip=chip)
    precision = partition.meta.FP32_DOT
    assert precision == ("tf32x3" if hip is None else "ieee")


def test_widest_kernels_compile() -> None:
    """Heads of 256 do not fit into registers, but compile and have room in shared memory."""
    for case in (
        Case(Variant(normalized=True), 4096, "fp32", 256),
        Case(Variant(True, True), 77, "bf16", 256),
    ):
        assert all(usage.blocks_per_sm >= 1 for usage in measure(case, 90))


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(("heads", "boundaries"), [(1, [0, 1]), (3, [0, 5, 5, 900])])
def test_sequences_with_states_compile(heads: int, boundaries: list[int], is_causal: bool) -> None:
    """Tables, initial states and gradients of states; one head, which Triton specialises."""
    variant = Variant(is_causal, normalized=heads == 1, length_exponent=0.5)
    qkv = torch.empty(1, boundaries[-1], heads, 3, 60, dtype=torch.bfloat16, device="meta")
    q, k, v = qkv.unbind(3)
    factors = torch.empty(1, boundaries[-1], device="meta")
    plans = causal if is_causal else bidirectional
    for backward in (False, True):
        partition = partition_tokens(q, 60, variant, boundaries, backward=backward, chip=Chip())
        state = partition.empty_states(partition.num_sequences)
        call = Call(q, k, v, state, partition, RowFactor(0.5, factors))
        if backward:
            gradients = tuple(map(torch.empty_like, (q, k, v)))
            _, launches = plans.plan_backward(call, state, torch.empty_like(v), state, gradients)
        else:
            launches = plans.plan_forward(call, torch.empty_like(v), state)
        for launch in launches:
            compile_launch(launch, 90)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("num_tokens", [1, 1025, 3004, 4097, 100_001])
def test_parts_are_whole_blocks(
    num_tokens: int, is_causal: bool, dtype: torch.dtype, backward: bool
) -> None:
    """A block that reached into the next part would be counted twice."""
    for heads, dim, arch in ((1, 16, 86), (250, 64, 90), (1000, 256, "gfx942")):
        q = torch.empty(1, num_tokens, heads, dim, dtype=dtype, device="meta")
        chip = Chip(arch=arch)
        value_dim = min(dim, max_value_block(q, chip))
        partition = partition_tokens(
            q, value_dim, Variant(is_causal, True), backward=backward, chip=chip
        )
        (num_parts,) = partition.parts_of_sequences
        assert partition.part % partition.block_tokens == 0
        assert partition.part <= 4096
        assert (num_parts - 1) * partition.part < num_tokens <= num_parts * partition.part
