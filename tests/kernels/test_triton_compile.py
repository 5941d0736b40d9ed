"""The Triton kernels compiled ahead of time to cubins, as they are launched; no GPU is needed."""

from concurrent.futures import ProcessPoolExecutor

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
    SHARED_MEMORY,
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


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_training_kernels_fit_into_registers(capability: int) -> None:
    """The launches of CLIP towers in training: bfloat16, heads of 64, all of Eq. 4 and Eq. 7."""
    training = [case for case in cases() if case.dtype == "bf16" and case.dim == 64]
    if capability < 90:  # for compute capability 8.0, the default feature map
        training = [case for case in training if case.variant.feature_map == "affine"]
    assert {case.variant.causal for case in training} == {False, True}
    check([(case, capability) for case in training])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 100])
def test_other_kernels_fit_into_registers(capability: int) -> None:
    """Every other width up to 128 and every dtype."""
    check([(case, capability) for case in cases() if case.dim <= 128])


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
    for heads, dim, capability in ((1, 16, 80), (250, 64, 90), (1000, 256, 100)):
        q = torch.empty(1, num_tokens, heads, dim, dtype=dtype, device="meta")
        chip = Chip(capability=capability)
        value_dim = min(dim, max_value_block(q, chip))
        partition = partition_tokens(
            q, value_dim, Variant(is_causal, True), backward=backward, chip=chip
        )
        (num_parts,) = partition.parts_of_sequences
        assert partition.part % partition.block_tokens == 0
        assert partition.part <= 4096
        assert (num_parts - 1) * partition.part < num_tokens <= num_parts * partition.part
