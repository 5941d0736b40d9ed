"""The Triton kernels compiled ahead of time to cubins, as they are launched; no GPU is needed."""

from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from linclip_kernels.linear_attention.compiled.counts import count_kernel
from linclip_kernels.linear_attention.compiled.resources import (
    FORMULAS,
    MULTIPROCESSORS,
    Case,
    cases,
    compile_launch,
    equation,
    measure,
    training_cases,
)
from linclip_kernels.linear_attention.triton_backend import bidirectional, causal
from linclip_kernels.linear_attention.triton_backend.partition import (
    Call,
    Chip,
    RowFactor,
    max_value_block,
    partition_tokens,
    tokens_per_part,
)
from linclip_kernels.linear_attention.variant import Variant

pytestmark = pytest.mark.long


def spills(case: Case, capability: int) -> dict[str, float]:
    """Return the largest share of instructions that move registers to memory or back, in loops
    over tiles."""
    found = {}
    for launch in case.launches(capability):
        counts = count_kernel(case, launch, capability)
        assert counts.usage.blocks_per_sm >= 1, counts.usage
        # The loop around a causal one repeats it for values that are not finite.
        loops = [loop for loop in counts.loops if loop.groups["hmma"] + loop.groups["hgmma"]]
        shares = [loop.groups["spill"] / loop.instructions for loop in loops]
        found[f"{case}: {counts.usage.kernel}"] = max(shares, default=0.0)
    return found


def check_spills(training: list[Case], capability: int, most: float, most_causal: float) -> None:
    assert {case.variant.causal for case in training} == {False, True}
    with ProcessPoolExecutor(2) as pool:
        shares = pool.map(spills, training, [capability] * len(training))
        for case, found in zip(training, shares, strict=True):
            assert found
            for kernel, share in found.items():
                assert share <= (most_causal if case.variant.causal else most), (kernel, share)


def test_loops_of_training_keep_their_values_in_registers() -> None:
    """Heads of 64 in bfloat16, all formulas: bidirectional loops spill nothing, causal ones some.

    ceilings.csv holds the counts of every kernel, on other chips too.
    """
    check_spills([case for case in training_cases() if case.dim == 64], 90, 0.0, 0.05)


def test_wide_heads_keep_their_values_in_registers() -> None:
    """Heads of 128 on Hopper: but for Eq. 4's backward, bidirectional loops spill nothing."""
    wide = [case for case in training_cases() if case.dim == 128 and not case.variant.causal]
    with ProcessPoolExecutor(2) as pool:
        for case, found in zip(wide, pool.map(spills, wide, [90] * len(wide)), strict=True):
            for kernel, share in found.items():
                most = 0.02 if case.variant.normalized and "backward" in kernel else 0.0
                assert share <= most, (kernel, share)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 120])
@pytest.mark.parametrize("dim", [64, 128])
def test_smaller_chips_keep_their_values_in_registers(dim: int, capability: int) -> None:
    """Room in 100 KB of shared memory, and few spills: most in Eq. 4's causal keys' side."""
    training = [case for case in training_cases() if case.dim == dim]
    check_spills(training, capability, 0.0 if dim == 64 else 0.02, 0.04)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 100])
def test_other_kernels_have_room(capability: int) -> None:
    """Every other width, dtype and feature map."""
    chosen = list(cases())
    with ProcessPoolExecutor(2) as pool:
        for usages in pool.map(measure, chosen, [capability] * len(chosen)):
            assert all(usage.blocks_per_sm >= 1 for usage in usages), usages


@pytest.mark.parametrize("capability", MULTIPROCESSORS)
@pytest.mark.parametrize("formula", FORMULAS, ids=equation)
def test_every_chip_has_room_for_the_kernels(capability: int, formula: Variant) -> None:
    """Registers hold the bidirectional kernels on every chip, but for a few seldom read."""
    for usage in measure(Case(formula, 197), capability):
        assert usage.blocks_per_sm >= 1, usage
        assert usage.stack <= 96, usage


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
    partition = partition_tokens(q, 32, Variant(), chip=chip)
    precision = partition.meta.FP32_DOT
    assert precision == ("tf32x3" if hip is None else "ieee")


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_other_dtypes_compile(dtype: str, is_causal: bool) -> None:
    """The interpreter multiplies operands of any dtypes, a chip does not."""
    for usage in measure(Case(Variant(is_causal, normalized=True), 77, dtype), 90):
        assert usage.blocks_per_sm >= 1, usage


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
    partition = partition_tokens(q, 60, variant, boundaries, chip=Chip())
    state = partition.empty_states(partition.num_sequences)
    call = Call(q, k, v, state, partition, RowFactor(0.5, 1.0, factors))
    for backward in (False, True):
        if backward:
            gradients = tuple(map(torch.empty_like, (q, k, v)))
            _, launches = plans.plan_backward(call, state, torch.empty_like(v), state, gradients)
        else:
            launches = plans.plan_forward(call, torch.empty_like(v), state)
        for launch in launches:
            compile_launch(launch, 90)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("num_tokens", [1, 1025, 3004, 4097, 100_001])
def test_parts_are_whole_blocks(num_tokens: int, is_causal: bool, dtype: torch.dtype) -> None:
    """A block that reached into the next part would be counted twice."""
    for heads, dim, arch in ((1, 16, 86), (250, 64, 90), (1000, 256, "gfx942")):
        q = torch.empty(1, num_tokens, heads, dim, dtype=dtype, device="meta")
        chip = Chip(arch=arch)
        value_dim = min(dim, max_value_block(q, chip))
        partition = partition_tokens(q, value_dim, Variant(is_causal, True), chip=chip)
        (num_parts,) = partition.parts_of_sequences
        assert partition.part % partition.block_tokens == 0
        assert partition.part <= (8192 if dtype == torch.bfloat16 else 4096)
        assert (num_parts - 1) * partition.part < num_tokens <= num_parts * partition.part


@pytest.mark.parametrize(
    ("num_heads", "num_tokens", "expected"),
    [
        (3072, 197, 1),  # ViT-B/16 at a batch of 256: every sequence is one part
        (2048, 77, 1),
        (256, 4096, 1),  # 256 programs where 264 run at once
        (16, 4096, 16),
        (16, 16_384, 16),
        (256, 16_384, 2),  # longer than an accumulator adds up
        (16, 2**20, 132),
        (12, 197, 1),  # too short to split
        (1, 512, 2),
    ],
)
def test_programs_fill_the_chip(num_heads: int, num_tokens: int, expected: int) -> None:
    part = tokens_per_part(num_tokens, num_heads, 132, 8192)
    assert -(-num_tokens // part) == expected
    assert part >= min(num_tokens, 256)
    if expected > 1:
        assert num_heads * expected >= 1.9 * 132 or part < 512


def test_states_between_parts_are_little_traffic() -> None:
    """Of a million tokens, less than 2 % of the bytes that forward and backward move."""
    shape = 1, 2**20, 16, 64
    q = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    for is_causal, tensors, states in ((False, 4, 2), (True, 6, 4), (True, 15, 8)):
        partition = partition_tokens(q, 64, Variant(is_causal), chip=Chip())
        (num_parts,) = partition.parts_of_sequences
        traffic = states * num_parts * 65 * 65 * 4
        assert traffic < 0.02 * tensors * 2**20 * 64 * 2
